"""`heatlens evaluate`: which method's maps are faithful, on these images."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn

from heatlens._calls.client import Client
from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    CertOption,
    JsonOption,
    KeyOption,
    ServerOption,
    TlsOption,
    client_options,
    describe,
    fail,
    progress,
    reporting,
    warn,
)
from heatlens._cli.explaining import SCORE_OPTIONS, ModelOption, VersionOption, chosen, listed, takes
from heatlens._cli.interrupt import INTERRUPTED
from heatlens._evaluation.evaluate import evaluate as run
from heatlens._video.inputs import SERVER_SUFFIXES, images_of


@takes("layers", *SCORE_OPTIONS, "reference", "min_score", after="metrics")
def evaluate(
    *,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files, folders, quoted globs.")],
    server: ServerOption = DEFAULT_SERVER,
    model: ModelOption = None,
    model_version: VersionOption = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            show_default="those of a single pass",
            help="The methods, separated by commas; all: every one that the model supports. Random-CAM is added.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", show_default="all", help="The metrics, separated by commas: deletion,insertion,..."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Write evaluation.png (chart) and .json (all) there."),
    ] = None,
    as_json: JsonOption = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Time for one map and its measures.")
    ] = 600.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    **options: Any,  # noqa: ANN401 - the options of `takes`
) -> None:
    """Measure how faithful methods are: every method explains every image, and every map is tested on the model.

    Exits with 1 if an image failed; it is left out for all methods. Without --methods, and with "all", methods that
    refuse the options are left out, which is said on stderr; a method that is named must take them.
    """
    # Better now than after hours of work.
    if output is not None and find_spec("matplotlib") is None:
        fail("charts need matplotlib: pip install 'heatlens[plot]'")
    try:
        with reporting():
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
            bar = progress("measuring", MofNCompleteColumn(), "maps", TimeElapsedColumn(), TimeRemainingColumn())
            with (
                Client(**client_options(server, tls=tls, ca=ca, cert=cert, key=key, timeout=timeout)) as client,
                bar as update,
            ):
                evaluation = run(
                    client,
                    [path for text in images for path in images_of(text, suffixes=SERVER_SUFFIXES) or [Path(text)]],
                    model=model,
                    version=model_version,
                    methods=listed(methods),
                    metrics=listed(metrics),
                    **chosen(options),
                    on_progress=lambda done, total: update(completed=done, total=total),
                )
            for failure in evaluation.failures:
                text = describe(failure.error)
                warn(f"error: {text}" if failure.image in text else f"error: {failure.image}: {text}")
            for method, reason in evaluation.left_out.items():
                warn(f"left out {method}: {' '.join(reason.split())}")
            if not evaluation.images:
                fail("every image failed")
            report = json.dumps(evaluation.as_dict(), indent=2)
            console = Console()
            width = console.width if console.is_terminal else None
            typer.echo(report if as_json else evaluation.table(width=width))
            if output is not None:
                (output / "evaluation.json").write_text(f"{report}\n")
                evaluation.chart(output / "evaluation.png")
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if evaluation.failures:
        raise typer.Exit(1)
