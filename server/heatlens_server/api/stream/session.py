"""One stream: a task that reads frames and sends them to the model, and the call itself, which answers them in order.

The reader is never cancelled (see `OpenStreams.start_reader`): it looks, before each read, whether the stream is over.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

from heatlens_server.api.answer import Answer
from heatlens_server.api.calls import current_call, is_fault
from heatlens_server.api.checks import SourceImage, Violations, check_image
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.models import known_name
from heatlens_server.api.query import Frame, StreamMessage
from heatlens_server.api.stream.config import StreamPlan, config_of, plan_stream
from heatlens_server.api.stream.frames import FrameOrder, FrameSampler, FrameTime, MapSmoother
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.api.stream.window import FrameWindow, PendingFrame
from heatlens_server.core.errors import FrameDropped, ServerDraining
from heatlens_server.core.events import Trace
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.fleet.versions import point_of
from heatlens_server.scheduling.entry import QueueResult, Source
from heatlens_server.scheduling.ticket import Ticket

_log = logging.getLogger("heatlens.rpc")

T = TypeVar("T")


class StreamPeer(Protocol[T]):
    """The client's end of a stream, as its transport gives it."""

    async def read(self) -> StreamMessage | None:
        """The next message; None at the end. What it raises ends the stream once the frames before are answered."""
        ...

    def encode(self, answer: Answer) -> T:
        """What `send` takes of an answer. Called where the answer is made, which may be another thread."""
        ...

    async def start(self, *, model: str, model_version: str, max_in_flight: int) -> None:
        """Tell that the configuration is accepted, by which model and with which window."""
        ...

    async def send(self, frame_id: int, outcome: T | Exception | None) -> None:
        """Answer a frame; None: it was skipped. Waits while the client does not read."""
        ...


@dataclass(slots=True)
class _Counts:
    """Answers that were sent: each is one of the last four."""

    answered: int = 0
    explained: int = 0
    dropped: int = 0
    skipped: int = 0
    failed: int = 0


class _Opened:
    """What a valid configuration makes of a stream."""

    def __init__(self, plan: StreamPlan, model: ServedModel, open_streams: OpenStreams) -> None:
        self.plan = plan
        self.model = model
        self.order = FrameOrder()
        self.sampler = FrameSampler(every=plan.explain_every, max_per_second=plan.max_frames_per_second)
        self.window = FrameWindow(
            size=plan.window,
            drop_oldest=plan.drop_oldest,
            max_waiting=model.max_batch_size,
            max_unsent=open_streams.max_unsent,
            counters=open_streams.counters,
        )
        self.source = Source()
        self._smoother = MapSmoother(plan.temporal_smoothing)

    @property
    def revise(self) -> Callable[[QueueResult], QueueResult] | None:
        """What is done to each frame's maps, in the order of frames; None if nothing is."""
        return self._smooth if self.plan.temporal_smoothing else None

    def _smooth(self, explained: QueueResult) -> QueueResult:
        image = explained.image
        size_px = (image.source_height_px, image.source_width_px) if self.plan.explain.place_on_source else None
        result = self._smoother.smooth(explained.result, size_px=size_px)
        return dataclasses.replace(explained, result=result)


