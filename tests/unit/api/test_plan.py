"""Requests against a model and limits: what is accepted, and that everything else is named."""

import dataclasses
import time

import numpy as np
import pytest

from explain_requests import (
    LIMITS,
    PIXELS,
    TINY,
    TINY_MLP,
    assert_path_exists,
    fields,
    plan_of,
    planned,
    refusal,
    request,
)
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2, method_pb2
from heatlens_server.api.checks import Limits
from heatlens_server.api.query import MapType
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Aggregation, Method, Metric, Score
from heatlens_server.core.targets import ClassIds, TopK
from heatlens_server.fleet.served_model import ServedModel


def test_nothing_set_is_the_top_class_with_the_defaults():
    plan, image = planned(pb.ExplainRequest(image=PIXELS))
    assert plan.target == TopK(1)
    assert plan.spec == MapSpec(Method.GRAD_CAM, ("body",), upsample=False, divisible=True)
    assert (plan.place_on_source, plan.map_type, plan.top_predictions) == (False, MapType.FLOAT32, 0)
    np.testing.assert_array_equal(image.values, np.arange(18, dtype=np.uint8).reshape(2, 3, 3))


@pytest.mark.parametrize(
    ("map_size", "upsample", "place"),
    [
        (pb.MAP_SIZE_UNSPECIFIED, False, False),
        (pb.MAP_SIZE_LAYER, False, False),
        (pb.MAP_SIZE_INPUT, True, False),
        (pb.MAP_SIZE_SOURCE, True, True),
    ],
)
def test_map_sizes(map_size, upsample, place):
    plan = plan_of(request(map_size=map_size))
    assert (plan.spec.upsample, plan.place_on_source) == (upsample, place)


def test_targets_and_their_number():
    ids = plan_of(request(class_ids=pb.ClassIds(values=[7, 0, 9])))
    assert (ids.target, ids.target_count) == (ClassIds((7, 0, 9)), 3)
    top = plan_of(request(top_k=4))
    assert (top.target, top.target_count) == (TopK(4), 4)


def labelled(*labels):
    return dataclasses.replace(TINY, labels=labels)


ANIMALS = labelled("cat", "dog", "crane", "crane", *(f"bird {n}" for n in range(6)))


def test_classes_by_label_come_after_those_by_id():
    named = plan_of(request(class_ids=pb.ClassIds(values=[7], labels=["dog", "cat"])), ANIMALS)
    assert named.target == ClassIds((7, 1, 0))
    assert plan_of(request(class_ids=pb.ClassIds(labels=["cat"])), ANIMALS).target == ClassIds((0,))


@pytest.mark.parametrize(
    ("labels", "model", "words"),
    [
        (["dgo"], ANIMALS, "near: dog"),
        (["dog\n" * 1000], ANIMALS, "has no label"),
        (["crane"], ANIMALS, "2 classes"),
        (["dog", "dog"], ANIMALS, "duplicate"),
        (["bird 3"], ANIMALS, "duplicate"),
        (["dog"], TINY, "name classes by id"),
    ],
)
def test_a_label_that_is_not_of_one_class_is_named(labels, model, words):
    error = refusal(request(class_ids=pb.ClassIds(values=[7], labels=labels)), model)
    assert fields(error) == [f"options.class_ids.labels[{len(labels) - 1}]"]
    assert words in error.violations[0].description
    assert len(error.violations[0].description) < 300


def test_ids_and_labels_share_one_limit():
    error = refusal(request(class_ids=pb.ClassIds(values=[7, 8, 9], labels=["cat", "dog"])), ANIMALS)
    assert fields(error) == ["options.class_ids.values"]
    assert "got 5" in error.violations[0].description


def test_a_direction_is_for_regression():
    assert fields(refusal(request(direction=pb.DIRECTION_DECREASE))) == ["options.direction"]


def test_top_k_is_bounded_by_the_class_count_too():
    wide = Limits(
        max_message_bytes=1, max_image_pixels=6, max_queue_length=1, max_targets=1000, max_streams=1, max_in_flight=1
    )
    assert plan_of(request(top_k=10), limits=wide).target == TopK(10)
    assert fields(refusal(request(top_k=11), limits=wide)) == ["options.top_k"]


