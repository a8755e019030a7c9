"""One admitted request on its way through the queue."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target
from heatlens_server.scheduling.progress import Progress


class EntryState(Enum):
    """Where an entry is. Only the batcher changes it, under its lock."""

    PREPARING = auto()
    """Admitted; its image is being decoded."""
    WAITING = auto()
    """In the queue: for its batch, or between two of its steps."""
    STEPPING = auto()
    """One of its steps is being run. It can still be taken back."""
    CLAIMED = auto()
    """In a batch: being run, or done. Or done in steps."""
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
    """

    preprocess_s: float
    queue_s: float
    compute_s: float
    batch_size: int


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
    """Somebody who sends many images, such as a stream: sources that wait for the same device take turns.

    Make one per stream, and pass it with each of its images. It is no more than its identity.
    """

    __slots__ = ()


@dataclass(slots=True, eq=False)
class Entry:
    """One admitted request.

    Attributes:
        target: what is wanted, as far as it is known.
        complete: makes the target that the engine gets, of the prepared image; None if `target` is that.
        spec: how: entries of equal spec, and images of equal size, may share a batch.
        deadline: on the batcher's clock, in seconds; None for no deadline. See `expires_at`.
        resolve: takes the outcome on behalf of the caller; called once at most, by whoever `Complete` leaves it to.
        source: who sent it; None for a caller with this image only.
        prepare: makes `image`; None once that is done or not wanted any more.
        image: the image as the model sees it; None while it is being decoded, and when the entry is gone.
        preprocess_s: seconds of decoding and resizing.
        enqueued_at: when it entered the queue, on the batcher's clock, in seconds.
        state: where it is.
        begun: whether it was claimed, if only for its first step.
        stepped_s: seconds that its steps took so far.
        steps: what is kept between two of its steps; None before the first, after the last, and where there are none.
    """

    target: Target
    spec: MapSpec
    deadline: float | None
    resolve: Callable[[Outcome], None]
    source: Source | None = None
    complete: Callable[[FittedImage], Target] | None = None
    prepare: Callable[[], FittedImage] | None = None
    image: FittedImage | None = None
    preprocess_s: float = 0.0
    enqueued_at: float = 0.0
    state: EntryState = EntryState.PREPARING
    begun: bool = False
    stepped_s: float = 0.0
    steps: Progress | None = None

    @property
    def owner(self) -> object:
        """Who takes turns with others: the source, or a caller with this image only."""
        return self.source or self

    @property
    def expires_at(self) -> float | None:
        """When it is given up if it waits then; None for never.

        A caller is gone after the deadline. A stream is not: its deadline is how long an image may wait to be begun.
        """
        return None if self.begun and self.source is not None else self.deadline


Complete = Callable[[Sequence[tuple[Entry, Outcome]]], None]
"""Takes outcomes, many at once so that an event loop is woken once per batch. Called by any thread, under no lock."""
