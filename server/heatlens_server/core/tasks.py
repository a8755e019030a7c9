"""What a model does, and all that is known about models that do it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from types import MappingProxyType

import numpy as np

from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Method, Metric, Score


class Task(StrEnum):
    """What a model does. The value is its name in configuration files and on the wire."""

    CLASSIFICATION = "classification"
    MULTI_LABEL = "multi-label-classification"
    SEGMENTATION = "segmentation"
    DETECTION = "detection"
    EMBEDDING = "embedding"

    @property
    def traits(self) -> "TaskTraits":
        """Everything that is known about it."""
        return _TRAITS[self]


class Probabilities(Enum):
    """How the logits of an image become the probabilities of its classes."""

    SOFTMAX = auto()
    """Classes exclude each other."""
    SIGMOID = auto()
    """Each class on its own."""
    NONE = auto()
    """The image as a whole has no classes: its pixels or boxes have them, or nothing has."""


@dataclass(frozen=True, slots=True)
class TaskTraits:
    """Everything that is known about the models of a task.

    Attributes:
        probabilities: how the logits of an image become the probabilities of its classes.
        unsupported_methods: the methods that make no sense for it, whatever a network has.
        scores: what can be explained about a target.
        metrics: the measures of faithfulness that are defined.
        options: the options of requests that no other task has.
        can_flip: whether a target means the same in a mirrored image, so that maps can be averaged over mirror images.
        can_smooth_over_frames: whether a class id tells which explanation of the next frame is of the same thing.
        exportable: whether exports can hold its models.
        runs_in_half_precision: whether its models run in fp16 and bf16.
        gradients_can_overflow: whether scores are sums over places, whose gradients may be too large for float16.
    """

    probabilities: Probabilities = Probabilities.NONE
    unsupported_methods: frozenset[Method] = frozenset({Method.CAM})
    scores: tuple[Score, ...] = tuple(Score)
    metrics: frozenset[Metric] = frozenset(Metric) - {Metric.CLASS_SENSITIVITY}
    options: frozenset[str] = frozenset()
    can_flip: bool = False
    can_smooth_over_frames: bool = True
    exportable: bool = False
    runs_in_half_precision: bool = True
    gradients_can_overflow: bool = False

    @property
    def has_image_classes(self) -> bool:
        """Whether the image as a whole has predicted classes."""
        return self.probabilities is not Probabilities.NONE

    def class_probabilities(self, logits: Float32Array) -> Float32Array:
        """The probability of every class for the image as a whole.

        Args:
            logits: float32 (C,).

        Returns:
            float32 (C,), computed in float64; (0,) if images have no classes.
        """
        precise = logits.astype(np.float64)
        match self.probabilities:
            case Probabilities.SOFTMAX:
                exponentials = np.exp(precise - precise.max())
                found = exponentials / exponentials.sum()
            case Probabilities.SIGMOID:
                # Of -|x|, which cannot overflow.
                small = np.exp(-np.abs(precise))
                found = np.where(precise >= 0, 1.0, small) / (1.0 + small)
            case Probabilities.NONE:
                found = np.empty(0)
        probabilities: Float32Array = found.astype(np.float32)
        return probabilities


def _classifier(probabilities: Probabilities) -> TaskTraits:
    return TaskTraits(
        probabilities,
        unsupported_methods=frozenset(),
        metrics=frozenset(Metric),
        can_flip=True,
        exportable=True,
    )


_TRAITS: Mapping[Task, TaskTraits] = MappingProxyType(
    {
        Task.CLASSIFICATION: _classifier(Probabilities.SOFTMAX),
        Task.MULTI_LABEL: _classifier(Probabilities.SIGMOID),
        # Neither masks nor boxes are flipped with the image: `can_flip` is False.
        Task.SEGMENTATION: TaskTraits(options=frozenset({"mask", "return_mask"}), gradients_can_overflow=True),
        Task.DETECTION: TaskTraits(
            unsupported_methods=frozenset({Method.CAM, Method.SHAPLEY_CAM, Method.FULL_GRAD, Method.LE_GRAD}),
            scores=(Score.LOGIT, Score.PROBABILITY),
            options=frozenset({"min_score"}),
            # Of a class there may be many boxes, and nothing says which is which in the next frame.
            can_smooth_over_frames=False,
            # torchvision's suppression of boxes takes float32.
            runs_in_half_precision=False,
        ),
        Task.EMBEDDING: TaskTraits(
            scores=(Score.LOGIT, Score.PROBABILITY),
            options=frozenset({"reference_embedding", "reference_image"}),
            can_flip=True,
        ),
    }
)
"""One row per task."""

if missing := [task for task in Task if task not in _TRAITS]:
    raise TypeError(f"tasks without traits: {', '.join(missing)}")

EXPORTABLE_TASKS = tuple(task for task in Task if task.traits.exportable)
