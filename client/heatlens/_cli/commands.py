"""All commands as one typer application."""

from typing import Annotated

import typer

from heatlens._cli.batch import batch
from heatlens._cli.bench import bench
from heatlens._cli.evaluate import evaluate
from heatlens._cli.explain import explain
from heatlens._cli.health import run
from heatlens._cli.models import app as models
from heatlens._cli.top import top
from heatlens._cli.video import video
from heatlens._version import __version__

__all__ = ["app"]

app = typer.Typer(
    name="heatlens",
    help="Ask a heatlens server why an image model said what it said. The token, if any, comes from HEATLENS_TOKEN.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (explain, batch, evaluate, video, bench, top):
    app.command()(_command)
app.add_typer(models, name="models")


# Its arguments are its own: probes run it without typer.
@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def health(context: typer.Context) -> None:
    """Whether the server, or one model, serves: the exit code is the answer."""
    raise typer.Exit(run(context.args))


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"heatlens {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Ask a heatlens server why an image model said what it said."""
