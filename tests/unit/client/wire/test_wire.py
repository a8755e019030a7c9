"""Requests and answers, without a channel."""

import inspect
import math
import re
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from heatlens import Client, InternalError, InvalidArgumentError, PixelBox
from heatlens._cli.explain import explain
from heatlens._cli.video import video
from heatlens._wire.answers import map_values, result_of
from heatlens._wire.arguments import checked_timeout
from heatlens._wire.names import AGGREGATIONS, DIRECTIONS, MAP_SIZES, MAP_TYPES, METHODS, METRICS, TARGET_SCORES
from heatlens._wire.requests import OPTIONS, ExplainOptions, MapOptions, check_size, explain_request, health_request
from heatlens._wire.streams import answer_of, stream_plan
from heatlens.v1 import explain_pb2, faithfulness_pb2, method_pb2


def tensor(data, data_type=explain_pb2.DATA_TYPE_FLOAT32, shape=None):
    return explain_pb2.Tensor(
        data_type=data_type, shape=data.shape if shape is None else shape, data=np.ascontiguousarray(data).tobytes()
    )


def test_nothing_set_is_an_empty_request():
    request = explain_request(b"x")
    assert request == explain_pb2.ExplainRequest(
        image=explain_pb2.Image(encoded=b"x"), options=explain_pb2.ExplainOptions()
    )
    assert request.options.WhichOneof("target") is None


def test_pixels_travel_as_a_tensor(pixels):
    sent = explain_request(pixels[:, :2]).image.pixels
    assert sent.data_type == explain_pb2.DATA_TYPE_UINT8
    assert list(sent.shape) == [4, 2, 3]
    assert sent.data == pixels[:, :2].tobytes()


@pytest.mark.parametrize(
    ("given", "sent"),
    [(3, [3]), ([3, 1], [3, 1]), ((0,), [0]), (np.array([4, 2]), [4, 2]), (np.int64(7), [7]), (np.array(6), [6])],
)
def test_class_ids(given, sent):
    assert list(explain_request(b"x", class_ids=given).options.class_ids.values) == sent


@pytest.mark.parametrize(
    ("given", "ids", "labels"),
    [("tabby", [], ["tabby"]), (["tabby", 3, "7"], [3], ["tabby", "7"]), (np.array(["a", "b"]), [], ["a", "b"])],
)
def test_classes_by_label(given, ids, labels):
    sent = explain_request(b"x", class_ids=given).options.class_ids
    assert (list(sent.values), list(sent.labels)) == (ids, labels)


def test_a_version_is_a_text():
    assert explain_request(b"x", model="m", version="2").model_version == "2"
    for version in (2, "\ud800"):
        with pytest.raises(InvalidArgumentError, match="version"):
            explain_request(b"x", version=version)


def test_options_by_name():
    options = explain_request(
        b"x", model="m", method="layer-cam", layers=["a", "b"], map_size="source", map_type="uint8", top_predictions=0
    ).options
    assert options.method == method_pb2.METHOD_LAYER_CAM
    assert list(options.layers) == ["a", "b"]
    assert options.map_size == explain_pb2.MAP_SIZE_SOURCE
    assert options.map_type == explain_pb2.DATA_TYPE_UINT8


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_masks_of_pillow(mode):
    levels = np.array([[0, 255], [0, 0]], np.uint8)
    image = Image.fromarray(levels).convert(mode)
    if mode == "P":
        # Another palette: what counts is the index.
        image.putpalette([255, 255, 255] + [0, 0, 0] * 255)
    sent = explain_request(b"x", mask=image).options.mask
    assert (list(sent.shape), sent.data) == ([2, 2], bytes([0, 1, 0, 0]))


def test_options_of_scores_and_smoothing():
    options = explain_request(
        b"x",
        target_score="log-probability",
        aggregation="max",
        augment=True,
        principal_component=np.True_,
        direction="decrease",
    ).options
    assert options.target_score == method_pb2.TARGET_SCORE_LOG_PROBABILITY
    assert options.aggregation == method_pb2.AGGREGATION_MAX
    assert options.smoothing.augmentation
    assert options.smoothing.principal_component
    assert options.direction == explain_pb2.DIRECTION_DECREASE


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (True, []),
        ("sparseness", [faithfulness_pb2.FAITHFULNESS_METRIC_SPARSENESS]),
        (
            ("insertion", "road-combined"),
            [faithfulness_pb2.FAITHFULNESS_METRIC_INSERTION, faithfulness_pb2.FAITHFULNESS_METRIC_ROAD_COMBINED],
        ),
    ],
)
def test_faithfulness_by_name(given, sent):
    options = explain_request(b"x", faithfulness=given).options
    assert options.HasField("faithfulness")
    assert list(options.faithfulness.metrics) == sent
    for nothing in (False, None):
        assert not explain_request(b"x", faithfulness=nothing).options.HasField("faithfulness")


