"""Structured logs: one line per event, on stderr, as JSON or for a console.

The code logs with the standard library and puts fields into `extra`; structlog only renders the lines.
"""

import logging
import sys
from typing import Literal

import structlog

_VERBOSE = ("onnxscript", "onnx_ir")
"""What writes thousands of lines about one export; an export says its phases itself."""


def configure_logging(*, log_format: Literal["console", "json"], level: str) -> None:
    """Send every log of the process, ours and our libraries', to stderr.

    Tracebacks are written without the values of local variables: those hold callers' images, and formatting them on
    the event loop takes seconds.

    Args:
        log_format: "json" for machines, "console" for people. In JSON a traceback is one field of its line.
        level: "debug", "info", "warning" or "error". Exporters' own lines need "debug".
    """
    renderers: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _VERBOSE:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "debug" else logging.WARNING)
