"""The gate that lets calls in, counts them and tells how they ended."""

import asyncio
import re

import pytest

from heatlens_server.api.calls import CallGate, current_call
from heatlens_server.core.errors import InternalError, QueueFull, ServerDraining, Unauthenticated
from heatlens_server.core.events import CallEnd, Observer


class Recorder(Observer):
    def __init__(self) -> None:
        self.ends: list[tuple[str, CallEnd]] = []

    def answered(self, call: CallEnd) -> None:
        self.ends.append(("answered", call))

    def refused(self, call: CallEnd) -> None:
        self.ends.append(("refused", call))


async def test_idle_gate_closes_at_once_and_refuses_from_then_on():
    gate = CallGate(Observer())
    assert await gate.close(0)
    with pytest.raises(ServerDraining) as raised, gate.admit(""):
        pass
    assert (raised.value.message, raised.value.retry_after_s) == ("the server is shutting down", 1.0)


async def test_closing_waits_for_the_calls_in_flight():
    gate = CallGate(Observer())
    with gate.admit(""):
        closing = asyncio.create_task(gate.close(10))
        await asyncio.sleep(0)
        assert not closing.done()
        with pytest.raises(ServerDraining), gate.admit(""):
            pass
    assert await closing


async def test_call_that_fails_is_counted_out():
    gate = CallGate(Observer())
    with pytest.raises(KeyError), gate.admit(""):
        raise KeyError
    assert await gate.close(0)


async def test_closing_gives_up_after_its_time():
    gate = CallGate(Observer())
    with gate.admit(""):
        assert not await gate.close(0.01)


@pytest.mark.parametrize("sent", ["Bearer s3cret", "bearer s3cret", "BEARER s3cret"])
async def test_the_right_token_is_let_in(sent):
    with CallGate(Observer(), token="s3cret").admit(sent):
        pass


@pytest.mark.parametrize(
    "sent", ["", "s3cret", "Basic s3cret", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cret2", b""]
)
async def test_any_other_token_is_not(sent):
    gate = CallGate(Observer(), token="s3cret")
    with pytest.raises(Unauthenticated) as raised, gate.admit(sent):
        pass
    assert "s3cret" not in raised.value.message
    assert await gate.close(0)


@pytest.mark.parametrize("sent", ["a", "my-request.1_B", "x" * 64])
async def test_good_request_ids_are_kept(sent):
    assert CallGate(Observer()).begin("m", peer="p", request_id=sent).request_id == sent


@pytest.mark.parametrize("sent", ["", "x" * 65, "a b", "a/b", '{"a":1}', "a;b", "a\n", b"a", None])
async def test_other_request_ids_are_replaced(sent):
    gate = CallGate(Observer())
    made = [gate.begin("m", peer="p", request_id=sent).request_id for _ in range(2)]
    assert made[0] != made[1]
    assert all(re.fullmatch("[0-9a-f]{32}", one) for one in made)


@pytest.mark.parametrize(
    ("code", "error", "event", "is_fault"),
    [
        ("OK", None, "answered", False),
        ("CANCELLED", None, "refused", False),
        ("RESOURCE_EXHAUSTED", QueueFull("full"), "refused", False),
        ("INTERNAL", InternalError("secret"), "refused", True),
        ("INTERNAL", KeyError("bug"), "refused", True),
    ],
)
async def test_the_end_of_a_call_is_told_once(code, error, event, is_fault):
    recorder = Recorder()
    gate = CallGate(recorder)
    call = gate.begin("Explain", peer="ipv4:1", request_id="mine")
    assert current_call() is call
    current_call().fields["model"] = "m"
    gate.end(call, code, error=error)
    ((told, end),) = recorder.ends
    assert (told, end.method, end.request_id, end.peer, end.code) == (event, "Explain", "mine", "ipv4:1", code)
    assert (end.fields, end.error, end.is_fault) == ({"model": "m"}, error, is_fault)
    assert end.duration_s >= 0