def test_options_of_tasks(tmp_path):
    options = explain_request(b"x", min_score=0, return_mask=True).options
    assert options.HasField("min_score")
    assert options.min_score == 0
    assert options.return_mask
    mask = np.array([[0, 7, 0], [0, 0, 200]], np.uint8)
    (tmp_path / "mask.png").write_bytes(cv2.imencode(".png", mask)[1].tobytes())
    for given in (mask, mask != 0, mask.astype(np.int64), tmp_path / "mask.png"):
        sent = explain_request(b"x", mask=given).options.mask
        assert sent == tensor(np.array([[0, 1, 0], [0, 0, 1]], np.uint8), explain_pb2.DATA_TYPE_UINT8)


def test_a_reference_may_be_a_batch_of_one():
    one = explain_request(b"x", reference=np.array([[1, 0.5]])).options.reference_embedding
    assert one == explain_request(b"x", reference=[[1, 0.5]]).options.reference_embedding
    assert one == tensor(np.array([1, 0.5], "<f4"))


def test_references(pixels, tmp_path):
    for given in ([1, 0.5], (1.0, 0.5), np.array([1, 0.5], ">f8"), np.array([1, 0.5], np.float16)):
        options = explain_request(b"x", reference=given).options
        assert options.reference_embedding == tensor(np.array([1, 0.5], "<f4"))
    assert explain_request(b"x", reference=pixels).options.reference_image.pixels.data == pixels.tobytes()
    (tmp_path / "other.jpg").write_bytes(b"whatever")
    for given in (tmp_path / "other.jpg", str(tmp_path / "other.jpg"), b"whatever"):
        assert explain_request(b"x", reference=given).options.reference_image.encoded == b"whatever"


def test_names_are_derived_from_the_enums():
    for names, enum, prefix in (
        (TARGET_SCORES, method_pb2.TargetScore, "TARGET_SCORE_"),
        (AGGREGATIONS, method_pb2.Aggregation, "AGGREGATION_"),
        (METRICS, faithfulness_pb2.FaithfulnessMetric, "FAITHFULNESS_METRIC_"),
        (METHODS, method_pb2.Method, "METHOD_"),
        (MAP_SIZES, explain_pb2.MapSize, "MAP_SIZE_"),
        (DIRECTIONS, explain_pb2.Direction, "DIRECTION_"),
    ):
        assert {prefix + name.upper().replace("-", "_"): number for name, number in names.items()} == {
            name: number for name, number in enum.items() if number
        }
    # Maps are of some of the types that tensors have.
    assert {explain_pb2.DataType.Name(number) for number in MAP_TYPES.values()} == {
        f"DATA_TYPE_{name.upper()}" for name in MAP_TYPES
    }


WRONG = {
    "top_k": [0, -1, 2**31, 1.0, True, "3"],
    "class_ids": [
        -1,
        [],
        [1.5],
        "",
        "\ud800",
        ["a", ""],
        ["a", None],
        [2**31],
        b"12",
        np.array(1.5),
        np.zeros((2, 2), int),
    ],
    "method": ["gradcam", "unspecified", 2],
    "layers": [[], [""], "", [3], 5, b"ab", "\ud800", ["a", "\ud800"]],
    "map_size": ["big"],
    "map_type": ["float64"],
    "top_predictions": [-1],
    "model": [3, "\ud800"],
    "target_score": ["loss"],
    "aggregation": ["sum"],
    "augment": [1, None],
    "principal_component": ["yes"],
    "direction": ["up", 1],
    "faithfulness": ["roar", [], 3, ["deletion", None], ["deletion", "deletion"]],
    "min_score": [1.5, "0.5", float("nan")],
    "return_mask": ["yes"],
    "mask": [np.zeros((4, 4), bool), np.ones((4, 4, 3), np.uint8), np.ones((4, 4)), b"no image", b"", 5],
    "reference": [
        [0.0, 0.0],
        [1.0, float("nan")],
        [1e300, 1.0],
        [],
        ["a"],
        np.ones(3, complex),
        np.zeros((2, 2)),
        b"",
        5,
    ],
}


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_arguments_are_named(argument, value):
    with pytest.raises(InvalidArgumentError) as caught:
        explain_request(b"x", **{argument: value})
    assert caught.value.field_violations[0].field == argument
    assert str(caught.value).startswith(f"{argument}: ")
    assert caught.value.request_id is None


