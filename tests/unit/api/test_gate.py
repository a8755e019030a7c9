"""The gate that counts calls."""

import asyncio

import pytest

from heatlens_server.api.gate import CallGate
from heatlens_server.core.errors import ServerDraining


async def test_idle_gate_closes_at_once_and_refuses_from_then_on():
    gate = CallGate()
    assert await gate.close(0)
    with pytest.raises(ServerDraining), gate:
        pass


async def test_closing_waits_for_the_calls_in_flight():
    gate = CallGate()
    with gate:
        closing = asyncio.create_task(gate.close(10))
        await asyncio.sleep(0)
        assert not closing.done()
        with pytest.raises(ServerDraining), gate:
            pass
    assert await closing


async def test_call_that_fails_is_counted_out():
    gate = CallGate()
    with pytest.raises(KeyError), gate:
        raise KeyError
    assert await gate.close(0)


async def test_closing_gives_up_after_its_time():
    gate = CallGate()
    with gate:
        assert not await gate.close(0.01)
