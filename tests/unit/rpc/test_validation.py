"""Requests against a model and limits: what is accepted, and that everything else is named."""

import dataclasses
import math
import re
import time

import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from engine_cases import loaded
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2, method_pb2
from heatlens_server.cam.catalog import PRESETS, WEIGHTED, Aggregation, Method, Metric, Score
from heatlens_server.engines.base import ClassIds, MapSpec, TopK
from heatlens_server.engines.torch_engine import TorchEngine
from heatlens_server.errors import InvalidArgument
from heatlens_server.rpc.limits import Limits
from heatlens_server.rpc.status import to_wire
from heatlens_server.rpc.validation import parse_explain
from heatlens_server.rpc.wire import METHOD_FROM_PROTO
from heatlens_server.serving.served import ServedModel

LIMITS = Limits(
    max_message_bytes=1 << 20, max_image_pixels=5000, max_queue_length=8, max_targets=4, max_streams=2, max_in_flight=8
)
PIXELS = pb.Image(pixels=pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(2, 3, 3), data=bytes(range(18))))


def served(module, layers) -> ServedModel:
    model = loaded(module, layers)
    engine = TorchEngine(model, device="cpu")
    methods = {*Method} - {*PRESETS, Method.LE_GRAD} - ({Method.CAM} - {*engine.info.methods})
    info = dataclasses.replace(engine.info, methods=tuple(method for method in Method if method in methods))
    engine.close()
    return ServedModel(
        name="tiny",
        version="0",
        labels=(),
        preprocess=model.preprocess,
        engine=info,
        default_method=Method.GRAD_CAM,
        max_batch_size=4,
        max_delay_s=0.0,
        lane=None,  # parsing never touches it
    )


TINY = served(tiny_models.tiny(), ("body", "stem"))
TINY_MLP = served(tiny_models.tiny_mlp(), ("body",))


def request(**options) -> pb.ExplainRequest:
    return pb.ExplainRequest(image=PIXELS, options=pb.ExplainOptions(**options))


def refusal(sent: pb.ExplainRequest, model: ServedModel = TINY, limits: Limits = LIMITS) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as raised:
        parse_explain(sent, model, limits)
    return raised.value


def fields(error: InvalidArgument) -> list[str]:
    return [violation.field for violation in error.violations]


def test_nothing_set_is_the_top_class_with_the_defaults():
    command = parse_explain(pb.ExplainRequest(image=PIXELS), TINY, LIMITS)
    assert command.plan.target == TopK(1)
    assert command.plan.spec == MapSpec(Method.GRAD_CAM, ("body",), upsample=False)
    assert (command.plan.place_on_source, command.plan.map_dtype, command.plan.top_predictions) == (False, "<f4", 0)
    np.testing.assert_array_equal(command.image, np.arange(18, dtype=np.uint8).reshape(2, 3, 3))


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
    plan = parse_explain(request(map_size=map_size), TINY, LIMITS).plan
    assert (plan.spec.upsample, plan.place_on_source) == (upsample, place)


def test_targets_and_their_number():
    ids = parse_explain(request(class_ids=pb.ClassIds(values=[7, 0, 9])), TINY, LIMITS).plan
    assert (ids.target, ids.target_count) == (ClassIds((7, 0, 9)), 3)
    top = parse_explain(request(top_k=4), TINY, LIMITS).plan
    assert (top.target, top.target_count) == (TopK(4), 4)


def test_top_k_is_bounded_by_the_class_count_too():
    wide = Limits(
        max_message_bytes=1, max_image_pixels=6, max_queue_length=1, max_targets=1000, max_streams=1, max_in_flight=1
    )
    assert parse_explain(request(top_k=10), TINY, wide).plan.target == TopK(10)
    assert fields(refusal(request(top_k=11), limits=wide)) == ["options.top_k"]