def test_every_option_has_a_row():
    assert set(OPTIONS) == ExplainOptions.__optional_keys__
    names = {field.name for field in explain_pb2.ExplainOptions.DESCRIPTOR.fields}
    sent = {option.field.partition(".")[0] for option in OPTIONS.values() if option.field}
    assert sent | {"reference_embedding", "reference_image"} == names


def test_every_option_is_documented_where_it_is_taken():
    def documented(function):
        return set(re.findall(r"^ +(\w+): ", function.__doc__, re.MULTILINE))

    assert set(OPTIONS) <= documented(Client.explain)
    assert MapOptions.__optional_keys__ <= documented(Client.stream)


def test_every_option_is_on_the_command_line():
    assert set(OPTIONS) - {"map_type"} <= set(inspect.signature(explain).parameters)
    only_in_the_sdk = {"map_size", "map_type"}
    assert MapOptions.__optional_keys__ - only_in_the_sdk <= set(inspect.signature(video).parameters)


@pytest.mark.parametrize("name", ["topk", "overflow", "image_"])
def test_unknown_options_are_refused_as_by_any_function(name):
    with pytest.raises(TypeError, match=rf"^Client\.explain\(\) got an unexpected keyword argument '{name}'$"):
        explain_request(b"x", **{name: None})


@pytest.mark.parametrize("name", ["mask", "faithfulness", "on_progress"])
def test_streams_have_no_other_options(name):
    with pytest.raises(TypeError, match=rf"^Client\.stream\(\) got an unexpected keyword argument '{name}'"):
        stream_plan(max_message_bytes=1000, **{name: None})


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), "3", True, 1e10, 1.001e9, 10**400])
def test_wrong_timeouts(timeout):
    with pytest.raises(InvalidArgumentError, match="timeout"):
        checked_timeout(timeout)


def test_right_timeouts():
    assert checked_timeout(None) is None
    assert checked_timeout(0.5) == 0.5
    assert checked_timeout(1e9) == 1e9


def test_check_size_counts_the_whole_message():
    request = explain_request(b"x" * 100)
    check_size(request, request.ByteSize())
    with pytest.raises(InvalidArgumentError, match="image"):
        check_size(request, request.ByteSize() - 1)


def test_health_services():
    assert health_request(None).service == ""
    assert health_request("a/b").service == "heatlens.v1.ExplainService/a/b"
    for model in (5, "\ud800"):
        with pytest.raises(InvalidArgumentError, match="model"):
            health_request(model)


@pytest.mark.parametrize(
    ("element", "data_type", "tolerance"),
    [
        ("<f4", explain_pb2.DATA_TYPE_FLOAT32, 0),
        ("<f2", explain_pb2.DATA_TYPE_FLOAT16, 5e-4),
        ("u1", explain_pb2.DATA_TYPE_UINT8, 0.5 / 255 + 1e-6),
    ],
)
def test_maps_of_every_type(element, data_type, tolerance):
    values = np.random.default_rng(0).random((5, 7), dtype=np.float32)
    stored = np.rint(values * 255).astype("u1") if element == "u1" else values.astype(element)
    read = map_values(tensor(stored, data_type))
    assert read.dtype == np.float32
    assert read.shape == (5, 7)
    assert not read.flags.writeable
    np.testing.assert_allclose(read, values, atol=tolerance)


def test_uint8_reaches_both_ends():
    read = map_values(tensor(np.array([[0, 255]], np.uint8), explain_pb2.DATA_TYPE_UINT8))
    assert read.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    "broken",
    [
        explain_pb2.Tensor(),
        tensor(np.zeros((2, 2), "<f4"), 99),
        tensor(np.zeros((2, 2), "<f4"), shape=[4]),
        tensor(np.zeros((2, 2), "<f4"), shape=[2, 3]),
        tensor(np.zeros((2, 2), "<f4"), shape=[-2, -2]),
        tensor(np.zeros((2, 2), "<f4"), shape=[0, 2]),
        tensor(np.zeros((2, 2), "<f4"), shape=[1 << 40, 1 << 40]),
        tensor(np.array([[0.0, np.nan]], "<f4")),
        tensor(np.array([[0.0, np.inf]], "<f4")),
        tensor(np.array([[-1.0, 0.0]], "<f4")),
        tensor(np.array([[0.0, 2.0]], "<f2"), explain_pb2.DATA_TYPE_FLOAT16),
    ],
)
def test_broken_maps_are_the_servers_fault(broken):
    with pytest.raises(InternalError) as caught:
        map_values(broken)
    assert caught.value.reason == "INVALID_RESPONSE"


