"""One admitted request on its way through the queue, and what its caller gets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from heatlens_server.core.engine import MapSpec, Steps
from heatlens_server.core.errors import DeadlineExpired
from heatlens_server.core.events import Trace
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target


class EntryState(Enum):
    """Where an entry is. Only the batcher changes it, under its lock."""

    DECODING = auto()
    """Admitted; its image is being decoded, or waits for that."""
    WAITING = auto()
    """In the queue: for its batch, or between two of its steps."""
    STEPPING = auto()
    """Claimed for one of its steps. It can still be taken back."""
    CLAIMED = auto()
    """In a batch that runs or has run, or done in steps."""
    GONE = auto()
    """Cancelled, failed or expired before it was claimed, or before its last step was done."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one image took.

    Attributes:
        preprocess_s: seconds of decoding and resizing.
        queue_s: seconds from decoded to running; in steps, until the first step runs.
        compute_s: seconds that the batch ran; in steps, the sum over the steps.
        batch_size: images in the batch.
        began_at: when the batch or the first step began, on the batcher's clock, in seconds.
        ended_at: when the batch or the last step ended, on the same.
    """

    preprocess_s: float
    queue_s: float
    compute_s: float
    batch_size: int
    began_at: float = 0.0
    ended_at: float = 0.0

    def told(self) -> dict[str, object]:
        """What a call's log line says of it."""
        return {
            "decode_ms": round(self.preprocess_s * 1e3, 3),
            "queue_ms": round(self.queue_s * 1e3, 3),
            "compute_ms": round(self.compute_s * 1e3, 3),
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True, slots=True)
class QueueResult:
    """What a caller gets for one image.

    Attributes:
        result: what the engine said.
        image: the image as the model saw it, and where that lies in the source.
        timing: how long it took.
    """

    result: ImageResult
    image: FittedImage
    timing: Timing


Outcome = QueueResult | Exception


class Source:
    """A sender of many images, such as a stream: sources that wait for the same model take turns.

    Make one per stream, and pass it with each of its images. It has an identity and nothing else.
    """

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class LargeImage:
    """An image that was looked at and is yet to be decoded.

    Attributes:
        decoded_bytes: the memory that decoding it takes; 0 if that is as little as that of others.
        decode_s: how long decoding it takes, about, in seconds.
        decode: decodes and resizes it.
    """

    decoded_bytes: int
    decode_s: float
    decode: Callable[[], FittedImage]


@dataclass(slots=True, eq=False)
class Progress:
    """What is kept of an entry between two of its steps. Belongs to the device's thread, `discard` aside.

    Attributes:
        rows: the most rows that a step runs the model on.
        queue_s: seconds from decoded to the first step.
        discard: has this closed on the device's thread when no caller wants it any more. Any thread may call it; it
            returns at once.
        steps: the engine's generator; None before the first step, and before an explanation is begun anew.
        compute_s: seconds that the steps took so far.
        runs: how often the model ran, since the explanation was begun.
        later_s: seconds that all these runs but the first took.
    """

    rows: int
    queue_s: float
    discard: Callable[["Progress"], None]
    steps: Steps | None = None
    compute_s: float = 0.0
    runs: int = 0
    later_s: float = 0.0


@dataclass(slots=True, eq=False)
class Entry:
    """One admitted request.

    Attributes:
        target: what is wanted, as far as it is known.
        spec: how: entries of equal spec, and images of equal size, may share a batch.
        deadline: on the batcher's clock, in seconds; None for no deadline. See `expires_at`.
        resolve: gives the outcome to the caller; called at most once, on the caller's event loop.
        source: the sender; None for a caller with this image only.
        peer: the connection that the image of such a caller came by; empty if that is not known.
        decode: makes `image`, or says that it is large; None once that is done or not wanted any more.
        decode_s: how long that takes, about, in seconds; 0 before it is known to be long.
        finish_target: makes the target that the engine gets from the decoded image; None if `target` is that.
        image: the image as the model sees it; None while it is being decoded, and when the entry is gone.
        preprocess_s: seconds of decoding and resizing.
        enqueued_at: when it entered the queue, on the batcher's clock, in seconds.
        state: where it is.
        batch_most: the most entries of its batch; None for as many as batches may have.
        begun: whether it was claimed, if only for its first step.
        device: index of the device that runs its steps; None before the first step is claimed, and for batches.
        stepped_s: seconds that its steps took so far.
        steps: what is kept between two of its steps; None before the first, after the last, and for batches.
        trace: what observers keep of its call or frame.
    """

    target: Target
    spec: MapSpec
    deadline: float | None
    resolve: Callable[[Outcome], None]
    source: Source | None = None
    peer: str = ""
    decode: Callable[[], FittedImage | LargeImage] | None = None
    decode_s: float = 0.0
    finish_target: Callable[[FittedImage], Target] | None = None
    image: FittedImage | None = None
    preprocess_s: float = 0.0
    enqueued_at: float = 0.0
    state: EntryState = EntryState.DECODING
    batch_most: int | None = None
    begun: bool = False
    device: int | None = None
    stepped_s: float = 0.0
    steps: Progress | None = None
    trace: Trace | None = None

    @property
    def owner(self) -> object:
        """Who takes turns with others: the source, a connection with its single images, or else the entry itself."""
        return self.source or self.peer or self

    @property
    def expires_at(self) -> float | None:
        """When the entry is given up if it still waits; None for never.

        A caller is gone after its deadline. A stream stays: its deadline is how long an image may wait to be begun.
        """
        return None if self.begun and self.source is not None else self.deadline

    def expiry(self) -> DeadlineExpired:
        """What the caller is told if the entry has expired."""
        if self.begun:
            return DeadlineExpired("the deadline passed before the last step of the explanation was done")
        return DeadlineExpired("the deadline passed while the request was waiting for the model")

    def give_up(self) -> None:
        """Be GONE: the batcher's to say."""
        self.state = EntryState.GONE
        # No thread needs them any more; the entry itself may be held for long.
        self.decode = self.finish_target = self.image = None


Deliver = Callable[[Sequence[tuple[Entry, Outcome]]], None]
"""Takes outcomes, many at once so that an event loop is woken once per batch. Called by any thread, under no lock."""
