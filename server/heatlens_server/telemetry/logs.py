"""Structured logs: one line per event, on stderr, as JSON or for a console.

The code logs with the standard library and puts fields into `extra`.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

_VERBOSE = ("onnxscript", "onnx_ir")
"""What writes thousands of lines about one export; an export says its phases itself."""

_NO_FIELDS = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime"})
"""What every record has."""

_EVENT_WIDTH = 30
_COLORS = {"debug": 32, "info": 32, "warning": 33, "error": 31, "critical": 31}
"""Of ECMA-48, by level."""


def configure_logging(*, log_format: Literal["console", "json"], level: str) -> None:
    """Send every log of the process, ours and our libraries', to stderr.

    Tracebacks are written without the values of local variables: those hold callers' images, and formatting them on
    the event loop takes seconds.

    Args:
        log_format: "json" for machines, "console" for people. In JSON a traceback is one field of its line.
        level: "debug", "info", "warning" or "error". Exporters' own lines need "debug".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else ConsoleLines(colors=sys.stderr.isatty()))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _VERBOSE:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "debug" else logging.WARNING)


class JsonLines(logging.Formatter):
    """Writes a record as one JSON object: its fields, event, level, logger, timestamp, and exception if it has one."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            **_fields(record),
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "timestamp": _timestamp(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=repr)


class ConsoleLines(logging.Formatter):
    """Writes a record as a line for people, and its traceback below."""

    def __init__(self, *, colors: bool) -> None:
        """Write levels in colours, or nothing."""
        super().__init__()
        self._colors = colors

    def format(self, record: logging.LogRecord) -> str:
        """One line, and those of the traceback."""
        name = record.levelname.lower()
        level = f"{name:<9}"
        if self._colors:
            level = f"\x1b[{_COLORS.get(name, 0)}m{level}\x1b[0m"
        fields = "".join(f" {name}={_shown(value)}" for name, value in sorted(_fields(record).items()))
        line = f"{_timestamp(record)} [{level}] {record.getMessage():<{_EVENT_WIDTH}} [{record.name}]{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _NO_FIELDS}


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z")


def _shown(value: object) -> str:
    """A value as a word; quoted where it would not be one, or would be several lines."""
    text = str(value)
    return text if text.isprintable() and text and not {" ", "=", '"', "'"}.intersection(text) else repr(value)
