"""The threads of one model: one that stacks the next batch while others, one per device, run the present ones."""

import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from heatlens_server.core.engine import SteppingEngine
from heatlens_server.core.events import Observer
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.device import Batch, Device, as_domain_error
from heatlens_server.scheduling.entry import Deliver, Entry, Outcome, Progress

_log = logging.getLogger(__name__)

FIRST_RETRY_S = 1.0
"""How long a device that was taken out rests before it is tried again, in seconds; then twice as long, and so on."""

_LONGEST_RETRY_S = 60.0

Work = Batch | Entry | Progress
"""What a device does next: run a batch, run an entry's step, or free what an explanation holds."""


def device_names(engines: Sequence[SteppingEngine]) -> tuple[str, ...]:
    """What the devices of a model are called, in order: "cuda:0"; "cpu#0", "cpu#1" where several engines share one."""
    names = [engine.info.device for engine in engines]
    return tuple(
        f"{name}#{names[:index].count(name)}" if names.count(name) > 1 else name for index, name in enumerate(names)
    )


class ReadyWork:
    """Work that devices are to take: batches go to the device that is free first, all else to its own. Thread-safe."""

    def __init__(self, device_count: int) -> None:
        """Make an empty list of work for so many devices."""
        self._batches: deque[Batch] = deque()
        # None: look for a batch, or for the end.
        self._of_devices: list[queue.SimpleQueue[Entry | Progress | None]] = [
            queue.SimpleQueue() for _ in range(device_count)
        ]
        # Whether a device's queue holds a None. More than one would pile up while it is busy.
        self._told = [False] * device_count
        self._closed = False

    def put_batch(self, batch: Batch) -> None:
        """Add a batch, for any device."""
        self._batches.append(batch)
        self._tell_all()

    def put(self, device: int, work: Entry | Progress) -> None:
        """Add work for one device."""
        self._of_devices[device].put(work)

    def close(self) -> None:
        """Tell that no work will follow."""
        self._closed = True
        self._tell_all()

    def get_own(self, device: int, timeout_s: float) -> Entry | Progress | None:
        """Wait for what is put for a device alone, and take it; None if nothing comes, or if there may be a batch."""
        try:
            work = self._of_devices[device].get(timeout=timeout_s)
        except queue.Empty:
            return None
        if work is None:
            self._told[device] = False
        return work

    def get(self, device: int) -> Work | None:
        """Wait for work for a device and take it; None once it is closed and there is none."""
        own = self._of_devices[device]
        while True:
            # Read first: once it is closed, no work is put.
            closed = self._closed
            if own.empty():
                try:
                    return self._batches.popleft()
                except IndexError:
                    if closed:
                        return None
            work = own.get()
            if work is not None:
                return work
            self._told[device] = False

    def _tell_all(self) -> None:
        for device, own in enumerate(self._of_devices):
            if not self._told[device]:
                self._told[device] = True
                own.put(None)


class DeviceThreads:
    """Runs the batches and steps of a batcher on the model's devices, until the batcher is closed and empty."""

    def __init__(
        self,
        engines: Sequence[SteppingEngine],
        batcher: Batcher,
        deliver: Deliver,
        *,
        model: str,
        step_rows: int,
        observer: Observer | None = None,
        try_out: Callable[[SteppingEngine], None] = lambda _engine: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the threads; `start` starts them.

        Args:
            engines: one per device of the batcher; each is called by its device's thread only.
            batcher: where batches come from.
            deliver: takes the outcomes of a batch; what it raises is logged and harms nothing.
            model: the model's name, for thread names, logs and events.
            step_rows: the most rows that a step runs the model on.
            observer: is told of batches and steps; must not raise.
            try_out: has an engine explain an image of nobody's; raises anything if it cannot.
            clock: the batcher's: seconds, monotonic.
        """
        self._batcher = batcher
        self._deliver = deliver
        self._model = model
        self._ready = ReadyWork(len(engines))
        self._threads = [threading.Thread(target=self._stack_batches, name=f"batch-{model}", daemon=True)]
        names = device_names(engines)
        for index, engine in enumerate(engines):
            device = Device(
                engine,
                batcher,
                index=index,
                model=model,
                step_rows=step_rows,
                deliver=self._deliver_safely,
                discard=functools.partial(self._ready.put, index),
                hand_back=self._ready.put_batch,
                try_out=try_out,
                name=names[index],
                observer=observer or Observer(),
                clock=clock,
            )
            name = f"device-{model}-{index}" if len(engines) > 1 else f"device-{model}"
            self._threads.append(threading.Thread(target=self._run, args=(device, index), name=name, daemon=True))

    def start(self) -> None:
        """Start all threads."""
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for all threads to end, which they do once the batcher is closed and empty.

        Returns:
            False if the time ran out.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _stack_batches(self) -> None:
        while (claimed := self._batcher.take()) is not None:
            self._hand_over(claimed)
            del claimed  # it would keep its pixels until the next batch is due
        self._ready.close()

    def _hand_over(self, claimed: list[Entry]) -> None:
        device = claimed[0].device
        if device is not None:
            self._ready.put(device, claimed[0])
            return
        try:
            images = np.stack([entry.image.pixels for entry in claimed if entry.image is not None])
        except BaseException as error:
            _log.exception("model %s: could not stack a batch of %d", self._model, len(claimed))
            self._batcher.drop_batch()
            self._deliver_safely([(entry, as_domain_error(error)) for entry in claimed])
            return
        self._ready.put_batch(Batch(claimed, images))

    def _run(self, device: Device, index: int) -> None:
        while (work := self._ready.get(index)) is not None:
            if isinstance(work, Batch):
                device.run_batch(work)
            elif isinstance(work, Progress):
                device.free(work)
            else:
                device.run_step(work)
            del work  # it would keep its pixels until there is work again
            if not self._batcher.devices.serves(index):
                self._rest(device, index)

    def _rest(self, device: Device, index: int) -> None:
        """Try a device that was taken out, again and again at growing intervals, until it works or the end has come."""
        wait_s = FIRST_RETRY_S
        next_at = time.monotonic() + wait_s
        while not self._batcher.closed:
            work = self._ready.get_own(index, max(0.0, next_at - time.monotonic()))
            if isinstance(work, Progress):
                device.free(work)
            elif work is not None:
                device.refuse_step(work)
            elif time.monotonic() >= next_at:
                if device.works():
                    self._batcher.devices.put_in(index)
                    return
                wait_s = min(_LONGEST_RETRY_S, 2 * wait_s)
                next_at = time.monotonic() + wait_s

    def _deliver_safely(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        try:
            self._deliver(outcomes)
        except Exception:
            _log.exception("model %s: could not deliver %d outcomes", self._model, len(outcomes))
