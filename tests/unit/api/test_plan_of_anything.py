"""Any request at all, against the contract's own words about each field."""

import math
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from explain_requests import LIMITS, PIXELS, assert_path_exists, fields, plan_of
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2, method_pb2
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method
from heatlens_server.transports.grpc.requests import METHOD_FROM_PROTO
from heatlens_server.transports.grpc.status import to_wire

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
    method = METHOD_FROM_PROTO.get(options.method, Method.GRAD_CAM)
    weighted = not known or method.as_preset.method.traits.weights_activations
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
        plan = plan_of(pb.ExplainRequest.FromString(sent.SerializeToString()))
        named = []
        assert 1 <= plan.target_count <= LIMITS.max_targets
    except InvalidArgument as refused:
        named = fields(refused)
        to_wire(refused, "id")
    assert {re.split(r"[.\[]", field.removeprefix("options."))[0] for field in named} == wrong_fields(sent)
    for field in named:
        assert_path_exists(pb.ExplainRequest, field)
