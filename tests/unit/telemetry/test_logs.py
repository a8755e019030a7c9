"""What the log of a process shows."""

import logging

import pytest

from heatlens_server.telemetry.logs import configure_logging


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
