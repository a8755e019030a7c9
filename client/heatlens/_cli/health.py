"""`heatlens health`: whether the server, or one model, serves. Made for probes: the exit code is the answer."""

from typing import Annotated

import typer

from heatlens._calls.client import Client
from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    CertOption,
    KeyOption,
    ServerOption,
    TimeoutOption,
    TlsOption,
    client_options,
    reporting,
)
from heatlens._results.results import Health

_EXIT_CODES = {Health.SERVING: 0, Health.NOT_SERVING: 1, Health.UNKNOWN: 2}


def health(
    *,
    server: ServerOption = DEFAULT_SERVER,
    model: Annotated[str | None, typer.Option(show_default="the whole server", help="Ask about this model.")] = None,
    timeout: TimeoutOption = 5.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
) -> None:
    """Print "serving" or "not-serving". Exits with 0 if serving, 1 if not, 2 if unreachable or unknown."""
    with reporting(exit_code=2):
        connection = client_options(server, tls=tls, ca=ca, cert=cert, key=key, timeout=timeout)
        with Client(**connection) as client:
            state = client.health(model)
    typer.echo(state.value)
    raise typer.Exit(_EXIT_CODES[state])
