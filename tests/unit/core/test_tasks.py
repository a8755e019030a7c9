"""The row of every task: which probabilities, methods and measures its models have."""

import numpy as np
import pytest

from heatlens_server.core.methods import Method, Metric
from heatlens_server.core.tasks import EXPORTABLE_TASKS, Task


def probabilities(task: Task, logits) -> list[float]:
    found = task.traits.class_probabilities(np.array(logits, np.float32))
    assert found.dtype == np.float32
    return found.tolist()


def test_classes_of_a_classifier_exclude_each_other_and_labels_do_not():
    logits = [0.0, np.log(3.0), -np.inf]
    assert probabilities(Task.CLASSIFICATION, logits) == pytest.approx([0.25, 0.75, 0.0])
    assert probabilities(Task.MULTI_LABEL, logits) == pytest.approx([0.5, 0.75, 0.0])


@pytest.mark.parametrize("task", [Task.CLASSIFICATION, Task.MULTI_LABEL])
def test_no_logit_overflows(task):
    assert probabilities(task, [3e38, -3e38]) == [1.0, 0.0]


@pytest.mark.parametrize("task", [Task.SEGMENTATION, Task.DETECTION, Task.EMBEDDING])
def test_images_of_other_tasks_have_no_classes(task):
    assert not task.traits.has_image_classes
    assert probabilities(task, [1.0, 2.0]) == []
    assert Method.CAM in task.traits.unsupported_methods
    assert Metric.CLASS_SENSITIVITY not in task.traits.metrics


def test_classifiers_alone_are_exported():
    assert EXPORTABLE_TASKS == (Task.CLASSIFICATION, Task.MULTI_LABEL)


def test_an_option_belongs_to_one_task():
    options = [option for task in Task for option in task.traits.options]
    assert len(options) == len(set(options)) == 5
