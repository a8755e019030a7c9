"""The command line: `heatlens`. Results on stdout, messages on stderr; one file per command."""

import sys


def app() -> None:
    """Run the command line."""
    # Probes run this one every few seconds: without what the others import it takes a fifth of the time.
    if sys.argv[1:2] == ["health"]:
        from heatlens._cli.health import run  # noqa: PLC0415 - see above

        sys.exit(run(sys.argv[2:]))
    from heatlens._cli.commands import app as every_command  # noqa: PLC0415 - see above

    every_command()