def test_encoded_images_are_handed_on_as_they_are():
    sent = pb.ExplainRequest(image=pb.Image(encoded=b"not looked at yet"))
    assert parse_explain(sent, TINY, LIMITS).image == b"not looked at yet"


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
    for field in fields(error):
        assert_path_exists(pb.ExplainRequest, field)


def assert_path_exists(message: type[Message], path: str) -> None:
    """Every name of a field path is a field of the contract."""
    descriptor = message.DESCRIPTOR
    for name in re.sub(r"\[\d+\]", "", path).split("."):
        found = descriptor.fields_by_name[name]
        descriptor = found.message_type


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
    assert (
        parse_explain(request(method=method_pb2.METHOD_CAM, layers=["body"]), TINY, LIMITS).plan.spec.method
        is Method.CAM
    )
    assert fields(refusal(request(method=method_pb2.METHOD_CAM, layers=["stem"]))) == ["options.layers"]
    assert fields(refusal(request(method=method_pb2.METHOD_CAM, layers=["body", "stem"]))) == ["options.layers"]
    assert fields(refusal(request(method=method_pb2.METHOD_CAM), TINY_MLP)) == ["options.method"]


def spec_of(**options) -> MapSpec:
    return parse_explain(request(**options), TINY, LIMITS).plan.spec


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


def test_what_only_torch_does_is_refused_where_there_is_no_torch():
    exported = dataclasses.replace(
        TINY, engine=dataclasses.replace(TINY.engine, full=False, scores=(Score.LOGIT,), methods=(Method.GRAD_CAM,))
    )
    sent = request(
        smoothing=pb.Smoothing(augmentation=True, principal_component=True),
        faithfulness=faithfulness_pb2.FaithfulnessOptions(),
        target_score=method_pb2.TARGET_SCORE_PROBABILITY,
        aggregation=method_pb2.AGGREGATION_MAX,
    )
    assert fields(refusal(sent, exported)) == [
        "options.target_score",
        "options.aggregation",
        "options.smoothing.augmentation",
        "options.smoothing.principal_component",
        "options.faithfulness",
    ]
    assert fields(refusal(request(method=method_pb2.METHOD_FINER_CAM), exported)) == ["options.method"]


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


INTS = st.integers(-(2**31), 2**31 - 1)
SMALL = st.integers(-2, 12)
SIDES = st.integers(-1, 80) | st.integers(-(2**63), 2**63 - 1)


@st.composite
def images(draw) -> pb.Image | None:
    """Pixels with any shape, and as many bytes as it asks for or not."""
    shape = draw(st.lists(SIDES, max_size=5) | st.tuples(SIDES, SIDES, st.just(3)))
    needed_bytes = math.prod(shape)
    size_bytes = needed_bytes if 0 <= needed_bytes < 20_000 and draw(st.booleans()) else draw(st.integers(0, 100))
    tensor = pb.Tensor(data_type=draw(st.integers(-1, 4)), shape=shape, data=bytes(size_bytes))
    return draw(st.sampled_from([None, pb.Image(), pb.Image(pixels=tensor), pb.Image(pixels=tensor)]))


@st.composite
def requests(draw) -> pb.ExplainRequest:
    """Any request: most fields are valid, the others near the edge of it or far away."""

    def mostly(valid, wild):
        return draw(wild if draw(st.integers(0, 5)) == 5 else valid)

    top_k = mostly(st.integers(1, 4), SMALL | INTS)
    ids = mostly(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), st.lists(SMALL | INTS, max_size=6))
    target = draw(st.sampled_from([{}, {"top_k": top_k}, {"class_ids": pb.ClassIds(values=ids)}]))
    names = st.sampled_from(["body", "stem", "head"]) | st.text(max_size=100)
    options = pb.ExplainOptions(
        method=mostly(st.integers(0, 22), st.integers(-1, 26)),
        layers=mostly(st.sampled_from([[], ["body"], ["stem", "body"]]), st.lists(names, max_size=3)),
        map_size=mostly(st.integers(0, 3), st.integers(-1, 4)),
        map_type=mostly(st.integers(0, 3), st.integers(-1, 4)),
        top_predictions=mostly(st.integers(0, 10), SMALL | INTS),
        smoothing=draw(st.builds(pb.Smoothing, augmentation=st.booleans(), principal_component=st.booleans())),
        target_score=mostly(st.just(0), st.integers(-1, 5)),
        aggregation=mostly(st.just(0), st.integers(-1, 4)),
        faithfulness=mostly(
            st.just(None),
            st.builds(faithfulness_pb2.FaithfulnessOptions, metrics=st.lists(st.integers(-1, 11), max_size=4)),
        ),
        mask=mostly(st.just(None), st.just(pb.Tensor())),
        min_score=mostly(st.just(None), st.floats(0, 1)),
        return_mask=mostly(st.just(False), st.booleans()),
        **target,
    )
    return pb.ExplainRequest(image=mostly(st.sampled_from([PIXELS, pb.Image(encoded=b"")]), images()), options=options)