def test_result():
    response = explain_pb2.ExplainResponse(
        explanations=[
            explain_pb2.Explanation(class_id=1, map=tensor(np.ones((1, 1), "<f4")), map_scale=3, map_offset=1)
        ],
        predictions=[explain_pb2.ClassScore(class_id=9, label="dog", logit=1.5, probability=0.5)],
        source_region=explain_pb2.PixelBox(left=1, top=2, right=3, bottom=4),
        model="m",
        model_version="v",
        source_width_px=5,
        source_height_px=7,
        warnings=["dark", "small"],
    )
    response.timing.queue_duration.FromMicroseconds(1500)
    response.timing.compute_duration.FromSeconds(2)
    response.timing.batch_size = 4
    result = result_of(response, placed=False)
    assert result.source_region == PixelBox(1, 2, 3, 4)
    assert result.explanations[0].heatmap.region == result.source_region
    assert result.explanations[0].heatmap.raw().tolist() == [[4.0]]
    assert result.source_size == result.explanations[0].heatmap.source_size == (5, 7)
    assert result.predictions[0].label == "dog"
    assert result.warnings == ("dark", "small")
    assert (result.timing.queue_ms, result.timing.compute_ms, result.timing.batch_size) == (1.5, 2000.0, 4)
    assert not result.explanations[0].heatmap.placed
    response.explanations[0].map.CopyFrom(tensor(np.ones((7, 5), "<f4")))
    assert result_of(response, placed=True).explanations[0].heatmap.placed


def sound_response() -> explain_pb2.ExplainResponse:
    return explain_pb2.ExplainResponse(
        explanations=[explain_pb2.Explanation(map=tensor(np.ones((7, 5), "<f4")), map_scale=1)],
        predictions=[explain_pb2.ClassScore(class_id=9)],
        source_region=explain_pb2.PixelBox(right=5, bottom=7),
        source_width_px=5,
        source_height_px=7,
    )


def _set(path: str, value: float) -> Callable[[explain_pb2.ExplainResponse], None]:
    """What changes one field of a response: `_set("explanations.0.map_scale", 1.0)`."""

    def change(response: explain_pb2.ExplainResponse) -> None:
        *parents, last = path.split(".")
        message = response
        for name in parents:
            message = message[int(name)] if name.isdigit() else getattr(message, name)
        setattr(message, last, value)

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("source_width_px", 2**31 - 1),
        ("source_width_px", 89_000_000),
        ("source_height_px", -1),
        ("source_width_px", 6),
        ("source_region.left", math.nan),
        ("source_region.right", math.inf),
        ("source_region.bottom", 1e30),
        ("source_region.left", 5.0),
        ("explanations.0.map_scale", math.nan),
        ("explanations.0.map_offset", math.inf),
        ("explanations.0.logit", math.nan),
        ("explanations.0.value", math.inf),
        ("explanations.0.box.left", math.nan),
        ("predictions.0.probability", math.nan),
    ],
)
def test_numbers_that_no_image_and_no_score_can_have_are_the_servers_fault_at_the_answer(path, value):
    response = sound_response()
    result_of(response, placed=True)
    _set(path, value)(response)
    with pytest.raises(InternalError, match="the server sent") as caught:
        result_of(response, placed=True)
    assert caught.value.reason == "INVALID_RESPONSE"
    # Of a stream it is that frame's error.
    streamed = explain_pb2.StreamExplainResponse(frame_id=3, result=response)
    answer = answer_of(streamed, stream_plan(max_message_bytes=1 << 20, map_size="source"), "id")
    assert (answer.frame_id, answer.error.reason, answer.error.request_id) == (3, "INVALID_RESPONSE", "id")


def test_an_embedding_that_is_not_finite_is_the_servers_fault():
    response = explain_pb2.ExplainResponse(embedding=tensor(np.array([np.nan], "<f4")))
    with pytest.raises(InternalError, match="embedding"):
        result_of(response, placed=False)


def test_an_older_server_does_not_say_the_size():
    result = result_of(explain_pb2.ExplainResponse(source_height_px=3), placed=False)
    assert result.source_size is None