def test_encoded_images_are_handed_on_as_they_are():
    sent = pb.ExplainRequest(image=pb.Image(encoded=b"not looked at yet"))
    assert planned(sent)[1] == b"not looked at yet"


@pytest.mark.parametrize("image", [None, pb.Image()])
def test_an_image_is_required(image):
    error = refusal(pb.ExplainRequest(image=image))
    assert (fields(error), error.reason) == (["image"], "IMAGE_MISSING")


def test_all_wrong_fields_are_named_at_once():
    sent = pb.ExplainRequest(
        image=pb.Image(pixels=pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(2, 2, 3), data=b"")),
        options=pb.ExplainOptions(
            method=99,
            class_ids=pb.ClassIds(values=[3, -1, 3, 10]),
            layers=["body", "body"],
            map_size=9,
            map_type=-1,
            smoothing=pb.Smoothing(augmentation=True, principal_component=True),
            top_predictions=-1,
            target_score=9,
            aggregation=9,
            faithfulness=faithfulness_pb2.FaithfulnessOptions(metrics=[1, 1, 0]),
            return_mask=True,
            min_score=0.5,
        ),
    )
    error = refusal(sent)
    assert fields(error) == [
        "options.method",
        "options.layers[1]",
        "options.return_mask",
        "options.min_score",
        "options.class_ids.values[1]",
        "options.class_ids.values[2]",
        "options.class_ids.values[3]",
        "options.map_size",
        "options.map_type",
        "options.top_predictions",
        "options.target_score",
        "options.aggregation",
        "options.faithfulness.metrics[1]",
        "options.faithfulness.metrics[2]",
        "image.pixels.data",
    ]
    assert error.metadata["expected_bytes"] == "12"
    assert error.violations[12].description == "duplicate metric deletion"
    for field in fields(error):
        assert_path_exists(pb.ExplainRequest, field)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (["nope"], ["options.layers[0]"]),
        (["stem", "nope"], ["options.layers[1]"]),
        (["stem", "stem"], ["options.layers[1]"]),
        ([""], ["options.layers[0]"]),
        (["body", "stem", "body"], ["options.layers"]),
    ],
)
def test_layers(layers, named):
    assert fields(refusal(request(layers=layers))) == named


def test_cam_wants_the_default_layer_and_a_model_that_has_it():
    assert plan_of(request(method=method_pb2.METHOD_CAM, layers=["body"])).spec.method is Method.CAM
    assert fields(refusal(request(method=method_pb2.METHOD_CAM, layers=["stem"]))) == ["options.layers"]
    assert fields(refusal(request(method=method_pb2.METHOD_CAM, layers=["body", "stem"]))) == ["options.layers"]
    assert fields(refusal(request(method=method_pb2.METHOD_CAM), TINY_MLP)) == ["options.method"]


@pytest.mark.parametrize("method", [method_pb2.METHOD_RISE, method_pb2.METHOD_FULL_GRAD])
def test_layers_that_change_nothing_are_said(method):
    (told,) = plan_of(request(method=method, layers=["stem"])).warnings
    assert told.startswith("layers: ")
    assert "looks at no layer" in told
    assert plan_of(request(method=method)).warnings == ()
    assert plan_of(request(method=method_pb2.METHOD_GRAD_CAM, layers=["stem"])).warnings == ()


def spec_of(**options) -> MapSpec:
    return plan_of(request(**options)).spec


def test_presets_are_what_they_stand_for():
    finer = spec_of(method=method_pb2.METHOD_FINER_CAM)
    assert finer == spec_of(method=method_pb2.METHOD_GRAD_CAM, target_score=method_pb2.TARGET_SCORE_CONTRAST)
    assert (finer.method, finer.score, finer.layers) == (Method.GRAD_CAM, Score.CONTRAST, ("body",))
    refine = spec_of(method=method_pb2.METHOD_REFINE_CAM)
    product = {"method": method_pb2.METHOD_GRAD_CAM, "aggregation": method_pb2.AGGREGATION_PRODUCT}
    assert refine == spec_of(layers=["body", "stem"], **product)
    assert refine.aggregation is Aggregation.PRODUCT
    assert spec_of(method=method_pb2.METHOD_REFINE_CAM, layers=["stem"]).layers == ("stem",)