def wrong_fields(sent: pb.ExplainRequest) -> set[str]:
    """The contract's own words about each field, without a line of the server's."""
    options, pixels, offered = sent.options, sent.image.pixels, ["body", "stem"]
    ids, layers = list(options.class_ids.values), list(options.layers)
    kind, source = options.WhichOneof("target"), sent.image.WhichOneof("source")
    shape = list(pixels.shape)
    metrics = list(options.faithfulness.metrics)
    known = options.method in range(23) or options.method == method_pb2.METHOD_GUIDED_GRAD_CAM
    finer = options.method == method_pb2.METHOD_FINER_CAM
    refine = options.method == method_pb2.METHOD_REFINE_CAM
    # A method that is not known is refused, and the default, Grad-CAM, weights activations.
    weighted = not known or options.method == 0 or finer or refine or METHOD_FROM_PROTO[options.method] in WEIGHTED
    wrong = {
        "method": not known,
        "target_score": options.target_score not in range(5) or (finer and options.target_score not in (0, 4)),
        "aggregation": options.aggregation not in range(4) or (refine and options.aggregation not in (0, 3)),
        "faithfulness": len(set(metrics)) < len(metrics) or not set(metrics) <= set(range(1, 11)),
        "mask": options.HasField("mask"),
        "min_score": options.HasField("min_score"),
        "return_mask": options.return_mask,
        "layers": len(set(layers)) < len(layers)
        or not set(layers) <= set(offered)
        or (options.method == method_pb2.METHOD_CAM and layers not in ([], ["body"])),
        "top_k": kind == "top_k" and not 1 <= options.top_k <= 4,
        "class_ids": kind == "class_ids"
        and (not 1 <= len(ids) <= 4 or len(set(ids)) < len(ids) or any(not 0 <= i < 10 for i in ids)),
        "map_size": options.map_size not in range(4),
        "map_type": options.map_type not in range(4),
        "top_predictions": not 0 <= options.top_predictions <= 10,
        "smoothing": options.smoothing.principal_component and not weighted,
        "image": source is None
        or (
            source == "pixels"
            and not (
                pixels.data_type == pb.DATA_TYPE_UINT8
                and len(shape) == 3
                and shape[2] == 3
                and min(shape) >= 1
                and shape[0] * shape[1] <= LIMITS.max_image_pixels
                and shape[0] * shape[1] * 3 == len(pixels.data)
            )
        ),
    }
    return {name for name, is_wrong in wrong.items() if is_wrong}


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(sent=requests())
def test_exactly_the_wrong_fields_are_named(sent):
    try:
        command = parse_explain(pb.ExplainRequest.FromString(sent.SerializeToString()), TINY, LIMITS)
        named = []
        assert 1 <= command.plan.target_count <= LIMITS.max_targets
    except InvalidArgument as refused:
        named = fields(refused)
        to_wire(refused, "id")
    assert {re.split(r"[.\[]", field.removeprefix("options."))[0] for field in named} == wrong_fields(sent)
    for field in named:
        assert_path_exists(pb.ExplainRequest, field)
