"""The window of a stream: its frames in order, which of them wait for an answer, and what may be sent.

A frame is accepted, then sent, then answered, then taken by the caller. The client itself answers frames that cannot be
sent and frames that are dropped for newer ones. Those answers wait for the answers of earlier frames, so that all come
in frame order. The window does no I/O, reads no clock and is not thread-safe: the link locks it.

Two bounds:
- overflow "block": at most `size` frames are sent and unanswered.
- overflow "drop-oldest": at most 2 * `size` are sent and unanswered, or explained and not taken by the caller. The
  server drops frames of its own window; the second half of ours keeps it supplied while answers travel. Beyond that,
  only the newest frame is held back for later, so a slow reader gets fresh answers instead of a longer queue.
A stream that is to be resumed keeps what it sent until the answer comes, to send it again on another call.
In both, all that is accepted and not taken is bounded by `backlog`. With "block", so are the bytes of the maps not
taken, if there are more than `size` of them: maps may be as large as photos.
"""

from collections import deque
from copy import copy
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from heatlens._exceptions import (
    FailedPreconditionError,
    HeatlensError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from heatlens._results.results import FRAME_DROPPED, FrameResult, Result
from heatlens._wire.arguments import checked_int

Message = TypeVar("Message")

MAX_FRAME_ID = 2**63 - 1
# At 30 frames per second, a reader may stall for eight seconds before the camera is no longer read.
_SPARE_BACKLOG_FRAMES = 256
_SPARE_MAP_BYTES = 64 * 1024 * 1024


@dataclass(slots=True, eq=False)
class _Frame:
    """A frame without an answer, or with one that waits for its turn."""

    frame_id: int
    frame: Any
    accepted_s: float
    sent: bool = False
    skipped: bool = False
    message: Any = None
    answer: FrameResult | None = None
    forgotten: bool = False


class Window(Generic[Message]):
    """The state of one stream.

    Args:
        drop_oldest: the overflow policy; False: "block".
        every: the server explains the first of so many frames that reach it.
        keeps_sent: whether what is sent is kept until it is answered, for `resume`.

    Attributes:
        size: the window in force, in frames; None before the server started the stream.
        outgoing: messages to send, oldest first. The sender removes each.
        last_frame_id: the last frame answered; None before the first.
        ahead: frames accepted and not taken by the caller.
        ended: nothing is sent or answered any more.
        error: why it ended; None: every frame was answered.
    """

    def __init__(self, *, drop_oldest: bool, every: int, keeps_sent: bool = False) -> None:
        self.size: int | None = None
        self.outgoing: deque[Message] = deque()
        self.last_frame_id: int | None = None
        self.ahead = 0
        self.ended = False
        self.error: HeatlensError | None = None
        self._drop_oldest = drop_oldest
        self._every = every
        self._keeps_sent = keeps_sent
        self._last_accepted_id = -1
        self._sent_count = 0
        self._begins = True
        self._unanswered = 0
        self._finishing = False
        # In frame order. The first one is never answered: it would have moved to _ready.
        self._pending: deque[_Frame] = deque()
        self._held: tuple[_Frame, Message] | None = None
        self._ready: deque[FrameResult] = deque()
        self._ready_results = self._ready_map_bytes = 0

    @property
    def backlog(self) -> int:
        """The largest `ahead`; 0 before the start."""
        return 0 if self.size is None else 2 * self.size + _SPARE_BACKLOG_FRAMES

    @property
    def can_put(self) -> bool:
        """Whether a frame may be put."""
        if self.size is None or self.ended or self.ahead >= self.backlog:
            return False
        return self._drop_oldest or (self._unanswered < self.size and not self._untaken_maps_too_large)

    @property
    def may_pull(self) -> bool:
        """Whether `map` may pull a frame: never more than the window ahead of the caller, unless frames may be lost."""
        if self.size is None or self.ended:
            return False
        return self.ahead < (self.backlog if self._drop_oldest else self.size)

    @property
    def next_is_skipped(self) -> bool:
        """Whether the server leaves the next frame sent out, because of `every`: its image need not travel.

        A frame held back is the next to be sent, and one that replaces it takes its turn.
        """
        return self._sent_count % self._every != 0

    @property
    def idle(self) -> bool:
        """Whether everything accepted is answered."""
        return not self._pending

    @property
    def finishing(self) -> bool:
        """Whether `finish` was called."""
        return self._finishing

    @property
    def half_closed(self) -> bool:
        """Whether the last message was removed from `outgoing`."""
        return self._finishing and not self.outgoing and self._held is None

    @property
    def answered(self) -> bool:
        """Whether an answer can be taken."""
        return bool(self._ready)

    def start(self, size: int) -> None:
        """Begin, with the window that the server granted.

        Raises:
            InternalError: begun already, or no window (reason INVALID_RESPONSE).
        """
        if self.size is not None or size < 1:
            raise InternalError(f"the server started the stream with a window of {size}", reason="INVALID_RESPONSE")
        self.size = size
        self._release()

    def resume(self, first: Message, *, now_s: float) -> None:
        """Begin again on another call: send `first`, then what was sent and has no answer. Needs `keeps_sent`.

        A server explains the first frame that reaches it: those before, which `every` leaves out, are answered here.
        """
        self.size = None
        self._pending = deque(entry for entry in self._pending if not entry.forgotten)
        unanswered = deque(entry for entry in self._pending if entry.sent and entry.answer is None)
        while unanswered and unanswered[0].skipped:
            self._answer_frame(unanswered.popleft(), now_s, skipped=True)
        self._begins = not unanswered
        self._unanswered = len(unanswered)
        self.outgoing.clear()
        self.outgoing.extend((first, *(entry.message for entry in unanswered)))

    def checked_id(self, frame_id: int | None) -> int:
        """Return the id for the next frame. None: one more than the last.

        Raises:
            InvalidArgumentError: not an integer above the last one.
        """
        last = self._last_accepted_id
        if frame_id is None:
            frame_id = last + 1
        if last == MAX_FRAME_ID:
            raise InvalidArgumentError.of("frame_id", f"no id is larger than {last}, the last one")
        return checked_int("frame_id", frame_id, at_least=last + 1, at_most=MAX_FRAME_ID)

    def put(self, frame_id: int, frame: object, message: Message, *, accepted_s: float, now_s: float) -> None:
        """Accept a frame that can be sent. There must be `can_put`, and the id must be checked.

        Args:
            frame_id: its id.
            frame: what the caller passed.
            message: what is sent.
            accepted_s: when the caller passed it, on a monotonic clock, in seconds.
            now_s: the time now, on the same clock.
        """
        entry = self._accept(frame_id, frame, accepted_s)
        if self._held is not None:
            older, _ = self._held
            error = ResourceExhaustedError("dropped unsent: newer frames arrived meanwhile", reason=FRAME_DROPPED)
            self._answer_frame(older, now_s, error=error)
        self._held = (entry, message)
        self._release()

    def refuse(self, frame_id: int, frame: object, error: HeatlensError, *, accepted_s: float, now_s: float) -> None:
        """Accept a frame that cannot be sent, and answer it with the error when its turn comes."""
        self._answer_frame(self._accept(frame_id, frame, accepted_s), now_s, error=error)

    def answer(
        self,
        frame_id: int,
        *,
        now_s: float,
        result: Result | None = None,
        error: HeatlensError | None = None,
        skipped: bool = False,
    ) -> None:
        """Take the server's answer for a frame.

        Raises:
            InternalError: not the answer that is due (reason INVALID_RESPONSE).
        """
        head = self._pending[0] if self._pending else None
        if head is None or not head.sent or head.frame_id != frame_id:
            due = head.frame_id if head is not None and head.sent else "none"
            raise InternalError(
                f"the server answered frame {frame_id}, the answer due was: {due}", reason="INVALID_RESPONSE"
            )
        self._unanswered -= 1
        self._answer_frame(head, now_s, result=result, error=error, skipped=skipped)
        self._release()

    def take(self) -> FrameResult:
        """Return the next answer. There must be one: see `answered`."""
        item = self._ready.popleft()
        self.ahead -= 1
        self._count(item, -1)
        self._release()
        return item

    def forget(self) -> None:
        """Drop all answers not taken, present and future. Frames already sent fill the window until answered."""
        self._ready.clear()
        self._ready_results = self._ready_map_bytes = self.ahead = 0
        self._held = None
        self._pending = deque(entry for entry in self._pending if entry.sent and entry.answer is None)
        for entry in self._pending:
            entry.forgotten, entry.frame = True, None

    def finish(self) -> None:
        """Accept no more frames. Idempotent."""
        self._finishing = True

    def end(self, error: HeatlensError | None) -> None:
        """Stop sending and answering. Answers that came before can still be taken. The first end counts.

        Args:
            error: why. None: the server says that all is answered; an error if that is not so.
        """
        if self.ended:
            return
        if error is None and (self._pending or not self.half_closed):
            error = InternalError("the server ended the stream early", reason="INVALID_RESPONSE")
        if error is not None:
            error.last_frame_id = self.last_frame_id
        self.error, self.ended = error, True
        self._pending.clear()
        self.outgoing.clear()
        self._held = None
        self.ahead = len(self._ready)

    def raise_if_broken(self) -> None:
        """Raise the error that ended the stream, if one did."""
        if self.error is not None:
            # A copy: several threads may raise it many times, and each raise adds to the traceback.
            raise copy(self.error)

    def check_accepts(self) -> None:
        """Check that more frames may be sent.

        Raises:
            FailedPreconditionError: the stream is finished (reason STREAM_FINISHED).
            HeatlensError: it broke.
        """
        self.raise_if_broken()
        if self._finishing or self.ended:
            raise state_error("STREAM_FINISHED", "the stream is finished: no more frames can be sent")

    def _accept(self, frame_id: int, frame: object, accepted_s: float) -> _Frame:
        entry = _Frame(frame_id, frame, accepted_s)
        self._last_accepted_id = frame_id
        self._pending.append(entry)
        self.ahead += 1
        return entry

    def _answer_frame(
        self,
        entry: _Frame,
        now_s: float,
        *,
        result: Result | None = None,
        error: HeatlensError | None = None,
        skipped: bool = False,
    ) -> None:
        """Answer a frame; release all answers that wait for no earlier frame."""
        latency_ms = (now_s - entry.accepted_s) * 1e3
        entry.answer = FrameResult(entry.frame_id, entry.frame, result, error, skipped, latency_ms)
        while self._pending and (answer := self._pending[0].answer) is not None:
            first = self._pending.popleft()
            self.last_frame_id = first.frame_id
            if not first.forgotten:
                self._ready.append(answer)
                self._count(answer, 1)

    @property
    def _untaken_maps_too_large(self) -> bool:
        """Whether the maps of results not taken fill the memory that they may."""
        return self.size is not None and self._ready_results >= self.size and self._ready_map_bytes >= _SPARE_MAP_BYTES

    def _count(self, item: FrameResult, sign: int) -> None:
        if item.result is not None:
            self._ready_results += sign
            self._ready_map_bytes += sign * sum(one.heatmap.values.nbytes for one in item.result.explanations)

    def _release(self) -> None:
        """Send the frame held back, if there is room on the wire for it."""
        if self._held is None or self.size is None:
            return
        if self._drop_oldest and self._unanswered + self._ready_results >= 2 * self.size:
            return
        entry, message = self._held
        self._held = None
        skipped = self.next_is_skipped
        self._sent_count += 1
        if skipped and self._begins:
            # As in `resume`. It came just now.
            self._answer_frame(entry, entry.accepted_s, skipped=True)
            return
        self._begins = False
        entry.sent, entry.skipped = True, skipped
        entry.message = message if self._keeps_sent else None
        self._unanswered += 1
        self.outgoing.append(message)


def state_error(reason: str, message: str) -> FailedPreconditionError:
    """Return the error of a call that the stream cannot take in its present state."""
    return FailedPreconditionError(message, reason=reason)
