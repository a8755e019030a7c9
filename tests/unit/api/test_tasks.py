"""What requests may ask of models of each task, and which of their options belong to other tasks."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import explain_requests
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2, method_pb2
from heatlens_server.api import reference_image
from heatlens_server.api.checks import Violations
from heatlens_server.api.plan import plan_options
from heatlens_server.api.query import Options
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method, Metric, Score
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.core.targets import ClassIds, Detections, Direction, Pixels, Similarity, TopK, Values
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.imaging.preprocess import fit

IMAGE = pb.Image(pixels=pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(8, 8, 3), data=bytes(192)))
MASK = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(8, 8), data=bytes(range(64)))
VECTOR = pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=(3,), data=np.array([1, 0, 2], "<f4").tobytes())
PREPROCESS = PreprocessSpec(
    resize_px=8, crop_px=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), interpolation=Interpolation.BILINEAR
)
FITTED = fit(np.zeros((8, 8, 3), np.uint8), PREPROCESS)
INFO = Capabilities(
    "torch", "cpu", "fp32", 8, 8, 3, (Method.GRAD_CAM,), ("body",), scores=(Score.LOGIT,), has_options=True
)


def model_of(task: Task) -> ServedModel:
    return ServedModel(
        name="model",
        version="0",
        labels=(),
        preprocess=PREPROCESS,
        capabilities=dataclasses.replace(INFO, task=task),
        default_method=Method.GRAD_CAM,
        max_batch_size=4,
        max_delay_s=0.0,
        queue=None,  # parsing never touches it
    )


def plan_of(task: Task, **options):
    sent = pb.ExplainRequest(image=IMAGE, options=pb.ExplainOptions(**options))
    return explain_requests.plan_of(sent, model_of(task))


def refused(task: Task, **options) -> list[str]:
    with pytest.raises(InvalidArgument) as raised:
        plan_of(task, **options)
    return [violation.field for violation in raised.value.violations]


def test_every_option_is_read():
    read = set()

    class Recorded:
        def __getattr__(self, name):
            read.add(name)
            return getattr(Options(faithfulness=True), name)

    for task in Task:
        plan_options(Recorded(), model_of(task), explain_requests.LIMITS, Violations())
    assert read == {field.name for field in dataclasses.fields(Options)}


OF_ONE_TASK = {
    "mask": (Task.SEGMENTATION, MASK),
    "return_mask": (Task.SEGMENTATION, True),
    "reference_embedding": (Task.EMBEDDING, VECTOR),
    "reference_image": (Task.EMBEDDING, IMAGE),
    "min_score": (Task.DETECTION, 0.0),
    "direction": (Task.REGRESSION, pb.DIRECTION_DECREASE),
}


@pytest.mark.parametrize("option", OF_ONE_TASK)
@pytest.mark.parametrize("task", Task)
def test_options_of_other_tasks_are_refused(task, option):
    owner, value = OF_ONE_TASK[option]
    needed = {"reference_embedding": VECTOR} if task is Task.EMBEDDING else {}
    if task is owner:
        assert plan_of(task, **{option: value}).target is not None
    else:
        assert refused(task, **needed, **{option: value}) == [f"options.{option}"]


def detector(count, labels=()):
    model = model_of(Task.DETECTION)
    capabilities = dataclasses.replace(model.capabilities, class_count=count)
    return dataclasses.replace(model, capabilities=capabilities, labels=labels)


@pytest.mark.parametrize(
    ("count", "labels", "wrong"),
    [
        (3, (), {0: "class id 3 is not in [0, 3)", 2: "class id -1 is not in [0, 3)"}),
        (0, ("-", "cat", "dog"), {0: "class id 3 is not in [0, 3)", 2: "class id -1 is not in [0, 3)"}),
        # Nothing tells how many there are.
        (0, (), {2: "class id -1 is not 0 or more"}),
    ],
)
def test_class_ids_are_as_many_as_is_known(count, labels, wrong):
    sent = pb.ExplainRequest(image=IMAGE, options=pb.ExplainOptions(class_ids=pb.ClassIds(values=[3, 1, -1])))
    with pytest.raises(InvalidArgument) as raised:
        explain_requests.plan_of(sent, detector(count, labels))
    told = {violation.field: violation.description for violation in raised.value.violations}
    assert told == {f"options.class_ids.values[{place}]": text for place, text in wrong.items()}


def test_a_label_that_the_file_lacks_is_empty():
    model = detector(0, ("-", "cat"))
    assert (model.class_count, detector(5).class_count, detector(0).class_count) == (2, 5, 0)
    assert [model.label(class_id) for class_id in (1, 2, -1)] == ["cat", "", ""]


def test_regression_wants_values_and_a_direction():
    assert plan_of(Task.REGRESSION).target == Values((0,), Direction.INCREASE)
    chosen = plan_of(Task.REGRESSION, class_ids=pb.ClassIds(values=[2, 0]), direction=pb.DIRECTION_DECREASE).target
    assert chosen == Values((2, 0), Direction.DECREASE)
    assert refused(Task.REGRESSION, top_k=1) == ["options.top_k"]
    assert refused(Task.REGRESSION, direction=7) == ["options.direction"]
    assert refused(Task.REGRESSION, target_score=method_pb2.TARGET_SCORE_PROBABILITY) == ["options.target_score"]


def test_regression_measures_what_needs_no_probability():
    asked = plan_of(Task.REGRESSION, faithfulness=faithfulness_pb2.FaithfulnessOptions())
    assert asked.spec.metrics == (Metric.ROAD_MORF, Metric.ROAD_LERF, Metric.ROAD_COMBINED)
    metrics = [faithfulness_pb2.FAITHFULNESS_METRIC_DELETION, faithfulness_pb2.FAITHFULNESS_METRIC_SPARSENESS]
    named = refused(Task.REGRESSION, faithfulness=faithfulness_pb2.FaithfulnessOptions(metrics=metrics))
    assert named == ["options.faithfulness.metrics[0]"]
    assert plan_of(Task.REGRESSION, top_predictions=2).top_predictions == 2


def test_segmentation_wants_classes_and_maybe_a_mask():
    plan = plan_of(Task.SEGMENTATION)
    assert (plan.target.classes, plan.target.mask, plan.finish_target) == (TopK(1), None, None)
    plan = plan_of(Task.SEGMENTATION, class_ids=pb.ClassIds(values=[2, 0]), mask=MASK, return_mask=True)
    assert (plan.target_count, plan.spec.return_mask) == (2, True)
    finished = plan.finish_target(FITTED)
    assert isinstance(finished, Pixels)
    assert finished.classes == ClassIds((2, 0))
    assert finished.mask.sum() == 63
    small = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(4, 4), data=bytes([1] * 16))
    with pytest.raises(InvalidArgument) as raised:
        plan_of(Task.SEGMENTATION, mask=small).finish_target(FITTED)
    assert [violation.field for violation in raised.value.violations] == ["mask.shape"]
    assert refused(Task.SEGMENTATION, mask=pb.Tensor()) == ["options.mask.data_type"]


def test_detection_wants_boxes_above_a_score():
    assert plan_of(Task.DETECTION).target == Detections(0.5, 4)
    assert plan_of(Task.DETECTION, min_score=0.0, top_k=4).target == Detections(0.0, 4)
    assert plan_of(Task.DETECTION, class_ids=pb.ClassIds(values=[1])).target == Detections(0.5, 4, (1,))
    # Boxes, not classes: there may be more of them than classes, of which this model has three.
    assert refused(Task.DETECTION, top_k=5) == ["options.top_k"]
    for score in (-0.1, 1.1, float("nan")):
        assert refused(Task.DETECTION, min_score=score) == ["options.min_score"]


def test_an_embedding_wants_something_to_compare_with():
    plan = plan_of(Task.EMBEDDING, reference_embedding=VECTOR)
    assert isinstance(plan.target, Similarity)
    np.testing.assert_array_equal(plan.target.reference, [1, 0, 2])
    finished = plan_of(Task.EMBEDDING, reference_image=IMAGE).finish_target(FITTED)
    assert finished.reference.shape == (8, 8, 3)
    assert refused(Task.EMBEDDING) == ["options.reference_embedding"]
    assert refused(Task.EMBEDDING, reference_embedding=VECTOR, top_k=1) == ["options.top_k"]
    short = pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=(1,), data=b"\0\0\x80\x3f")
    assert refused(Task.EMBEDDING, reference_embedding=short) == ["options.reference_embedding.shape"]
    assert refused(Task.EMBEDDING, reference_image=pb.Image()) == ["options.reference_image"]
    broken = plan_of(Task.EMBEDDING, reference_image=pb.Image(encoded=b"no image"))
    with pytest.raises(InvalidArgument) as raised:
        broken.finish_target(FITTED)
    assert [violation.field for violation in raised.value.violations] == ["reference_image.encoded"]


def test_a_reference_image_is_decoded_once(monkeypatch):
    decoded = []
    fit = reference_image.fit_image
    monkeypatch.setattr(reference_image, "fit_image", lambda *given, **named: decoded.append(1) or fit(*given, **named))
    plan = plan_of(Task.EMBEDDING, reference_image=IMAGE)
    assert plan.reference.inspected() is not None
    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(plan.finish_target, [FITTED] * 8)
    assert all(other is first for other in others)
    assert plan.reference.inspected() is None  # nothing of it is left to decode, or to wait for
    assert decoded == [1]
    broken = plan_of(Task.EMBEDDING, reference_image=pb.Image(encoded=b"no image"))
    for _ in range(3):
        with pytest.raises(InvalidArgument):
            broken.finish_target(FITTED)
    assert decoded == [1, 1]


@pytest.mark.parametrize("task", [Task.SEGMENTATION, Task.DETECTION])
def test_what_is_not_defined_for_a_task_is_refused(task):
    metrics = [faithfulness_pb2.FAITHFULNESS_METRIC_CLASS_SENSITIVITY]
    named = refused(
        task,
        top_predictions=1,
        smoothing=pb.Smoothing(augmentation=True),
        faithfulness=faithfulness_pb2.FaithfulnessOptions(metrics=metrics),
    )
    assert named == ["options.top_predictions", "options.smoothing.augmentation", "options.faithfulness.metrics[0]"]
    assert plan_of(task, faithfulness=faithfulness_pb2.FaithfulnessOptions()).spec.metrics == (
        Metric.DELETION,
        Metric.INSERTION,
    )
