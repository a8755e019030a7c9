"""One log line per call and per change of a model's state."""

import importlib
import inspect
import logging
import pkgutil

import pytest

from heatlens_server import app, telemetry
from heatlens_server.core.errors import InternalError, InvalidArgument
from heatlens_server.core.events import CallEnd, Observer
from heatlens_server.telemetry.log_observer import LogObserver


def end(code: str = "OK", error: Exception | None = None, *, is_fault: bool = False, **fields: object) -> CallEnd:
    return CallEnd("Explain", "id-1", "ipv4:1", code, 0.0123456, fields, error, is_fault)


@pytest.fixture
def line(caplog):
    """The one line that was written."""
    caplog.set_level(logging.INFO)

    def only() -> logging.LogRecord:
        (record,) = caplog.records
        return record

    return only


def test_a_call_that_ended_well(line):
    LogObserver().answered(end(model="m", frames_answered=3))
    record = line()
    assert (record.name, record.levelno, record.getMessage()) == ("heatlens.rpc", logging.INFO, "call")
    assert (record.method, record.code, record.request_id, record.peer) == ("Explain", "OK", "id-1", "ipv4:1")
    assert (record.duration_ms, record.model, record.frames_answered) == (12.346, "m", 3)
    assert not hasattr(record, "error")


@pytest.mark.parametrize(("share", "written"), [(1.0, 100), (0.1, 10), (0.25, 25), (0.0, 0)])
def test_a_share_of_the_calls_that_end_well_and_all_others(caplog, share, written):
    caplog.set_level(logging.INFO)
    observer = LogObserver(ok_share=share)
    for number in range(100):
        observer.answered(end(number=number))
    assert len(caplog.records) == written
    if written:
        assert [record.number for record in caplog.records] == list(range(100 // written - 1, 100, 100 // written))
    caplog.clear()
    for _ in range(3):
        observer.refused(end("CANCELLED"))
    assert len(caplog.records) == 3


def test_a_cancelled_call(line):
    LogObserver().refused(end("CANCELLED"))
    assert (line().levelno, line().code, hasattr(line(), "error")) == (logging.INFO, "CANCELLED", False)


def test_the_callers_fault_has_its_reason_and_no_traceback(line):
    error = InvalidArgument.of("options.top_k", "x" * 600, reason="INVALID_OPTION")
    LogObserver().refused(end("INVALID_ARGUMENT", error))
    assert (line().levelno, line().reason, line().exc_info) == (logging.INFO, "INVALID_OPTION", None)
    assert line().error == error.message[:500]


@pytest.mark.parametrize("error", [KeyError("secret-1"), InternalError("secret-1")])
def test_our_fault_has_its_traceback(line, error):
    LogObserver().refused(end("INTERNAL", error, is_fault=True))
    assert (line().levelno, line().exc_info[1], line().error) == (logging.ERROR, error, repr(error))


@pytest.mark.parametrize(
    ("state", "level", "text"),
    [
        ("ready", logging.INFO, "model m ready: why"),
        ("failed", logging.ERROR, "model m failed to load: why"),
        ("unloaded", logging.INFO, "model m unloaded"),
    ],
)
def test_states_of_models(line, state, level, text):
    LogObserver().model_changed(model="m", state=state, message="why")
    assert (line().name, line().levelno, line().getMessage()) == ("heatlens", level, text)


@pytest.mark.parametrize(
    ("fault", "level", "text"),
    [
        ("its runs fail", logging.ERROR, "model m is degraded: cuda:1 is taken out, as its runs fail"),
        ("", logging.INFO, "model m: cuda:1 works again"),
    ],
)
def test_devices_of_models(line, fault, level, text):
    LogObserver().device_changed(model="m", device="cuda:1", fault=fault)
    assert (line().name, line().levelno, line().getMessage()) == ("heatlens", level, text)


def test_an_unexpected_failure_to_load_has_its_traceback_in_the_same_line(line):
    fault = RuntimeError("unexpected")
    LogObserver().model_changed(model="m", state="failed", message="why", fault=fault)
    assert (line().exc_info[1], line().getMessage()) == (fault, "model m failed to load: why")


def observers_of_the_server():
    for module in pkgutil.iter_modules(telemetry.__path__, f"{telemetry.__name__}."):
        for _, kind in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if kind.__module__ == module.name and issubclass(kind, Observer):
                yield kind


@pytest.mark.parametrize("kind", list(observers_of_the_server()))
def test_every_observer_hears_of_an_event_and_is_given_to_the_server(kind):
    assert vars(kind).keys() & {name for name in vars(Observer) if not name.startswith("_")}
    # Those that are off by default are imported where they are switched on.
    assert vars(app).get(kind.__name__) is kind or f"import {kind.__name__}\n" in inspect.getsource(app)