def test_smoothing_and_faithfulness_reach_the_spec():
    spec = spec_of(
        smoothing=pb.Smoothing(augmentation=True, principal_component=True),
        faithfulness=faithfulness_pb2.FaithfulnessOptions(metrics=[8, 3]),
    )
    assert (spec.augment, spec.principal, spec.in_steps) == (True, True, True)
    assert spec.metrics == (Metric.ROAD_MORF, Metric.SPARSENESS)
    default = spec_of(faithfulness=faithfulness_pb2.FaithfulnessOptions())
    assert default.metrics == (Metric.DELETION, Metric.INSERTION)
    assert spec_of(smoothing=pb.Smoothing()) == spec_of()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, 1),
        ({"top_k": 8}, 8),
        ({"top_k": 4, "layers": ["body", "stem"]}, 12),
        ({"method": method_pb2.METHOD_FULL_GRAD, "top_k": 2}, 4),
        ({"method": method_pb2.METHOD_GUIDED_GRAD_CAM}, 2),
        ({"method": method_pb2.METHOD_KPCA_CAM, "top_k": 10}, 2),
        ({"method": method_pb2.METHOD_SHAPLEY_CAM}, 2),
        ({"method": method_pb2.METHOD_SHAPLEY_CAM, "top_k": 4, "layers": ["body", "stem"]}, 12),
        ({"method": method_pb2.METHOD_EIGEN_CAM, "top_k": 10}, 1),
        ({"method": method_pb2.METHOD_EIGEN_CAM, "top_k": 10, "layers": ["body", "stem"]}, 2),
    ],
)
def test_an_explanation_is_divided_by_goals_or_by_layers_where_no_goal_matters(options, parts):
    plan = plan_of(request(**options), limits=dataclasses.replace(LIMITS, max_targets=10))
    assert plan.spec.parts(plan.target_count) == parts
    # How, the queue decides by the time that it takes.
    assert not plan.spec.in_steps


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"top_k": 4}, "top_k"),
        ({"class_ids": pb.ClassIds(values=[1, 2, 3, 4])}, "class_ids.values"),
        ({"method": method_pb2.METHOD_RISE}, "method"),
        ({"method": method_pb2.METHOD_SMOOTH_GRAD_CAM_PLUS_PLUS, "layers": ["body", "stem"]}, "layers"),
        ({"smoothing": pb.Smoothing(augmentation=True)}, "smoothing.augmentation"),
        ({"faithfulness": faithfulness_pb2.FaithfulnessOptions()}, "faithfulness.metrics"),
    ],
)
def test_what_takes_too_many_runs_is_refused_at_the_option_that_costs_most(options, field):
    # Grad-CAM of one class takes 2, and smooth Grad-CAM++ 9.
    most = 9 if "layers" in options else 4
    error = refusal(request(**options), limits=dataclasses.replace(LIMITS, max_model_runs=most))
    assert (fields(error), error.reason) == ([f"options.{field}"], "INVALID_OPTION")
    assert f"runs of the model; at most {most}" in error.violations[0].description


def test_nothing_that_is_sensible_takes_too_many_runs():
    """SS-CAM by a layer of 2,048 channels is, of ResNet-50, and smoothing it is not."""
    shapes = {"body": (2048, 7, 7), "stem": (256, 56, 56)}
    large = dataclasses.replace(TINY, capabilities=dataclasses.replace(TINY.capabilities, layer_shapes=shapes))
    ss_cam = request(method=method_pb2.METHOD_SS_CAM, top_k=4)
    assert planned(ss_cam, large)[0].spec.layers == ("body",)
    ss_cam.options.smoothing.augmentation = True
    assert fields(refusal(ss_cam, large)) == ["options.smoothing.augmentation"]


def test_what_an_engine_without_steps_runs_is_not_divided():
    exported = dataclasses.replace(TINY, capabilities=dataclasses.replace(TINY.capabilities, takes_steps=False))
    assert plan_of(request(top_k=2), exported).spec.parts(2) == 1


