"""What the log of a process shows."""

import json
import logging

import pytest

from heatlens_server.telemetry.logs import configure_logging

NAME = "heatlens.rpc"


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


def fail() -> None:
    raise ValueError("inner\nlines")


def log_all() -> None:
    """A line with fields and one of a library's own, one with a traceback, one with a stack."""
    log = logging.getLogger(NAME)
    fields = {"code": "OK", "count": 2, "text": "a b", "size": (1, 2), "kind": frozenset(), "_own": 1}
    log.info("call %s", "one\ntwo", extra=fields)
    try:
        fail()
    except ValueError:
        log.exception("failed")
    # There is no exception where it asks for one.
    log.warning("where", exc_info=True, stack_info=True)  # noqa: LOG014


def test_json_has_one_object_a_line_with_every_field(capsys):
    configure_logging(log_format="json", level="info")
    log_all()
    call, failed, where = map(json.loads, capsys.readouterr().err.splitlines())
    assert call.pop("timestamp").endswith("Z")
    assert call == {
        "event": "call one\ntwo",
        "level": "info",
        "logger": NAME,
        "code": "OK",
        "count": 2,
        "text": "a b",
        "size": [1, 2],
        "kind": "frozenset()",
    }
    assert failed["level"] == "error"
    assert failed["exception"].startswith("Traceback (most recent call last):")
    assert failed["exception"].endswith("ValueError: inner\nlines")
    assert where["exception"].startswith("Stack (most recent call last):")


def test_a_console_has_the_fields_behind_the_message_and_a_traceback_below(capsys):
    configure_logging(log_format="console", level="info")
    logging.getLogger(NAME).info("call", extra={"code": "OK", "text": "a b", "count": 2, "odd": "\x1b[31m"})
    log_all()
    first, *others = capsys.readouterr().err.splitlines()
    timestamp, line = first.split(" ", 1)
    assert timestamp.endswith("Z")
    assert line == f"[info     ] {'call':<30} [{NAME}] code=OK count=2 odd='\\x1b[31m' text='a b'"
    assert "Traceback (most recent call last):" in others
    assert "\x1b" not in "".join(others)


def test_a_terminal_is_told_levels_by_color(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    configure_logging(log_format="console", level="info")
    logging.getLogger(NAME).error("failed")
    assert "[\x1b[31merror    \x1b[0m] failed" in capsys.readouterr().err
