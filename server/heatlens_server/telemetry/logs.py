"""Structured logs: one line per event, on stderr, as JSON or for a console.

The code logs with the standard library and puts fields into `extra`.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

_VERBOSE = ("onnxscript", "onnx_ir")
"""What writes thousands of lines about one export; an export says its phases itself."""

_OF_EVERY_RECORD = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"})
"""What of a record is no field of `extra`."""

_COLORS = {"debug": 32, "info": 32, "warning": 33, "error": 31, "critical": 31}
"""ANSI's numbers of a level's colour."""


def configure_logging(*, log_format: Literal["console", "json"], level: str) -> None:
    """Send every log of the process, ours and our libraries', to stderr.

    Tracebacks are written without the values of local variables: those hold callers' images, and formatting them on
    the event loop takes seconds.

    Args:
        log_format: "json" for machines, "console" for people. In JSON a traceback is one field of its line.
        level: "debug", "info", "warning" or "error". Exporters' own lines need "debug".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if log_format == "json" else _ConsoleLines(colors=sys.stderr.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _VERBOSE:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "debug" else logging.WARNING)


class _JsonLines(logging.Formatter):
    """A record as one JSON object; what JSON lacks is written as Python shows it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            **_fields(record),
            "timestamp": _timestamp(record),
        }
        if said := _traceback(record):
            line["exception"] = said
        return json.dumps(line, default=repr)


class _ConsoleLines(logging.Formatter):
    """A record as a line to be read, and its traceback below it."""

    def __init__(self, *, colors: bool) -> None:
        super().__init__()
        self._colors = colors

    def format(self, record: logging.LogRecord) -> str:
        name = record.levelname.lower()
        level = f"{name:<9}"
        if self._colors:
            level = f"\x1b[{_COLORS.get(name, 0)}m{level}\x1b[0m"
        fields = "".join(f" {name}={_shown(value)}" for name, value in sorted(_fields(record).items()))
        line = f"{_timestamp(record)} [{level}] {record.getMessage():<30} [{record.name}]{fields}"
        return "\n".join(filter(None, (line, _traceback(record))))


def _fields(record: logging.LogRecord) -> Mapping[str, object]:
    """What is in `extra`; names with an underscore are of libraries that make records their own way, as Ray does."""
    given = vars(record).items()
    return {name: value for name, value in given if name not in _OF_EVERY_RECORD and not name.startswith("_")}


def _traceback(record: logging.LogRecord) -> str:
    """That of the record's exception, or the stack that it asks for; empty without either."""
    if record.exc_info and record.exc_info[0]:
        return "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
    return record.stack_info or ""


def _shown(value: object) -> str:
    """A value as it stands if it is plain text, else with quotes and escapes, so that it stays one word of a line."""
    is_plain = isinstance(value, str) and value.isprintable() and re.fullmatch(r"[^\s='\"]+", value)
    return str(value) if is_plain else repr(value)


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
