"""Bytes in flight: what fits, who waits, who is refused, and who is cut off."""

import asyncio
import random

import pytest

from heatlens_server.api import byte_budget
from heatlens_server.api.byte_budget import ByteBudget, Held
from heatlens_server.core.errors import BytesInFlight


def budget(**changes) -> ByteBudget:
    return ByteBudget("requests", **({"total_bytes": 100, "peer_bytes": 60, "slow_s": 0.01} | changes))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Who waits looks every ten milliseconds."""
    monkeypatch.setattr(byte_budget, "_LOOK_S", 0.01)


async def test_what_is_held_is_given_back_whatever_happens():
    made = budget()
    with await made.await_message("a", 50) as held:
        assert made.held_bytes == 50
        held.keep(20)
        assert made.held_bytes == 20
    held.release()
    assert made.held_bytes == 0


async def test_messages_that_were_read_leave_no_room_and_the_next_is_refused_at_once():
    made = budget()
    (await made.await_message("a", 50)).keep(30)
    for peer, limit_bytes in (("a", "60"), ("b", "100")):
        if peer == "b":
            made.hold("c").keep(30)
        with pytest.raises(BytesInFlight) as refused:
            await made.await_message(peer, 50)
        assert refused.value.metadata == {"limit_bytes": limit_bytes}
        assert refused.value.retry_after_s
    assert (await made.await_message("b", 40)).bytes == 40


async def test_one_that_is_alone_is_let_in_whatever_its_size():
    made = budget()
    with await made.await_message("a", 1000) as held:
        held.keep(500)
    assert made.held_bytes == 0


async def test_messages_that_are_being_read_are_waited_for_and_the_newest_comes_first():
    made = budget()
    first, second = await made.await_message("a", 50), await made.await_message("b", 50)
    order = []

    async def wait(peer: str) -> None:
        with await made.await_message(peer, 50) as held:
            order.append(peer)
            held.keep(1)

    waits = [asyncio.create_task(wait(peer)) for peer in "cde"]
    await asyncio.sleep(0)
    first.keep(10)
    second.keep(10)
    await asyncio.gather(*waits)
    assert order == ["e", "d", "c"]
    assert made.held_bytes == 20


async def test_a_peer_that_is_slow_to_send_is_cut_off_while_others_wait_and_comes_last_from_then_on():
    made = budget()
    slow = await made.await_message("a", 60)
    assert slow.cut is not None
    held = await made.await_message("b", 60)  # waits until the other is cut off
    assert slow.cut.done()
    assert (slow.bytes, made.held_bytes) == (0, 60)
    order = []

    async def wait(peer: str) -> None:
        with await made.await_message(peer, 60):
            order.append(peer)

    waits = [asyncio.create_task(wait(peer)) for peer in ("c", "a")]
    await asyncio.sleep(0)
    held.release()
    await asyncio.gather(*waits)
    assert order == ["c", "a"]


async def test_a_host_that_was_cut_off_comes_last_by_whichever_connection():
    made = budget()
    await made.await_message("ipv4:10.0.0.1:1", 60)
    held = await made.await_message("ipv4:10.0.0.1:2", 60)
    order = []

    async def wait(peer: str) -> None:
        with await made.await_message(peer, 60):
            order.append(peer)

    waits = [asyncio.create_task(wait(f"ipv4:10.0.0.{host}")) for host in ("2:1", "1:3", "1:4")]
    await asyncio.sleep(0)
    held.release()
    await asyncio.gather(*waits)
    assert order[0] == "ipv4:10.0.0.2:1"


async def test_a_host_that_holds_less_waits_for_one_that_holds_more_and_comes_before_its_others():
    made = budget(peer_bytes=1000)
    many = [await made.await_message(f"ipv4:10.0.0.1:{port}", 30) for port in range(3)]
    for held in many:
        held.keep(30)
    with pytest.raises(BytesInFlight):
        await made.await_message("ipv4:10.0.0.1:4", 30)
    order = []

    async def wait(peer: str, held: Held) -> None:
        await made.wait(held, 30)
        order.append(peer)

    async def other() -> None:
        await made.await_message("ipv4:10.0.0.2:1", 30)
        order.append("other")

    waits = [asyncio.create_task(other())]
    await asyncio.sleep(0)
    waits += [asyncio.create_task(wait(f"own {number}", made.hold("ipv4:10.0.0.1:5"))) for number in range(2)]
    await asyncio.sleep(0)
    for held in many:
        held.release()
        await asyncio.sleep(0)
    await asyncio.gather(*waits)
    assert order == ["other", "own 1", "own 0"]


async def test_a_little_is_kept_for_hosts_that_hold_little_while_another_has_all():
    made = ByteBudget("answers", total_bytes=640, peer_bytes=640, slow_s=60)
    made.hold("ipv4:10.0.0.1:1").keep(640)
    more_of_it = asyncio.ensure_future(made.wait(made.hold("ipv4:10.0.0.1:2"), 10))
    await asyncio.sleep(0)
    others = [made.hold(f"ipv4:10.0.0.{n}:1") for n in range(2, 11)]
    # An eighth of the budget, for eight of them at the most that each may have.
    await asyncio.gather(*(made.wait(held, 10) for held in others[:8]))
    late = asyncio.ensure_future(made.wait(others[8], 10))
    much = asyncio.ensure_future(made.wait(others[0], 20))
    await asyncio.sleep(0)
    assert not any(waiting.done() for waiting in (more_of_it, late, much))
    for waiting in (more_of_it, late, much):
        waiting.cancel()
    await asyncio.gather(more_of_it, late, much, return_exceptions=True)
    assert made.held_bytes == 640 + 80


async def test_where_too_many_wait_those_of_the_host_of_which_most_do_are_refused_first():
    made = budget(most_waiting=3, slow_s=10)
    first = await made.await_message("ipv4:10.0.0.9:1", 60)
    waits = [
        asyncio.create_task(made.await_message(f"ipv4:10.0.0.{host}", 60)) for host in ("2:1", "1:1", "1:2", "1:3")
    ]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    assert [wait.done() for wait in waits] == [False, True, False, False]
    assert isinstance(waits[1].exception(), BytesInFlight)
    first.release()
    (await waits[3]).release()
    (await waits[2]).release()
    (await waits[0]).release()


async def test_nobody_is_cut_off_for_a_peer_that_holds_too_much_itself():
    made = budget(total_bytes=200, peer_bytes=50)
    other = await made.await_message("b", 40)
    own = await made.await_message("a", 50)
    await made.await_message("a", 50)
    assert own.cut is not None
    assert own.cut.done()
    assert other.cut is not None
    assert not other.cut.done()


async def test_who_waits_in_vain_is_refused_and_who_leaves_holds_nothing(monkeypatch):
    relieved = []
    made = budget(relieve=lambda: relieved.append(True))
    made.hold("a").keep(100)
    leaving = asyncio.create_task(made.wait(made.hold("b"), 10))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    monkeypatch.setattr(byte_budget, "_ROOM_S", 0.02)
    with pytest.raises(BytesInFlight):
        await made.wait(made.hold("b"), 10)
    assert relieved
    assert made.held_bytes == 100


async def test_who_frees_room_at_the_last_moment_gets_it(monkeypatch):
    monkeypatch.setattr(byte_budget, "_ROOM_S", 0.0)
    made = budget(slow_s=0.0)
    await made.await_message("a", 60)
    await asyncio.sleep(0.01)
    with made.hold("b") as held:
        await made.wait(held, 60)
        assert made.held_bytes == 60
    assert made.held_bytes == 0


async def test_too_many_that_wait_are_refused_the_oldest_first():
    made = budget(most_waiting=2)
    everything = made.hold("a")
    everything.keep(100)
    waits = [asyncio.create_task(made.wait(made.hold(peer), 10)) for peer in "bcd"]
    with pytest.raises(BytesInFlight):
        await waits[0]
    everything.release()
    await asyncio.gather(*waits[1:])
    assert made.held_bytes == 20


async def test_watchers_hear_of_room():
    made, heard = budget(), []
    held = made.hold("a")
    held.keep(60)
    assert made.is_full("a")
    assert not made.is_full("b")
    with made.watched(lambda: heard.append(made.is_full("a"))):
        held.keep(10)
    held.release()
    assert heard == [False]


async def test_one_whose_time_is_over_as_it_makes_room_for_itself_gets_that_room(monkeypatch):
    made = budget()
    await made.await_message("a", 60)
    await asyncio.sleep(0.02)  # too slow by now
    monkeypatch.setattr(byte_budget, "_ROOM_S", 0.0)
    with await made.await_message("b", 60):
        assert made.held_bytes == 60
    assert made.held_bytes == 0


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_callers_do_all_are_answered_and_nothing_is_held_afterwards(monkeypatch, seed):
    monkeypatch.setattr(byte_budget, "_ROOM_S", 0.03)
    chance = random.Random(seed)
    made = budget(slow_s=chance.choice([0.004, 5]), most_waiting=chance.choice([3, 1000]))

    async def read_message(peer: str, most_bytes: int) -> None:
        with await made.await_message(peer, most_bytes) as held:
            await asyncio.sleep(chance.random() * 0.01)
            held.keep(chance.randrange(1, most_bytes))
            await asyncio.sleep(chance.random() * 0.005)

    async def hold(peer: str, size_bytes: int) -> None:
        with made.hold(peer) as held:
            await held.room(size_bytes)
            await asyncio.sleep(chance.random() * 0.005)
            await held.room(chance.randrange(1, 100))

    tasks: list[asyncio.Task[None]] = []
    for _ in range(60):
        peer = f"ipv4:10.0.0.{chance.randrange(4)}:{chance.randrange(3)}"
        tasks.append(asyncio.create_task(chance.choice([read_message, hold])(peer, chance.choice([10, 40, 60, 150]))))
        await asyncio.sleep(chance.choice([0, 0, 0.004]))
        if chance.random() < 0.2:
            chance.choice(tasks).cancel()
    _, waiting = await asyncio.wait(tasks, timeout=60)
    assert not waiting
    errors = {type(task.exception()) for task in tasks if not task.cancelled()}
    assert errors <= {type(None), BytesInFlight}
    assert made.held_bytes == 0
    (await made.await_message("a", 100)).release()
