"""What the log of a process shows."""

import json
import logging
from datetime import datetime
from pathlib import Path

import pytest

from heatlens_server.telemetry.logs import ConsoleLines, configure_logging


@pytest.fixture(autouse=True)
def _as_before():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])


@pytest.mark.parametrize(("level", "shown"), [("debug", True), ("info", False)])
@pytest.mark.parametrize("library", ["onnxscript.optimizer", "onnx_ir.passes"])
def test_what_exporters_say_of_every_node_is_for_debugging(capsys, level, shown, library):
    configure_logging(log_format="console", level=level)
    logging.getLogger(library).info("folded a node")
    logging.getLogger("heatlens").info("model m: translating to ONNX")
    logging.getLogger(library).warning("an operator is missing")
    said = capsys.readouterr().err
    assert ("folded a node" in said) == shown
    assert "translating to ONNX" in said
    assert "an operator is missing" in said


def logged(capsys, log_format: str, **fields: object) -> str:
    configure_logging(log_format=log_format, level="info")
    logging.getLogger("heatlens.rpc").error("call %d", 7, exc_info=ValueError("wrong"), extra=fields)
    logging.getLogger("other").info("done")
    return capsys.readouterr().err


def test_json_is_one_object_a_line_with_all_fields(capsys):
    first, second = logged(capsys, "json", code="OK", duration_ms=1.5, peer="a\nb", odd=Path("x")).splitlines()
    line = json.loads(first)
    assert line.pop("exception") == "ValueError: wrong"
    assert datetime.fromisoformat(line.pop("timestamp")).tzinfo is not None
    assert line == {
        "event": "call 7",
        "level": "error",
        "logger": "heatlens.rpc",
        "code": "OK",
        "duration_ms": 1.5,
        "peer": "a\nb",
        "odd": repr(Path("x")),
    }
    assert set(json.loads(second)) == {"event", "level", "logger", "timestamp"}


def test_console_lines_have_fields_in_order_and_the_traceback_below(capsys):
    lines = logged(capsys, "console", duration_ms=1.5, code="OK", error="no such\nthing", empty="").splitlines()
    time, rest = lines[0].split(" ", 1)
    assert time.endswith("Z")
    assert datetime.fromisoformat(time).tzinfo is not None
    assert rest == (
        "[error    ] call 7                         [heatlens.rpc] code=OK duration_ms=1.5 empty='' "
        "error='no such\\nthing'"
    )
    assert lines[1] == "ValueError: wrong"
    assert lines[2].endswith("[info     ] done                           [other]")


def test_levels_are_coloured_on_a_terminal_alone():
    record = logging.makeLogRecord({"levelname": "WARNING", "name": "n", "msg": "m"})
    assert "[\x1b[33mwarning  \x1b[0m] m" in ConsoleLines(colors=True).format(record)
    assert "\x1b" not in ConsoleLines(colors=False).format(record)
