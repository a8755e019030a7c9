"""How fast calls are refused. The clock is the test's."""

import asyncio

import pytest

from heatlens_server.transports.grpc import refusals
from heatlens_server.transports.grpc.refusals import Refusals

A1, A2, B = "ipv4:10.0.0.1:1", "ipv4:10.0.0.1:2", "ipv4:10.0.0.2:1"


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_some_of_a_host_are_refused_at_once_and_so_many_a_second_from_then_on():
    clock = Clock()
    made = Refusals(now=clock)
    at_once = pytest.approx([0.0] * 200, abs=1e-6)
    assert [made.delay_s(A1) for _ in range(200)] == at_once
    assert [made.delay_s(A2) for _ in range(200)] == at_once
    assert [made.delay_s(A1) for _ in range(4)] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    assert made.delay_s(B) == 0
    clock.now_s += 1.02
    assert [made.delay_s(A1) for _ in range(200)] == at_once
    assert made.delay_s(A2) == pytest.approx(0.005)
    clock.now_s += 1000
    assert [made.delay_s(A1) for _ in range(200)] == at_once


async def test_where_too_many_wait_the_next_is_told_so(monkeypatch):
    monkeypatch.setattr(refusals, "_MOST_WAITING", 1)
    made = Refusals(now=Clock())
    for _ in range(400):
        made.delay_s(A1)
    first = asyncio.create_task(made.wait(A1))
    await asyncio.sleep(0)
    assert not await made.wait(A1)
    assert await first
    assert await made.wait(A1)
