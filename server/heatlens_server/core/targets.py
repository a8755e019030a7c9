"""What a request wants explained about one image."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from heatlens_server.core.arrays import BoolArray, Float32Array, ImageArray


class Direction(StrEnum):
    """Regression: which change of a value is explained."""

    INCREASE = "increase"
    DECREASE = "decrease"


@dataclass(frozen=True, slots=True)
class TopK:
    """Explain the k most probable classes, most probable first. k >= 1."""

    k: int

    @property
    def count(self) -> int:
        """How many classes."""
        return self.k


@dataclass(frozen=True, slots=True)
class ClassIds:
    """Explain these classes, in this order. At least one, no duplicates, each in [0, class_count)."""

    ids: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many classes."""
        return len(self.ids)


ClassTarget = TopK | ClassIds


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """Segmentation: explain classes, by their scores over given pixels.

    Attributes:
        classes: which ones.
        mask: bool (H, W), at the model's input size, at least one True; or (K, H, W), one for each of `ClassIds`. None:
            those predicted as the class.
    """

    classes: ClassTarget
    mask: BoolArray | None = None

    @property
    def count(self) -> int:
        """How many classes."""
        return self.classes.count


@dataclass(frozen=True, slots=True)
class Detections:
    """Detection: explain the boxes of at least a score, best first.

    Attributes:
        min_score: in [0, 1].
        max_count: the most boxes, >= 1.
        class_ids: of these classes only; empty for any.
    """

    min_score: float
    max_count: int
    class_ids: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many boxes at most."""
        return self.max_count


@dataclass(frozen=True, slots=True)
class Boxes:
    """Detection: explain whatever is detected where these boxes are, as their classes.

    Attributes:
        boxes: left, top, right, bottom in pixels of the model's input.
        class_ids: of each.
    """

    boxes: tuple[tuple[float, float, float, float], ...]
    class_ids: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many boxes."""
        return len(self.boxes)


@dataclass(frozen=True, slots=True, eq=False)
class Similarity:
    """Embedding models: explain the cosine similarity to a reference.

    Attributes:
        reference: float32 (D,), not zero; or (H, W, C), an image as engines take it.
    """

    reference: Float32Array | ImageArray

    @property
    def count(self) -> int:
        """One."""
        return 1


@dataclass(frozen=True, slots=True)
class Values:
    """Regression: explain what changes some of the values.

    Attributes:
        ids: which outputs of the network, in this order; at least one, no duplicates, each in [0, class_count).
        direction: whether what makes them larger or what makes them smaller.
    """

    ids: tuple[int, ...]
    direction: Direction = Direction.INCREASE

    @property
    def count(self) -> int:
        """How many values."""
        return len(self.ids)


Target = TopK | ClassIds | Pixels | Detections | Boxes | Similarity | Values
"""What is wanted of one image; which of them a model takes is its task's business."""


def class_targets(targets: Sequence[Target]) -> list[ClassTarget]:
    """The targets of a classifier.

    Raises:
        TypeError: one is of another task.
    """
    chosen = [target for target in targets if isinstance(target, TopK | ClassIds)]
    if len(chosen) < len(targets):
        raise TypeError("a classifier explains classes")
    return chosen