def test_what_only_torch_does_is_refused_where_there_is_no_torch():
    exported = dataclasses.replace(
        TINY,
        capabilities=dataclasses.replace(
            TINY.capabilities, has_options=False, scores=(Score.LOGIT,), methods=(Method.GRAD_CAM,)
        ),
    )
    sent = request(
        smoothing=pb.Smoothing(augmentation=True, principal_component=True),
        faithfulness=faithfulness_pb2.FaithfulnessOptions(),
        target_score=method_pb2.TARGET_SCORE_PROBABILITY,
    )
    assert fields(refusal(sent, exported)) == [
        "options.target_score",
        "options.smoothing.augmentation",
        "options.smoothing.principal_component",
        "options.faithfulness",
    ]
    assert fields(refusal(request(method=method_pb2.METHOD_FINER_CAM), exported)) == ["options.method"]


def of_export(*scores: Score, methods=(Method.GRAD_CAM, Method.EIGEN_CAM), **changes) -> ServedModel:
    """Served from a folder: there is no torch beside it."""
    capabilities = dataclasses.replace(TINY.capabilities, has_options=False, scores=scores, methods=methods, **changes)
    return dataclasses.replace(TINY, capabilities=capabilities, default_method=capabilities.requestable_methods[0])


def test_an_export_of_another_score_explains_that_one_unless_told_otherwise():
    model = of_export(Score.PROBABILITY, methods=(Method.GRAD_CAM,))
    assert model.capabilities.requestable_methods == (Method.GRAD_CAM,)
    for sent in (request(), request(method=method_pb2.METHOD_GRAD_CAM), request(target_score=2)):
        assert plan_of(sent, model).spec.score is Score.PROBABILITY
    error = refusal(request(target_score=method_pb2.TARGET_SCORE_LOGIT), model)
    assert fields(error) == ["options.target_score"]
    assert "does not support logit; it supports: probability" in error.message


def test_grad_cam_of_the_contrast_alone_goes_by_the_name_of_finer_cam():
    model = of_export(Score.CONTRAST, methods=(Method.GRAD_CAM, Method.LAYER_CAM))
    assert model.capabilities.requestable_methods == (Method.LAYER_CAM, Method.FINER_CAM)
    finer = plan_of(request(method=method_pb2.METHOD_FINER_CAM), model).spec
    assert (finer.method, finer.score, finer.layers) == (Method.GRAD_CAM, Score.CONTRAST, ("body",))
    assert plan_of(request(), model).spec.score is Score.CONTRAST
    assert fields(refusal(request(target_score=method_pb2.TARGET_SCORE_LOGIT), model)) == ["options.target_score"]
    error = refusal(request(method=method_pb2.METHOD_GRAD_CAM), model)
    assert fields(error) == ["options.method"]
    assert "does not support grad-cam; it supports: layer-cam, finer-cam" in error.message


def test_a_layer_by_which_an_export_has_not_the_method_is_named():
    model = of_export(Score.LOGIT, layers_by_method={Method.EIGEN_CAM: ("body",)})
    eigen = {"method": method_pb2.METHOD_EIGEN_CAM}
    assert plan_of(request(**eigen), model).spec.layers == ("body",)
    assert plan_of(request(layers=["stem", "body"]), model).spec.layers == ("stem", "body")
    error = refusal(request(layers=["body", "stem"], **eigen), model)
    assert fields(error) == ["options.layers[1]"]
    assert "no eigen-cam by 'stem', only by body" in error.message


@pytest.mark.parametrize(
    "sent",
    [
        request(layers=["body"] * 300_000),
        request(layers=["x" * 100_000]),
        request(class_ids=pb.ClassIds(values=range(500_000))),
        request(faithfulness=faithfulness_pb2.FaithfulnessOptions(metrics=[1] * 500_000)),
        pb.ExplainRequest(image=pb.Image(pixels=pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=range(300_000)))),
    ],
    ids=["many layers", "long layer", "many classes", "many metrics", "many dimensions"],
)
def test_huge_requests_are_refused_fast_and_shortly(sent):
    started_at = time.process_time()
    error = refusal(sent)
    assert time.process_time() - started_at < 1
    assert len(error.violations) == 1
    assert len(error.message) < 300
