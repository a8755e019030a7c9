"""The row of every task: which probabilities, methods and measures its models have."""

import numpy as np
import pytest

from heatlens._wire.requests import metrics_of
from heatlens_server.core.methods import Method, Metric
from heatlens_server.core.tasks import Task

LARGEST = float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([5.0], [1.0]),
        ([0.0] * 4, [0.25] * 4),
        ([LARGEST, LARGEST], [0.5, 0.5]),
        ([-LARGEST, -LARGEST], [0.5, 0.5]),
        ([LARGEST, -LARGEST], [1.0, 0.0]),
        ([1e4, 1e4 - 1], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]),
        ([-1e4, 0.0], [0.0, 1.0]),
        ([0.0, np.log(3)], [0.25, 0.75]),
    ],
)
def test_softmax_in_extreme_cases(logits, expected):
    probabilities = Task.CLASSIFICATION.traits.class_probabilities(np.array(logits, np.float32))
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)


def test_softmax_of_many_classes_sums_to_one():
    logits = np.random.default_rng(0).normal(0, 5, 21_841).astype(np.float32)
    assert Task.CLASSIFICATION.traits.class_probabilities(logits).sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)


def test_sigmoids_of_a_multi_label_model_do_not_exclude_each_other():
    logits = np.array([-800.0, 0.0, 800.0, 2.0], np.float32)
    probabilities = Task.MULTI_LABEL.traits.class_probabilities(logits)
    np.testing.assert_array_equal(probabilities[:3], [0, 0.5, 1])
    assert probabilities[3] == pytest.approx(1 / (1 + np.exp(-2.0)))
    assert probabilities.dtype == np.float32


@pytest.mark.parametrize("task", [Task.REGRESSION, Task.SEGMENTATION, Task.DETECTION, Task.EMBEDDING])
def test_images_of_other_tasks_have_no_classes(task):
    assert not task.traits.has_image_classes
    assert task.traits.class_probabilities(np.ones(2, np.float32)).size == 0
    assert Method.CAM in task.traits.unsupported_methods
    assert Metric.CLASS_SENSITIVITY not in task.traits.metrics


def test_classifiers_alone_are_exported():
    exported = [task for task in Task if task.traits.exportable]
    assert exported == [Task.CLASSIFICATION, Task.MULTI_LABEL, Task.BINARY]


def test_an_option_belongs_to_one_task():
    options = [option for task in Task for option in task.traits.options]
    assert len(options) == len(set(options)) == 6


@pytest.mark.parametrize("task", Task)
def test_the_sdk_knows_the_metrics_of_each_task(task):
    assert set(metrics_of(task)) == set(task.traits.metrics)
