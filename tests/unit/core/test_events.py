"""Every event reaches every observer, and an observer that fails harms nobody."""

import inspect
import logging

import pytest

from heatlens_server.core.events import CallEnd, Observer, Observers

CALL = CallEnd(method="m", request_id="r", peer="p", code="OK", duration_s=0.1)
EVENTS = [name for name, _ in inspect.getmembers(Observer, inspect.isfunction) if not name.startswith("_")]


def values_of(event: str) -> tuple[list[object], dict[str, object]]:
    parameters = list(inspect.signature(getattr(Observer, event)).parameters.values())[1:]
    return (
        [CALL for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD],
        {parameter.name: parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY},
    )


def told(event: str, seen: list[object]) -> type[Observer]:
    return type("Told", (Observer,), {event: lambda self, *call, **values: seen.append((call, values))})


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_reaches_every_observer(event):
    seen: list[object] = []
    observer = told(event, seen)
    call, values = values_of(event)
    getattr(Observers([observer(), Observer(), observer()]), event)(*call, **values)
    assert seen == [(tuple(call), values)] * 2


def test_an_observer_that_fails_harms_nobody(caplog):
    class Failing(Observer):
        def answered(self, call):
            raise RuntimeError("full disk")

    seen: list[object] = []
    with caplog.at_level(logging.ERROR):
        Observers([Failing(), told("answered", seen)()]).answered(CALL)
    assert len(seen) == 1
    assert "full disk" in caplog.text
