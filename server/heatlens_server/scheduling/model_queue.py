"""One model's way from an awaiting caller to a device and back: admission, decoding, queue, result."""

import asyncio
import functools
import itertools
import time
import weakref
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from heatlens_server.core.cores import usable_cores
from heatlens_server.core.engine import MapSpec, SteppingEngine
from heatlens_server.core.errors import DeadlineExpired, ImageMemoryFull, QueueFull
from heatlens_server.core.events import Observer, Trace
from heatlens_server.core.peers import gives_way, host_of
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import Target
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.decode_queue import DecodeQueue
from heatlens_server.scheduling.device_threads import DeviceThreads, device_names
from heatlens_server.scheduling.entry import Entry, EntryState, LargeImage, Outcome, QueueResult, Source
from heatlens_server.scheduling.large_images import LargeImages
from heatlens_server.scheduling.loader import EngineLoader
from heatlens_server.scheduling.ticket import Ticket, resolve

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """One device of a model, at one moment.

    Attributes:
        name: "cuda:0"; "cpu#0" where several engines share one.
        fault: why it takes no work; empty if it serves.
    """

    name: str
    fault: str


class ModelQueue:
    """Explains images with one model. Its methods belong to the event loop that the queue was made on.

    Attributes:
        engines: those of the model, one per device.
        batcher: the entries that wait.
    """

    def __init__(
        self,
        engines: Sequence[SteppingEngine],
        *,
        name: str,
        decoders: Executor,
        max_batch_size: int,
        max_delay_s: float,
        max_queue_length: int,
        max_decoding: int | None = None,
        large_images: LargeImages | None = None,
        observer: Observer | None = None,
        host_of: Callable[[str], str] = host_of,
        try_out: Callable[[SteppingEngine], None] = lambda _engine: None,
    ) -> None:
        """Start the model's threads. Must be called on the event loop.

        Args:
            engines: at least one, each for a thread of its own; owned by the queue from now on.
            name: the model's name.
            decoders: threads that decode and resize.
            max_batch_size: most images in a batch, and most rows in a step.
            max_delay_s: the batching window, in seconds.
            max_queue_length: most requests admitted and not running, those of streams aside.
            max_decoding: most images decoded at the same time, large ones aside; None: one per CPU.
            large_images: where large images wait for their turn; None: they are decoded as all others are.
            observer: is told of images, batches and steps; must not raise (see `core.events.Observers`).
            host_of: of a connection, the host that places in the queue are shared between.
            try_out: has an engine explain an image of nobody's; raises anything if it cannot.
        """
        self.engines = tuple(engines)
        self._name = name
        self._observer = observer or Observer()
        self._loop = asyncio.get_running_loop()
        self._decode_queue = DecodeQueue(decoders, self._decode, at_once=max_decoding or usable_cores())
        self._large_images = large_images
        self.batcher = Batcher(
            max_batch_size=max_batch_size,
            max_delay_s=max_delay_s,
            max_queue_length=max_queue_length,
            deliver=self._deliver,
            device_count=len(self.engines),
            on_device=self._on_device,
        )
        self._loader = EngineLoader(self.engines, model=name, max_waiting=max_queue_length)
        self._threads = DeviceThreads(
            self.engines,
            self.batcher,
            self._deliver,
            model=name,
            step_rows=max_batch_size,
            observer=self._observer,
            try_out=try_out,
        )
        self._threads.start()
        self._host_of = host_of
        # In the order they came. Weak: a ticket whose caller has left needs no answer.
        self._tickets: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()

    @property
    def devices(self) -> tuple[DeviceStatus, ...]:
        """The devices of the model, now. Any thread may ask."""
        return tuple(map(DeviceStatus, device_names(self.engines), self.batcher.devices.faults))

    async def load_for(self, spec: MapSpec) -> None:
        """Load everything that a spec needs; to be awaited before `submit`. Returns at once if it is loaded.

        Raises:
            CompanionFailed: it cannot be loaded; the next request tries again.
            QueueFull: too many wait for it already.
        """
        while not all(engine.is_loaded_for(spec) for engine in self.engines):
            if await self._loader.load(spec) == spec:
                return

    def submit(
        self,
        decode: Callable[[], FittedImage | LargeImage],
        target: Target,
        spec: MapSpec,
        *,
        timeout_s: float | None,
        source: Source | None = None,
        peer: str = "",
        finish_target: Callable[[FittedImage], Target] | None = None,
        trace: Trace | None = None,
    ) -> Ticket:
        """Send one image on its way and return at once.

        Args:
            decode: decodes and resizes, or looks at an image that is large; called on a decoder thread. What it raises
                is raised by `Ticket.result`.
            target: what is wanted.
            spec: how; everything that it needs is loaded.
            timeout_s: how long the caller will wait; the model is not run for it after that. With a source, how long
                the image may wait to be begun. None: for ever.
            source: the stream that the image belongs to. Streams and connections of callers without one take turns,
                and images of streams take no place in the queue from callers: the owner of the stream bounds them.
            peer: the connection that an image without a source came by; empty: it takes turns by itself. Where all
                places are taken, those of the host that holds most are given to others.
            finish_target: makes the target that the engine gets from the decoded image, on the decoder thread; None if
                `target` is that. What it raises is raised by `Ticket.result`.
            trace: that of the call or frame, for the observer.

        Raises:
            QueueFull: too many are waiting; never for an image of a stream.
            ServerDraining: the queue is closing.
        """
        future: asyncio.Future[QueueResult] = self._loop.create_future()
        if source is None:
            self._make_place(peer)
        entry = self.batcher.admit(
            target,
            spec,
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
            resolve=functools.partial(resolve, future),
            source=source,
        )
        self._observer.admitted(model=self._name, in_stream=source is not None)
        entry.decode, entry.finish_target, entry.trace, entry.peer = decode, finish_target, trace, peer
        try:
            self._decode_queue.add(entry)
        except BaseException:
            self.batcher.withdraw(entry)
            raise
        ticket = Ticket(entry, future, withdraw=self._withdraw)
        self._tickets[next(self._numbers)] = ticket
        return ticket

    def refusal(self, peer: str) -> QueueFull | None:
        """What `submit` would raise for want of a place for an image of a connection; None if there is one."""
        full = self.batcher.refusal()
        return None if full is None or self._gives_way(peer) is not None else full

    def give_up(self, error: Exception, *, running: bool = False) -> None:
        """Refuse new work, and answer with an error all that was admitted.

        Args:
            error: what all are answered.
            running: also answer images of batches that are claimed; these run on, and their results are dropped.
        """
        self.batcher.close(error)
        self._loader.give_up(error)
        if running:
            self.answer_all(error)
        for ticket in list(self._tickets.values()):
            ticket.give_up(error)

    def answer_all(self, error: Exception) -> None:
        """Answer with an error all that was admitted, also what runs, and go on admitting."""
        for ticket in list(self._tickets.values()):
            ticket.abandon(error)

    def answer(self, entries: Collection[Entry], error: Exception) -> None:
        """Answer some of what was admitted with an error, also what runs."""
        for ticket in list(self._tickets.values()):
            if ticket.entry in entries:
                ticket.abandon(error)

    async def close(self, refusal: Exception | None = None, *, timeout_s: float | None = None) -> bool:
        """Refuse new work, finish what was admitted, stop the threads and close the engines. Idempotent.

        Args:
            refusal: what refused work is told; None for ServerDraining.
            timeout_s: how long that may take, in seconds; None for ever.

        Returns:
            False if the time ran out, or a part of the model is still being loaded; the threads are daemons and end
            with the process.
        """
        self.batcher.close(refusal)
        finished = await asyncio.to_thread(self._threads.join, timeout_s)
        if finished:
            for engine in self.engines:
                engine.close()
        return finished and not self._loader.loading

    def _make_place(self, peer: str) -> None:
        """Where all places are taken, take one from who holds most, if that is not the newcomer."""
        full = self.batcher.refusal()
        other = None if full is None else self._gives_way(peer)
        if full is not None and other is not None:
            other.give_up(full)

    def _gives_way(self, peer: str) -> Ticket | None:
        tickets = [ticket for ticket in list(self._tickets.values()) if ticket.waiting]
        return gives_way(((one.peer, one) for one in tickets if one.peer is not None), peer, self._host_of)

    def _on_device(self, index: int, fault: str) -> None:
        self._observer.device_changed(model=self._name, device=device_names(self.engines)[index], fault=fault)

    def _withdraw(self, entry: Entry) -> bool:
        withdrawn = self.batcher.withdraw(entry)
        if withdrawn:
            self._decode_queue.discard(entry)
            if self._large_images is not None:
                self._large_images.discard(entry)
        return withdrawn

    def _decode(self, entry: Entry) -> None:
        """Decode on a decoder thread, then queue; or put a large image where it waits for its turn."""
        decode = entry.decode
        if decode is not None:  # or it was withdrawn
            self._decode_by(decode, entry)

    def _decode_by(self, decode: Callable[[], FittedImage | LargeImage], entry: Entry) -> None:
        finish_target = entry.finish_target
        if entry.state is not EntryState.DECODING:
            return  # withdrawn since it was found to be large
        started_at = time.monotonic()
        try:
            image = _decode_in_time(decode, entry.deadline, started_at)
            if isinstance(image, LargeImage):
                if self._large_images is not None:
                    entry.decode = None
                    self._large_images.add(entry, image, functools.partial(self._decode_by, image.decode))
                    return
                image = image.decode()
            if finish_target is not None:
                entry.target = finish_target(image)
        except Exception as error:
            if self.batcher.withdraw(entry):
                self._deliver([(entry, _told(error))])
            return
        entry.preprocess_s = time.monotonic() - started_at
        entry.decode = entry.finish_target = None
        self._observer.decoded(model=self._name, duration_s=entry.preprocess_s, trace=entry.trace)
        self.batcher.put(entry, image)

    def _deliver(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        """Hand outcomes to their callers, with one wake-up of the loop. Any thread may call this."""
        self._loop.call_soon_threadsafe(_resolve_all, outcomes)


def _told(error: Exception) -> Exception:
    """What a caller is told of an error: that there is no memory is no fault of the image."""
    if isinstance(error, MemoryError):
        return ImageMemoryFull("there is too little memory to decode the image", retry_after_s=_RETRY_AFTER_S)
    return error


def _decode_in_time(
    decode: Callable[[], FittedImage | LargeImage], deadline: float | None, now: float
) -> FittedImage | LargeImage:
    if deadline is not None and deadline <= now:
        raise DeadlineExpired("the deadline passed before the image was decoded")
    return decode()


def _resolve_all(outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
    for entry, outcome in outcomes:
        entry.resolve(outcome)