class StreamSession(Generic[T]):
    """One stream. `run` is the call.

    Attributes:
        model: what explains its frames; None until that is known.
    """

    def __init__(self, explainer: Explainer, open_streams: OpenStreams, peer: StreamPeer[T]) -> None:
        """Make a stream that reads nothing yet.

        Args:
            explainer: explains the frames.
            open_streams: runs the reader, and counts.
            peer: the client's end.
        """
        self._explainer = explainer
        self._open_streams = open_streams
        self._peer = peer
        self.model: ServedModel | None = None
        # A model that is replaced finishes the streams that go on.
        self._uses = contextlib.ExitStack()
        self._call = current_call()
        self._requests = explainer.admission.requests
        self._opened: _Opened | None = None
        self._counts = _Counts()
        # The first of these ends the reading; then the window is answered.
        self._over = False
        self._end_error: Exception | None = None
        self._closed = False
        self._news = asyncio.Event()
        """For the answering side: a frame was added, or there will be no more."""
        self._room = asyncio.Event()
        """For the reading side: a frame was answered, or no more are wanted."""

    async def run(self) -> None:
        """Answer every frame in order, until the client half-closes.

        Raises:
            InvalidArgument: the configuration is wrong, or the client violated the protocol.
            ModelNotFound, ModelLoading, ModelFailed, CompanionFailed: so it is.
            ServerDraining: the server shuts down.
        """
        self._open_streams.start_reader(self._read())
        try:
            opened = await self._wait_opened()
            model = opened.model
            await self._peer.start(model=model.name, model_version=model.version, max_in_flight=opened.plan.window)
            while await self._has_frame(opened.window):
                await self._answer(opened.window.head, opened)
            if self._end_error is not None:
                raise self._end_error
        finally:
            self._close()

    def end(self, error: Exception) -> None:
        """Read no more, answer the frames that run, and end with `error`."""
        self._end(error)
        cut = self._opened is not None and self._opened.window.cut(error)
        if cut and self._end_error is None:
            # The client had half-closed, and did not get all that it asked for.
            self._end_error = error

    @property
    def ends_when_replaced(self) -> bool:
        """Whether the stream ends when its model is replaced."""
        return self._opened is not None and self._opened.plan.ends_when_replaced

    # The answering side.

    async def _wait_opened(self) -> _Opened:
        while self._opened is None:
            if self._end_error is not None:
                raise self._end_error
            await self._wait(self._news)
        return self._opened

    async def _has_frame(self, window: FrameWindow) -> bool:
        """Wait for the next frame; False once there will be none."""
        while not len(window):
            if self._over:
                return False
            await self._wait(self._news)
        return True

    async def _answer(self, frame: PendingFrame, opened: _Opened) -> None:
        """Answer the head, unless it is cut off meanwhile and gets no answer."""
        outcome = frame.error if frame.ticket is None else await self._result(frame, opened)
        if isinstance(outcome, Exception) and not opened.window.holds(frame):
            return
        kind = self._count(frame.frame_id, outcome)
        await self._peer.send(frame.frame_id, outcome)
        self._counts.answered += 1
        self._explainer.observer.frame_answered(
            model=opened.model.name, outcome=kind, age_s=time.monotonic() - frame.read_at, trace=frame.trace
        )
        opened.window.pop()
        self._room.set()

    async def _result(self, frame: PendingFrame, opened: _Opened) -> T | Exception:
        """What the peer sends of a frame's answer, or the error that there is instead."""
        if frame.ticket is None:
            raise AssertionError("there is no answer to wait for")
        try:
            return await self._explainer.answer(
                await frame.ticket.result(),
                opened.plan.explain,
                opened.model,
                self._peer.encode,
                trace=frame.trace,
                revise=opened.revise,
            )
        except Exception as error:
            # The error's traceback holds this function's variables, and a dropped frame holds its error: thousands of
            # them would stay until the garbage collector comes.
            del frame
            return error

    def _count(self, frame_id: int, outcome: T | Exception | None) -> str:
        """Count what a frame's answer is, log a fault of ours, and return the name of the count."""
        if outcome is None:
            self._counts.skipped += 1
            return "skipped"
        if isinstance(outcome, FrameDropped):
            self._counts.dropped += 1
            return "dropped"
        if not isinstance(outcome, Exception):
            self._counts.explained += 1
            return "explained"
        self._counts.failed += 1
        if is_fault(outcome):
            extra = {"request_id": self._call.request_id, "frame_id": frame_id}
            _log.error("frame", exc_info=outcome, extra=extra)
        return "failed"

    def _close(self) -> None:
        """Whatever ended the call: hold nothing any more, and say what was done in the call's log line."""
        self._closed = True
        self._end(None)
        self._uses.close()
        if self._opened is not None:
            self._opened.window.close(asyncio.InvalidStateError("the stream is over"))
            self._call.fields["explanation"] = str(self._opened.plan.explain.method)
        self._call.fields.update({f"frames_{name}": n for name, n in dataclasses.asdict(self._counts).items()})

    # The reading side.

    async def _read(self) -> None:
        error: Exception | None = None
        try:
            opened = await self._open(await self._peer.read())
            await self._read_frames(opened)
        except Exception as raised:
            error = raised
        self._end(error)
        if self._closed:
            # The call was over before the model was known.
            self._uses.close()

    async def _open(self, message: StreamMessage | None) -> _Opened:
        config = config_of(message)
        self._call.fields["model"] = known_name(self._explainer.fleet, config.model)
        asked = (config.model, config.model_version, partial(point_of, self._call.request_id.encode()))
        await self._explainer.fleet.idle.awake(*asked)
        self.model = model = self._uses.enter_context(self._explainer.fleet.use(*asked))
        self._call.fields["model_version"] = model.version
        plan = plan_stream(config, model, self._explainer.limits)
        opened = _Opened(plan, model, self._open_streams)
        if size_bytes := config.options.size_bytes:
            held = self._explainer.admission.configurations.hold(self._call.peer)
            await held.room(size_bytes)
            self._uses.enter_context(held)
        await model.queue.load_for(plan.explain.spec)
        self._opened = opened
        self._news.set()
        return opened

    async def _read_frames(self, opened: _Opened) -> None:
        while True:
            while not (self._over or (opened.window.has_room() and not self._requests.is_full(self._call.peer))):
                with self._requests.watched(self._room.set):
                    await self._wait(self._room)
            if self._over:
                return
            message = await self._peer.read()
            if message is None or self._over:
                return
            frame = await self._admit(message, opened)
            if self._over:
                # It waited for a place, and there will be none.
                frame.release()
                return
            opened.window.add(frame)
            self._news.set()

    async def _admit(self, message: StreamMessage, opened: _Opened) -> PendingFrame:
        """Send a frame to the model, if it is to be explained and can be.

        Raises:
            InvalidArgument: it is not a frame that may come now.
        """
        read_s = time.monotonic()
        frame = opened.order.check(message)
        if not opened.sampler.allows(FrameTime(read_s, frame.captured_s)):
            return PendingFrame(frame.frame_id, read_at=read_s)
        trace = Trace()
        self._explainer.observer.frame_began(
            model=opened.model.name, frame_id=frame.frame_id, call=self._call.trace, trace=trace
        )
        held = self._requests.hold(self._call.peer)
        held.keep(0 if frame.image is None else frame.image.size_bytes)
        try:
            ticket = await self._submit(self._image(frame, opened), opened, read_s, trace)
        except Exception as error:
            held.release()
            return PendingFrame(frame.frame_id, error=error, read_at=read_s, trace=trace)
        return PendingFrame(frame.frame_id, ticket, held=held, read_at=read_s, trace=trace)

    async def _submit(self, image: SourceImage, opened: _Opened, read_s: float, trace: Trace) -> Ticket:
        while not opened.window.make_room():
            await self._wait(self._room)
            if self._over:
                raise self._end_error or ServerDraining()
        timeout_s = opened.plan.frame_timeout_s
        if timeout_s is not None:
            timeout_s -= time.monotonic() - read_s
        return self._explainer.submit(
            image, opened.plan.explain, opened.model, timeout_s=timeout_s, source=opened.source, trace=trace
        )

    def _image(self, frame: Frame, opened: _Opened) -> SourceImage:
        wrong = Violations()
        image = check_image(frame.image, opened.model.preprocess, self._explainer.limits, wrong)
        wrong.raise_if_any()
        return image

    # Both.

    def _end(self, error: Exception | None) -> None:
        """There will be no more frames. Only the first call counts."""
        if not self._over:
            self._over, self._end_error = True, error
        self._news.set()
        self._room.set()

    async def _wait(self, event: asyncio.Event) -> None:
        await event.wait()
        event.clear()
