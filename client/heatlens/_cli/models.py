"""`heatlens models`: list the served models, and load, unload and reload them."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated

import typer

from heatlens._calls.client import Client
from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    CertOption,
    JsonOption,
    KeyOption,
    ServerOption,
    TimeoutOption,
    TlsOption,
    client_options,
    reporting,
)
from heatlens._cli.explaining import VersionOption
from heatlens._results.results import ModelInfo, ModelState

app = typer.Typer(no_args_is_help=False)

_NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="As the server's configuration has it.")]


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    *,
    server: ServerOption = DEFAULT_SERVER,
    as_json: JsonOption = False,
    timeout: TimeoutOption = 30.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
) -> None:
    """List the served models and their methods: first those that the model's engine runs in one pass.

    After "torch:" come those for which torch is loaded when they are first asked for; after "in steps:" those that take
    many runs of the model. Below the table is what the server assumed about models. With --json, a list of objects.
    """
    if context.invoked_subcommand is not None:
        return
    with reporting(), Client(**client_options(server, tls=tls, ca=ca, cert=cert, key=key, timeout=timeout)) as client:
        found = client.models()
    typer.echo(json.dumps([asdict(model) for model in found], indent=2) if as_json else _as_table(found))


def _changing(change: Callable[..., None], said: str, about: str) -> None:
    """Add the command that makes a change, for administrators: their token is in HEATLENS_TOKEN."""

    def command(
        name: _NameArgument,
        *,
        model_version: VersionOption = None,
        server: ServerOption = DEFAULT_SERVER,
        timeout: TimeoutOption = 600.0,
        tls: TlsOption = False,
        ca: CaOption = None,
        cert: CertOption = None,
        key: KeyOption = None,
    ) -> None:
        connection = client_options(server, tls=tls, ca=ca, cert=cert, key=key, timeout=timeout)
        with reporting(), Client(**connection) as client:
            change(client, name, version=model_version)
        typer.echo(f"{name}{'' if model_version is None else f':{model_version}'} is {said}")

    app.command(said.removesuffix("ed"), help=about)(command)


_changing(Client.load_model, "loaded", "Load a model of the server's configuration, and wait until it is ready.")
_changing(Client.unload_model, "unloaded", "Take a model out, once its running calls are finished.")
_changing(Client.reload_model, "reloaded", "Load a model again, beside the one that serves, and wait until it serves.")


def _as_table(found: tuple[ModelInfo, ...]) -> str:
    """Return aligned columns; the default model, and of several versions the default one, is marked with a star."""
    rows = [("NAME", "VERSION", "STATE", "TASK", "INPUT", "CLASSES", "ENGINE", "DEVICE", "METHODS")]
    rows += [
        (
            f"{model.name}{'*' if model.is_default else ''}",
            _version(model, found),
            f"{model.state}{': ' if model.state_message else ''}{model.state_message}{_degraded(model)}",
            model.task or "-",
            _input(model),
            str(model.class_count or "-"),
            f"{model.engine or '-'}{', soon ' if model.next_engine else ''}{model.next_engine}",
            f"{', '.join(device.name for device in model.devices) or model.device} {model.precision}".strip() or "-",
            _methods(model) or "-",
        )
        for model in found
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"{model.name}: {assumption}" for model in found for assumption in model.assumptions])


def _version(model: ModelInfo, found: tuple[ModelInfo, ...]) -> str:
    """Return "2", of several versions "2*" for the default one and "2 10%" for one that has a share of its requests."""
    if model.is_default_version and any(one.name == model.name for one in found if one is not model):
        return f"{model.version}*"
    return f"{model.version or '-'}{f' {100 * model.weight:g}%' if model.weight else ''}"


def _degraded(model: ModelInfo) -> str:
    out = [f"{device.name} is out: {device.message}" for device in model.devices if not device.in_service]
    return f", degraded: {'; '.join(out)}" if model.is_degraded else ""


def _input(model: ModelInfo) -> str:
    if model.input_width_px:
        return f"{model.input_width_px}x{model.input_height_px}"
    # What is not loaded has no size either.
    return "any" if model.state in {ModelState.READY, ModelState.IDLE} else "-"


def _methods(model: ModelInfo) -> str:
    """Return the methods by what runs them and how: "cam grad-cam | torch: le-grad | torch, in steps: ss-cam"."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for method in model.methods:
        engine = model.method_engines.get(method, model.engine)
        groups.setdefault((method in model.methods_in_steps, "" if engine == model.engine else engine), []).append(
            method
        )
    listed = []
    for (in_steps, engine), methods in sorted(groups.items()):
        mark = ", ".join(part for part in (engine, "in steps" if in_steps else "") if part)
        listed.append(f"{mark}{': ' if mark else ''}{' '.join(methods)}")
    return " | ".join(listed)
