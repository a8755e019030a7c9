"""Large images: few at a time, bounded in bytes, and never before small ones. A model's queue and decoders are real."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytest_asyncio

from heatlens_server.core.errors import DeadlineExpired, ImageMemoryFull
from heatlens_server.core.targets import TopK
from heatlens_server.scheduling.entry import LargeImage
from heatlens_server.scheduling.large_images import LargeImages
from heatlens_server.scheduling.model_queue import ModelQueue
from queue_engines import BATCHED, PATIENCE_S, BatchEngine, image, until

AT_ONCE, MAX_BYTES = 2, 1000


class Slow:
    """A decoder that takes until it is released."""

    def __init__(self, value=1):
        self.started, self.release = threading.Event(), threading.Event()
        self.value = value

    def __call__(self):
        self.started.set()
        assert self.release.wait(PATIENCE_S)
        return image(self.value)


class Rig:
    def __init__(self):
        self.threads, self.large_threads = ThreadPoolExecutor(AT_ONCE), ThreadPoolExecutor(AT_ONCE)
        self.large = LargeImages(self.large_threads, at_once=AT_ONCE, max_bytes=MAX_BYTES)
        self.queues = [self.queue(), self.queue()]
        self.slow = []

    def queue(self):
        return ModelQueue(
            [BatchEngine()],
            name="m",
            decoders=self.threads,
            max_batch_size=4,
            max_delay_s=0.0,
            max_queue_length=64,
            max_decoding=AT_ONCE,
            large_images=self.large,
        )

    def submit(self, decode, *, queue=0, timeout_s=None):
        return self.queues[queue].submit(decode, TopK(1), BATCHED, timeout_s=timeout_s)

    def submit_large(self, value=1, *, size=100, decode_s=1.0, queue=0, timeout_s=None):
        slow = Slow(value)
        self.slow.append(slow)
        return slow, self.submit(lambda: LargeImage(size, decode_s, slow), queue=queue, timeout_s=timeout_s)

    async def close(self):
        for slow in self.slow:
            slow.release.set()
        for queue in self.queues:
            assert await queue.close(timeout_s=PATIENCE_S)
        self.threads.shutdown()
        self.large_threads.shutdown()
        assert not self.large.busy


@pytest_asyncio.fixture
async def rig():
    made = Rig()
    yield made
    await made.close()


async def value_of(ticket):
    return int((await asyncio.wait_for(ticket.result(), PATIENCE_S)).result.logits[0])


async def test_small_images_pass_large_ones_of_every_model(rig):
    large = [rig.submit_large(i, queue=i % 2) for i in range(6)]
    await until(lambda: sum(slow.started.is_set() for slow, _ in large) == AT_ONCE)
    assert rig.large.busy
    for value in range(20):
        assert await value_of(rig.submit(lambda value=value: image(value), queue=value % 2)) == value
    assert sum(slow.started.is_set() for slow, _ in large) == AT_ONCE
    for slow, _ in large:
        slow.release.set()
    assert [await value_of(ticket) for _, ticket in large] == [0, 1, 2, 3, 4, 5]
    await until(lambda: not rig.large.busy)


async def test_one_that_takes_less_long_passes_those_that_take_longer(rig):
    running = [rig.submit_large() for _ in range(AT_ONCE)]
    await until(lambda: all(slow.started.is_set() for slow, _ in running))
    waiting = [rig.submit_large(size=0) for _ in range(8)]
    await until(lambda: len(rig.large._held) == AT_ONCE + 8)
    short, _ = rig.submit_large(size=0, decode_s=0.1)
    await until(lambda: len(rig.large._held) == AT_ONCE + 9)
    running[0][0].release.set()
    await until(short.started.is_set)
    assert not any(slow.started.is_set() for slow, _ in waiting)


async def test_those_that_take_little_memory_need_no_room(rig):
    whole, _ = rig.submit_large(size=MAX_BYTES)
    await until(whole.started.is_set)
    slow, ticket = rig.submit_large(5, size=0)
    slow.release.set()
    assert await value_of(ticket) == 5


async def test_what_does_not_fit_is_refused_with_a_time_to_try_again_and_fits_later(rig):
    slow, first = rig.submit_large(7, size=600)
    await until(slow.started.is_set)
    with pytest.raises(ImageMemoryFull) as caught:
        await rig.submit_large(size=401)[1].result()
    assert caught.value.retry_after_s > 0
    assert caught.value.metadata == {"max_decoding_bytes": str(MAX_BYTES)}
    other, second = rig.submit_large(8, size=400)
    await until(other.started.is_set)
    slow.release.set()
    other.release.set()
    assert [await value_of(first), await value_of(second)] == [7, 8]
    await until(lambda: not rig.large.busy)
    # One alone is let in, whatever it takes.
    whole, third = rig.submit_large(9, size=50 * MAX_BYTES)
    whole.release.set()
    assert await value_of(third) == 9


async def test_one_that_is_taken_back_while_it_waits_gives_its_bytes_back_and_is_not_decoded(rig):
    running = [rig.submit_large(size=100)[0] for _ in range(AT_ONCE)]
    await until(lambda: all(slow.started.is_set() for slow in running))
    waiting, ticket = rig.submit_large(size=800)
    await until(lambda: len(rig.large._held) == AT_ONCE + 1)
    task = asyncio.create_task(ticket.result())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fits, late = rig.submit_large(5, size=800)
    for slow in (*running, fits):
        slow.release.set()
    assert await value_of(late) == 5
    assert not waiting.started.is_set()


async def test_one_whose_deadline_passes_while_it_waits_is_not_decoded(rig):
    running = [rig.submit_large()[0] for _ in range(AT_ONCE)]
    await until(lambda: all(slow.started.is_set() for slow in running))
    late, ticket = rig.submit_large(timeout_s=0.05)
    for slow in running:
        threading.Timer(0.2, slow.release.set).start()
    with pytest.raises(DeadlineExpired):
        await ticket.result()
    assert not late.started.is_set()


async def test_too_little_memory_is_no_fault_of_the_image(rig):
    def fail():
        raise MemoryError

    def really_fail():
        np.empty(1 << 62, np.uint8)

    for decode in (fail, really_fail, lambda: LargeImage(1, 1.0, fail)):
        with pytest.raises(ImageMemoryFull) as caught:
            await rig.submit(decode).result()
        assert caught.value.retry_after_s > 0
