"""Classification on the wire: classes by id or by rank, probabilities by softmax or, multi-label, by sigmoid."""

from collections.abc import Sequence

import numpy as np

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.limits import Limits
from heatlens_server.api.tasks.base import Wanted, class_target, refuse_others
from heatlens_server.api.violations import Violations
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Metric
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import TopK
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.served_model import ServedModel


class ClassificationWire:
    """Implements `api.tasks.base.TaskWire`."""

    predicts = True
    mirrors = True
    measures = frozenset(Metric)
    recurs = True

    def __init__(self, task: Task) -> None:
        """Describe classifiers.

        Args:
            task: CLASSIFICATION or MULTI_LABEL.
        """
        self._task = task

    def wanted(self, options: pb.ExplainOptions, model: ServedModel, limits: Limits, wrong: Violations) -> Wanted:
        """The classes; the most probable one if none is named."""
        refuse_others(options, self._task, wrong)
        count = model.capabilities.class_count
        return Wanted(
            class_target(options, class_count=count, max_targets=limits.max_targets, wrong=wrong, default=TopK(1))
        )

    def findings(self, result: ImageResult) -> Sequence[Finding]:
        """Logit and probability of each class."""
        probabilities = self.probabilities(result)
        return [
            Finding(class_id, logit=float(result.logits[class_id]), probability=float(probabilities[class_id]))
            for class_id in result.class_ids
        ]

    def probabilities(self, result: ImageResult) -> Float32Array:
        """Of every class."""
        return sigmoid(result.logits) if self._task is Task.MULTI_LABEL else softmax(result.logits)


def softmax(logits: Float32Array) -> Float32Array:
    """Probabilities float32 (C,) of logits float32 (C,); computed in float64."""
    wide = logits.astype(np.float64)
    exponentials = np.exp(wide - wide.max())
    probabilities: Float32Array = (exponentials / exponentials.sum()).astype(np.float32)
    return probabilities


def sigmoid(logits: Float32Array) -> Float32Array:
    """Probabilities float32 (C,) of logits float32 (C,), each on its own; computed in float64."""
    # Of -|x|, which cannot overflow.
    small = np.exp(-np.abs(logits.astype(np.float64)))
    probabilities: Float32Array = (np.where(logits >= 0, 1.0, small) / (1.0 + small)).astype(np.float32)
    return probabilities
