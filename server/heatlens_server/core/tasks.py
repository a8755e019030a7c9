"""What a model does, and all that is known about models that do it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import numpy as np

from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Method, Metric, Score


class Task(StrEnum):
    """What a model does. The value is its name in configuration files and on the wire."""

    CLASSIFICATION = "classification"
    MULTI_LABEL = "multi-label-classification"
    BINARY = "binary-classification"
    REGRESSION = "regression"
    SEGMENTATION = "segmentation"
    DETECTION = "detection"
    EMBEDDING = "embedding"

    @property
    def traits(self) -> "TaskTraits":
        """Everything that is known about it."""
        return _TRAITS[self]


class Activation(StrEnum):
    """How logits become probabilities. The value is its name in configuration files and on the wire."""

    SOFTMAX = "softmax"
    """Classes exclude each other."""
    SIGMOID = "sigmoid"
    """Each class on its own."""
    NONE = "none"
    """There are no logits of classes, or what the network returns are probabilities."""


class OutputKind(StrEnum):
    """What a network itself returns. The value is its name in configuration files and on the wire."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    LOG_PROBABILITIES = "log-probabilities"


@dataclass(frozen=True, slots=True)
class TaskTraits:
    """Everything that is known about the models of a task.

    Attributes:
        activation: how logits become probabilities.
        has_image_classes: whether the image as a whole has predicted classes; elsewhere its pixels or boxes have them,
            or nothing has.
        has_values: whether the outputs are values, which have no probabilities.
        unsupported_methods: the methods that make no sense for it, whatever a network has.
        scores: what can be explained about a target.
        metrics: the measures of faithfulness that are defined.
        default_metrics: those that are computed if a request names none.
        options: the options of requests that no other task has.
        can_flip: whether a target means the same in a mirrored image, so that maps can be averaged over mirror images.
        can_smooth_over_frames: whether a class id tells which explanation of the next frame is of the same thing.
        exportable: whether exports can hold its models.
        runs_in_half_precision: whether its models run in fp16 and bf16.
        gradients_can_overflow: whether scores are sums over places, whose gradients may be too large for float16.
    """

    activation: Activation = Activation.NONE
    has_image_classes: bool = False
    has_values: bool = False
    unsupported_methods: frozenset[Method] = frozenset({Method.CAM})
    scores: tuple[Score, ...] = tuple(Score)
    metrics: frozenset[Metric] = frozenset(Metric) - {Metric.CLASS_SENSITIVITY}
    default_metrics: frozenset[Metric] = frozenset({Metric.DELETION, Metric.INSERTION})
    options: frozenset[str] = frozenset()
    can_flip: bool = False
    can_smooth_over_frames: bool = True
    exportable: bool = False
    runs_in_half_precision: bool = True
    gradients_can_overflow: bool = False

    def class_probabilities(self, logits: Float32Array) -> Float32Array:
        """The probability of every class for the image as a whole.

        Args:
            logits: float32 (C,).

        Returns:
            float32 (C,), computed in float64; (0,) if images have no classes.
        """
        if not self.has_image_classes:
            return np.empty(0, np.float32)
        precise = logits.astype(np.float64)
        if self.activation is Activation.SOFTMAX:
            exponentials = np.exp(precise - precise.max())
            found = exponentials / exponentials.sum()
        else:
            # Of -|x|, which cannot overflow.
            small = np.exp(-np.abs(precise))
            found = np.where(precise >= 0, 1.0, small) / (1.0 + small)
        probabilities: Float32Array = found.astype(np.float32)
        return probabilities


_CHANGES = frozenset({Metric.ROAD_MORF, Metric.ROAD_LERF, Metric.ROAD_COMBINED})


def _classifier(activation: Activation) -> TaskTraits:
    return TaskTraits(
        activation,
        has_image_classes=True,
        unsupported_methods=frozenset(),
        metrics=frozenset(Metric),
        can_flip=True,
        exportable=True,
    )


_TRAITS: Mapping[Task, TaskTraits] = MappingProxyType(
    {
        Task.CLASSIFICATION: _classifier(Activation.SOFTMAX),
        Task.MULTI_LABEL: _classifier(Activation.SIGMOID),
        # Two classes, of the logits -z and z of one output z: the one's sigmoid is what the other's lacks to 1.
        Task.BINARY: _classifier(Activation.SIGMOID),
        Task.REGRESSION: TaskTraits(
            has_values=True,
            scores=(Score.LOGIT,),
            # Means of changes, and what looks at maps alone: the others are areas or shares of a probability.
            metrics=_CHANGES | {Metric.SPARSENESS, Metric.MODEL_RANDOMISATION},
            default_metrics=_CHANGES,
            options=frozenset({"direction"}),
            can_flip=True,
        ),
        # Neither masks nor boxes are flipped with the image: `can_flip` is False.
        Task.SEGMENTATION: TaskTraits(
            Activation.SOFTMAX, options=frozenset({"mask", "return_mask"}), gradients_can_overflow=True
        ),
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
