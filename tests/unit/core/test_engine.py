"""What is computed of an engine's capabilities."""

import dataclasses

import pytest

from heatlens_server.core.engine import Capabilities
from heatlens_server.core.methods import Method
from heatlens_server.core.tasks import Activation, Task

INFO = Capabilities("torch", "cpu", "fp32", 32, 32, 2, (Method.GRAD_CAM,), ("body",))


@pytest.mark.parametrize(
    ("task", "threshold", "activation"),
    [
        (Task.CLASSIFICATION, None, Activation.SOFTMAX),
        (Task.MULTI_LABEL, None, Activation.SIGMOID),
        (Task.BINARY, None, Activation.SIGMOID),
        (Task.SEGMENTATION, None, Activation.SOFTMAX),
        (Task.SEGMENTATION, 0.5, Activation.SIGMOID),
        (Task.REGRESSION, None, Activation.NONE),
        (Task.DETECTION, None, Activation.NONE),
    ],
)
def test_the_activation_is_the_tasks_or_of_segmentation_told_by_the_threshold(task, threshold, activation):
    assert dataclasses.replace(INFO, task=task, threshold=threshold).activation is activation
