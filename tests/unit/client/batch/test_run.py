"""Many images at once, in their order."""

import asyncio
from pathlib import Path

import pytest

from heatlens import DeadlineExceededError, HeatlensError, InvalidArgumentError, NotFoundError, UnavailableError
from heatlens._batch.run import Item, answers, is_the_images_own

ITEMS = [Item(str(number), Path(str(number))) for number in range(50)]


async def test_so_many_are_under_way_and_come_in_order():
    running, most = 0, 0
    loop_turns = [number % 7 for number in range(len(ITEMS))]

    async def explain(item):
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(loop_turns[int(item.path)]):
            await asyncio.sleep(0)
        running -= 1
        return item.path

    found = [(item.path, answer) async for item, answer in answers(iter(ITEMS), explain, concurrency=4)]
    assert found == [(item.path, item.path) for item in ITEMS]
    assert most == 4


async def test_inputs_are_read_as_they_are_needed():
    read = []

    def items():
        for item in ITEMS:
            read.append(item)
            yield item

    async def explain(item):
        return item.path

    async for item, _ in answers(items(), explain, concurrency=2):
        assert len(read) <= int(item.path) + 4


async def test_what_ends_the_batch_cancels_what_is_under_way():
    cancelled = []

    async def explain(item):
        if item.path == "3":
            raise UnavailableError("gone", reason="X")
        if int(item.path) < 3:
            return item.path
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(item.path)
            raise

    found = []

    async def run():
        async for item, _ in answers(iter(ITEMS), explain, concurrency=4):
            found.append(item.path)

    with pytest.raises(UnavailableError):
        await run()
    assert found == ["0", "1", "2"]
    assert cancelled


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (FileNotFoundError("gone"), True),
        (InvalidArgumentError.of("image", "x"), True),
        (InvalidArgumentError.of("image.encoded", "x"), True),
        (InvalidArgumentError("x", reason="IMAGE_TOO_LARGE"), True),
        (DeadlineExceededError("late"), True),
        (InvalidArgumentError.of("method", "x"), False),
        (NotFoundError("no model"), False),
        (UnavailableError("gone"), False),
        (HeatlensError("x"), False),
    ],
)
def test_what_is_one_images_fault(error, own):
    assert is_the_images_own(error) is own
