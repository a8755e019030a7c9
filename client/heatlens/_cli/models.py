"""`heatlens models`: list the served models."""

import json
from dataclasses import asdict

import typer

from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    JsonOption,
    ServerOption,
    TimeoutOption,
    TlsOption,
    client_options,
    reporting,
)
from heatlens._client import Client
from heatlens._results import ModelInfo


def models(
    *,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    timeout: TimeoutOption = 30.0,
    tls: TlsOption = False,
    ca: CaOption = None,
) -> None:
    """List the served models. With --json, a list of objects."""
    with reporting(), Client(**client_options(server, tls=tls, ca=ca, timeout=timeout)) as client:
        found = client.models()
    typer.echo(json.dumps([asdict(model) for model in found], indent=2) if as_json else _as_table(found))


def _as_table(found: tuple[ModelInfo, ...]) -> str:
    """Return aligned columns; the default model is marked with a star."""
    rows = [("NAME", "STATE", "INPUT", "CLASSES", "ENGINE", "DEVICE", "METHODS")]
    rows += [
        (
            f"{model.name}{'*' if model.is_default else ''}",
            f"{model.state}{': ' if model.state_message else ''}{model.state_message}",
            f"{model.input_width_px}x{model.input_height_px}" if model.input_width_px else "-",
            str(model.class_count or "-"),
            model.engine or "-",
            f"{model.device} {model.precision}".strip() or "-",
            " ".join(model.methods) or "-",
        )
        for model in found
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
