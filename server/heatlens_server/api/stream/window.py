"""The frames of one stream that were read and are not answered yet, and what gives when there are too many."""

from collections import deque
from dataclasses import dataclass

from heatlens_server.api.byte_budget import Held
from heatlens_server.api.stream.open_streams import StreamCounters
from heatlens_server.core.errors import FrameDropped
from heatlens_server.core.events import Trace
from heatlens_server.scheduling.ticket import Ticket


@dataclass(slots=True, eq=False)
class PendingFrame:
    """A frame between its reading and its answer. Without a ticket and an error it was left out on purpose.

    Attributes:
        frame_id: the client's.
        ticket: for its explanation; None if it is not to be explained.
        error: why it is not to be explained.
        held: what its image holds of the budget for requests.
        read_at: when it was read, on `time.monotonic`, in seconds.
        trace: what observers keep of it; None if it was left out.
    """

    frame_id: int
    ticket: Ticket | None = None
    error: Exception | None = None
    held: Held | None = None
    read_at: float = 0.0
    trace: Trace | None = None

    def release(self) -> None:
        """It holds no image any more. Idempotent."""
        if self.held is not None:
            self.held.release()

    @property
    def live(self) -> bool:
        """Whether it holds a place in the window: it was sent to the model and not dropped."""
        return self.ticket is not None

    @property
    def waiting(self) -> bool:
        """Whether it could still be taken back."""
        return self.ticket is not None and self.ticket.waiting

    def drop(self) -> bool:
        """Give it up for a newer one; False if it is too late."""
        error = FrameDropped("a newer frame of this stream took its place")
        if self.ticket is None or not self.ticket.give_up(error):
            return False
        # The answer may have to wait: what is left of the frame is small.
        self.ticket, self.error = None, error
        self.release()
        return True


class FrameWindow:
    """Frames in the order of their ids. Belongs to the event loop.

    Without dropping, all frames count, and no more are read while `size` are unanswered. With dropping, frames that
    were sent to the model count: when `size` of them are unanswered, or `max_waiting` of them wait, the oldest one
    that waits is given up for a new one. If all of them run, the new one is let in beyond the size, but only one.
    """

    def __init__(
        self,
        *,
        size: int,
        drop_oldest: bool,
        max_waiting: int,
        max_unsent: int,
        counters: StreamCounters,
    ) -> None:
        """An empty window.

        Args:
            size: >= 1.
            drop_oldest: whether a frame is given up when there are too many.
            max_waiting: with dropping: most frames that wait for the model, >= 1.
            max_unsent: with dropping: how many answers that need no model may wait to be sent, beyond the size.
            counters: where frames and tickets are counted.
        """
        self._size = size
        self._drop_oldest = drop_oldest
        self._max_waiting = max_waiting
        self._max_unsent = max_unsent
        self._counters = counters
        self._frames: deque[PendingFrame] = deque()
        # Those of them that are live: they are few, and the others may be thousands.
        self._live: deque[PendingFrame] = deque()

    def __len__(self) -> int:
        """Frames that are not answered."""
        return len(self._frames)

    @property
    def head(self) -> PendingFrame:
        """The frame to be answered next. There must be one."""
        return self._frames[0]

    def has_room(self) -> bool:
        """Whether another frame may be read. If not, only `pop` changes that."""
        if not self._drop_oldest:
            return len(self._frames) < self._size
        return len(self._frames) < self._size + self._max_unsent and (
            len(self._live) <= self._size or any(frame.waiting for frame in self._live)
        )

    def make_room(self) -> bool:
        """Give up a frame, if one must go, before another is sent to the model.

        Returns:
            False if there is no place and all frames run already. Then only `pop` changes that.
        """
        if not self._drop_oldest:
            return True
        live_count = len(self._live)
        waiting = [frame for frame in self._live if frame.waiting]
        if live_count < self._size and len(waiting) < self._max_waiting:
            return True
        for frame in waiting:
            if frame.drop():
                self._live.remove(frame)
                self._counters.tickets.released += 1
                return True
        return live_count <= self._size

    def add(self, frame: PendingFrame) -> None:
        """Put a frame at the end."""
        self._frames.append(frame)
        self._counters.frames.created += 1
        self._counters.tickets.created += frame.live
        if frame.live:
            self._live.append(frame)

    def pop(self) -> None:
        """The head is answered."""
        self._release(self._frames.popleft())

    def holds(self, frame: PendingFrame) -> bool:
        """Whether a frame is the head: it still is to be answered."""
        return bool(self._frames) and self._frames[0] is frame

    def cut(self, error: Exception) -> bool:
        """Take back the frames that wait for the model; those that run are not touched.

        Frames behind the last one that runs are forgotten, from the first one taken back on: a client goes on after its
        last answer. One that was taken back before a frame that runs will be answered with this error.

        Returns:
            Whether there were any.
        """
        taken_back = [frame.ticket is not None and frame.ticket.give_up(error) for frame in self._frames]
        running = [frame.live and not taken for frame, taken in zip(self._frames, taken_back, strict=True)]
        last = max((i for i, runs in enumerate(running) if runs), default=-1)
        kept = next((i for i, taken in enumerate(taken_back) if taken and i > last), len(self._frames))
        while len(self._frames) > kept:
            self._release(self._frames.pop())
        return any(taken_back)

    def close(self, error: Exception) -> None:
        """No frame will be answered any more: take back what can be taken back, and forget the rest."""
        self.cut(error)
        while self._frames:
            self.pop()

    def _release(self, frame: PendingFrame) -> None:
        frame.release()
        self._counters.frames.released += 1
        self._counters.tickets.released += frame.live
        if frame.live:
            self._live.remove(frame)
