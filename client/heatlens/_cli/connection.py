"""What all commands share: how to reach the server, and how progress and failures are shown."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeAlias, TypedDict

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn

from heatlens._calls.settings import TLS
from heatlens._exceptions import HeatlensError

ServerOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--server",
        "-s",
        envvar="HEATLENS_ADDRESS",
        metavar="HOST:PORT",
        help="The server, or several: a:1,b:1.",
    ),
]
TlsOption: TypeAlias = Annotated[
    bool, typer.Option("--tls", help="Encrypt. Implied by --ca, --cert, and a token for another machine.")
]
CaOption: TypeAlias = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="PEM file with the certificate authorities to trust.")
]
CertOption: TypeAlias = Annotated[
    Path | None, typer.Option("--cert", metavar="FILE", help="PEM file with this client's certificate; with --key.")
]
KeyOption: TypeAlias = Annotated[
    Path | None, typer.Option("--key", metavar="FILE", help="PEM file with the certificate's private key.")
]
TimeoutOption: TypeAlias = Annotated[
    float, typer.Option("--timeout", metavar="SECONDS", help="Time for one call, all retries included.")
]
JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]

DEFAULT_SERVER = "localhost:50051"


class Overflow(StrEnum):
    """What happens to frames that come faster than they are explained."""

    BLOCK = "block"
    DROP_OLDEST = "drop-oldest"


class ClientOptions(TypedDict):
    """The arguments of `Client` that the command line sets."""

    address: str | list[str]
    timeout: float
    token: str | None
    tls: TLS | bool | None


def client_options(
    server: str, *, tls: bool, ca: Path | None, cert: Path | None, key: Path | None, timeout: float
) -> ClientOptions:
    """Return the client's arguments. The token comes from the environment: an argument would show in `ps`.

    Raises:
        typer.BadParameter: of `cert` and `key` one is missing.
    """
    if (cert is None) != (key is None):
        raise typer.BadParameter("give --cert and --key, or neither")
    files = ca is not None or cert is not None
    # A target such as "ipv4:..." may have commas of its own.
    several = "," in server and not server.startswith(("ipv4:", "ipv6:"))
    return ClientOptions(
        address=server.split(",") if several else server,
        timeout=timeout,
        token=os.environ.get("HEATLENS_TOKEN") or None,
        tls=TLS(ca_file=ca, cert_file=cert, key_file=key) if files else (True if tls else None),
    )


@contextmanager
def reporting(*, exit_code: int = 1) -> Iterator[None]:
    """Turn a failure into one line on stderr and an exit code."""
    try:
        yield
    except (HeatlensError, OSError) as error:
        fail(describe(error), exit_code=exit_code)


@contextmanager
def progress(
    word: str,
    *columns: str | ProgressColumn,
    total: int | None = None,
    **fields: Any,  # noqa: ANN401 - what columns show
) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr if that is a terminal.

    Args:
        word: what the command is doing.
        columns: what follows the bar.
        total: how many steps there are; None if that is unknown.
        fields: what the columns show besides.

    Yields:
        What to call after each step: with `advance=1`, or with new values of `completed`, `total` and the fields.
    """
    console = Console(stderr=True)
    shown = Progress(word, BarColumn(), *columns, console=console, disable=not console.is_terminal, transient=True)
    with shown:
        yield partial(shown.update, shown.add_task("", total=total, **fields))


def describe(error: HeatlensError | OSError) -> str:
    """Return an error as one line."""
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    else:
        request = f", request {error.request_id}" if error.request_id else ""
        text = f"{error.message} [{error.reason}{request}]"
    return " ".join(text.split())


def warn(message: str) -> None:
    """Print one line on stderr."""
    typer.echo(f"heatlens: {message}", err=True)


def fail(message: str, *, exit_code: int = 1) -> NoReturn:
    """Print one line on stderr and exit."""
    warn(f"error: {message}")
    raise typer.Exit(exit_code)
