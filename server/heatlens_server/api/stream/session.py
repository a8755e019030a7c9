"""One stream: a task that reads frames and sends them to the model, and the call itself, which answers them in order.

The reader is never cancelled (see `OpenStreams.start_reader`): it looks, before each read, whether the stream is over.
"""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.calls import current_call, is_fault
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.images import SourceImage, parse_image
from heatlens_server.api.limits import Limits
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.api.stream.protocol import FrameOrder, StreamPlan, config_of, field_of_stream, parse_config
from heatlens_server.api.stream.sampling import FrameSampler, FrameTime
from heatlens_server.api.stream.smoothing import MapSmoother
from heatlens_server.api.stream.window import FrameWindow, PendingFrame
from heatlens_server.api.violations import Violations
from heatlens_server.core.errors import FrameDropped, InvalidArgument, ServerDraining
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.entry import QueueResult, Source
from heatlens_server.scheduling.ticket import Ticket
from heatlens_server.transports.grpc.status import to_status

_log = logging.getLogger("heatlens.rpc")


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

    def __init__(self, plan: StreamPlan, model: ServedModel, limits: Limits, open_streams: OpenStreams) -> None:
        self.plan = plan
        self.model = model
        self.explainer = Explainer(model, plan.explain, limits)
        self.order = FrameOrder()
        self.sampler = FrameSampler(every=plan.explain_every, max_per_second=plan.max_frames_per_second)
        self.window = FrameWindow(
            size=plan.window,
            drop_oldest=plan.drop_oldest,
            max_waiting=model.max_batch_size,
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


class StreamSession:
    """One stream. `run` is the call."""

    def __init__(
        self,
        fleet: Fleet,
        limits: Limits,
        open_streams: OpenStreams,
        *,
        requests: AsyncIterator[pb.StreamExplainRequest],
        write: Callable[[pb.StreamExplainResponse], Awaitable[None]],
    ) -> None:
        """Make a stream that reads nothing yet.

        Args:
            fleet: the models.
            limits: what the configuration and the frames are checked against.
            open_streams: runs the reader, and counts.
            requests: the client's messages. What it raises ends the stream once the frames before are answered.
            write: sends an answer; waits while the client does not read.
        """
        self._fleet = fleet
        self.model: ServedModel | None = None
        self._limits = limits
        self._open_streams = open_streams
        self._requests = requests
        self._write = write
        self._call = current_call()
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
            plan, model = opened.plan, opened.model
            started = pb.StreamStarted(model=model.name, model_version=model.version, max_in_flight=plan.window)
            await self._write(pb.StreamExplainResponse(started=started))
            while await self._has_frame(opened.window):
                answer = await self._answer(opened.window.head, opened)
                if answer is None:
                    continue
                await self._write(answer)
                self._counts.answered += 1
                opened.window.pop()
                self._room.set()
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

    async def _answer(self, frame: PendingFrame, opened: _Opened) -> pb.StreamExplainResponse | None:
        """The answer for the head; None if it was cut off meanwhile and gets none."""
        if frame.error is not None:
            return self._failed(frame.frame_id, frame.error)
        if frame.ticket is None:
            self._counts.skipped += 1
            return pb.StreamExplainResponse(frame_id=frame.frame_id, skipped=pb.FrameSkipped())
        try:
            result = await opened.explainer.answer(await frame.ticket.result(), revise=opened.revise)
        except Exception as error:
            return self._failed(frame.frame_id, error) if opened.window.holds(frame) else None
        self._counts.explained += 1
        return pb.StreamExplainResponse(frame_id=frame.frame_id, result=result)

    def _failed(self, frame_id: int, error: Exception) -> pb.StreamExplainResponse:
        """The answer for a frame that has none."""
        request_id = self._call.request_id
        if isinstance(error, FrameDropped):
            self._counts.dropped += 1
        else:
            self._counts.failed += 1
        if is_fault(error):
            _log.error("frame", exc_info=error, extra={"request_id": request_id, "frame_id": frame_id})
        elif isinstance(error, InvalidArgument):
            error = error.within(field_of_stream)
        return pb.StreamExplainResponse(frame_id=frame_id, error=to_status(error, request_id))

    def _close(self) -> None:
        """Whatever ended the call: hold nothing any more, and say what was done in the call's log line."""
        self._closed = True
        self._end(None)
        if self._opened is not None:
            self._opened.window.close(asyncio.InvalidStateError("the stream is over"))
            self._call.fields["model"] = self._opened.model.name
        self._call.fields.update({f"frames_{name}": n for name, n in dataclasses.asdict(self._counts).items()})

    # The reading side.

    async def _read(self) -> None:
        error: Exception | None = None
        try:
            opened = await self._open(await anext(self._requests, None))
            await self._read_frames(opened)
        except Exception as raised:
            error = raised
        self._end(error)

    async def _open(self, request: pb.StreamExplainRequest | None) -> _Opened:
        config = config_of(request)
        self.model = model = self._fleet.get(config.model)
        opened = _Opened(parse_config(config, model, self._limits), model, self._limits, self._open_streams)
        await opened.explainer.ensure()
        self._opened = opened
        self._news.set()
        return opened

    async def _read_frames(self, opened: _Opened) -> None:
        while True:
            while not (self._over or opened.window.has_room()):
                await self._wait(self._room)
            if self._over:
                return
            request = await anext(self._requests, None)
            if request is None or self._over:
                return
            frame = await self._admit(request, opened)
            if self._over:
                # It waited for a place, and there will be none.
                return
            opened.window.add(frame)
            self._news.set()

    async def _admit(self, request: pb.StreamExplainRequest, opened: _Opened) -> PendingFrame:
        """Send a frame to the model, if it is to be explained and can be.

        Raises:
            InvalidArgument: it is not a frame that may come now.
        """
        read_s = time.monotonic()
        frame = opened.order.check(request)
        if not opened.sampler.allows(_time_of(frame, read_s)):
            return PendingFrame(frame.frame_id)
        try:
            return PendingFrame(frame.frame_id, await self._submit(self._image(frame), opened, read_s))
        except Exception as error:
            return PendingFrame(frame.frame_id, error=error)

    async def _submit(self, image: SourceImage, opened: _Opened, read_s: float) -> Ticket:
        while not opened.window.make_room():
            await self._wait(self._room)
            if self._over:
                raise self._end_error or ServerDraining()
        timeout_s = opened.plan.frame_timeout_s
        if timeout_s is not None:
            timeout_s -= time.monotonic() - read_s
        return opened.explainer.submit(image, timeout_s=timeout_s, source=opened.source)

    def _image(self, frame: pb.Frame) -> SourceImage:
        wrong = Violations()
        image = parse_image(frame.image, self._limits, wrong)
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


def _time_of(frame: pb.Frame, read_s: float) -> FrameTime:
    if not frame.HasField("capture_time"):
        return FrameTime(read_s)
    return FrameTime(read_s, frame.capture_time.seconds + frame.capture_time.nanos / 1e9)
