"""The same cases through the sync client, the async client and raw stubs: the contract is the wire's, not the SDK's."""

import asyncio

import cv2
import grpc
import numpy as np
import pytest

from callers import Refused
from heatlens import Client, InvalidArgumentError, PixelBox, place_map
from heatlens.v1 import model_pb2, model_pb2_grpc


@pytest.fixture(scope="session")
def photo(chelsea):
    """A JPEG of the cat, 451x300."""
    return cv2.imencode(".jpg", chelsea[:, :, ::-1])[1].tobytes()


@pytest.fixture(scope="session")
def tiny(server):
    with Client(server.address) as client:
        (tiny,) = [model for model in client.models() if model.name == "tiny"]
    return tiny


def assert_is_map(values, shape=None):
    assert values.dtype == np.float32
    assert values.ndim == 2
    if shape is not None:
        assert values.shape == shape
    assert values.min() >= 0
    assert values.max() <= 1


async def test_default_is_the_top_class(caller, photo):
    answer = await caller.explain(photo, top_predictions=3)
    assert answer.model == "tiny"
    assert answer.class_ids == answer.predictions[:1]
    assert len(answer.predictions) == 3
    assert answer.batch_size >= 1
    assert_is_map(answer.maps[0])
    # ReLU, then min-max: the raw map is not negative and the normalised one is 0 or reaches 1.
    assert answer.raws[0].min() >= -1e-6
    assert answer.maps[0].max() in {0.0, 1.0}


async def test_top_k_is_in_order_of_probability(caller, photo):
    answer = await caller.explain(photo, top_k=4, top_predictions=4)
    assert answer.class_ids == answer.predictions
    assert answer.logits == sorted(answer.logits, reverse=True)
    assert all(0 <= probability <= 1 for probability in answer.probabilities)


async def test_class_ids_are_in_the_order_asked_for(caller, photo):
    answer = await caller.explain(photo, class_ids=[5, 0, 3])
    assert answer.class_ids == [5, 0, 3]
    assert len(answer.maps) == 3


async def test_every_class_id_of_top_k_gets_the_same_map_when_asked_for(caller, photo):
    top = await caller.explain(photo, top_k=3)
    same = await caller.explain(photo, class_ids=top.class_ids)
    for first, second in zip(top.maps, same.maps, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


async def test_encoded_and_pixels_agree(caller, chelsea):
    png = cv2.imencode(".png", chelsea[:, :, ::-1])[1].tobytes()
    encoded, pixels = await caller.explain(png, top_k=2), await caller.explain(chelsea, top_k=2)
    assert encoded.class_ids == pixels.class_ids
    for first, second in zip(encoded.maps, pixels.maps, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


async def test_every_method_of_the_model(caller, photo, tiny):
    assert "grad-cam" in tiny.methods
    for method in tiny.methods:
        assert_is_map((await caller.explain(photo, method=method)).maps[0])


async def test_every_layer_of_the_model(caller, photo, tiny):
    for layer in tiny.layers:
        assert_is_map((await caller.explain(photo, method="grad-cam", layers=[layer])).maps[0])


async def test_map_sizes(caller, photo, tiny):
    layer = await caller.explain(photo, map_size="layer")
    placed = await caller.explain(photo, map_size="source")
    of_input = await caller.explain(photo, map_size="input")
    assert_is_map(of_input.maps[0], (tiny.input_height_px, tiny.input_width_px))
    assert_is_map(placed.maps[0], (300, 451))
    assert layer.maps[0].size < of_input.maps[0].size
    # The server places the map of the input's size, with the code that clients have too.
    expected = place_map(of_input.maps[0], PixelBox(*of_input.region), (451, 300))
    np.testing.assert_allclose(placed.maps[0], expected, atol=1e-4)
    assert layer.region == of_input.region == placed.region


async def test_source_region_lies_in_the_image(caller, photo):
    left, top, right, bottom = (await caller.explain(photo)).region
    assert 0 <= left < right <= 451
    assert 0 <= top < bottom <= 300


@pytest.mark.parametrize(("map_type", "tolerance"), [("float16", 1e-3), ("uint8", 0.51 / 255)])
async def test_map_types(caller, photo, map_type, tolerance):
    exact = await caller.explain(photo, map_size="input")
    small = await caller.explain(photo, map_size="input", map_type=map_type)
    np.testing.assert_allclose(small.maps[0], exact.maps[0], atol=tolerance + 1e-5)


async def test_concurrent_calls_get_their_own_answers(caller, chelsea):
    images = [np.ascontiguousarray(np.roll(chelsea, 40 * i, axis=1)) for i in range(8)]
    alone = [await caller.explain(image, top_k=2) for image in images]
    together = await asyncio.gather(*(caller.explain(image, top_k=2) for image in images))
    for one, other in zip(alone, together, strict=True):
        assert one.class_ids == other.class_ids
        for first, second in zip(one.maps, other.maps, strict=True):
            np.testing.assert_allclose(first, second, atol=1e-4)


async def test_unknown_model(caller, photo):
    with pytest.raises(Refused) as caught:
        await caller.explain(photo, model="nope")
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert "tiny" in caught.value.message


async def test_failed_model(caller, photo):
    with pytest.raises(Refused) as caught:
        await caller.explain(photo, model="broken")
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "MODEL_FAILED")


@pytest.mark.parametrize("garbage", [b"garbage", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n" + bytes(100)])
async def test_undecodable_image(caller, garbage):
    with pytest.raises(Refused) as caught:
        await caller.explain(garbage)
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "IMAGE_UNDECODABLE")
    assert caught.value.fields == [caller.field_name("image.encoded")]


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"top_k": 10**6}, "options.top_k"),
        ({"class_ids": [10**6]}, "options.class_ids.values[0]"),
        ({"class_ids": [1, 1]}, "options.class_ids.values[1]"),
        ({"layers": ["nope"]}, "options.layers[0]"),
        ({"top_predictions": 10**6}, "options.top_predictions"),
        ({"model": "tiny_mlp", "method": "cam"}, "options.method"),
    ],
)
async def test_wrong_options_are_named(caller, photo, options, path):
    with pytest.raises(Refused) as caught:
        await caller.explain(photo, **options)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caller.field_name(path) in caught.value.fields


async def test_wrong_calls_do_not_harm_the_next(caller, photo):
    for _ in range(3):
        with pytest.raises(Refused):
            await caller.explain(b"garbage")
    assert_is_map((await caller.explain(photo)).maps[0])


async def test_the_embedded_model_sees_a_cat(caller, photo):
    answer = await caller.explain(photo, model="efficientnet_lite0", top_k=3)
    assert "cat" in " ".join(answer.labels).lower()
    assert_is_map(answer.maps[0])


def test_models_and_limits_are_told_alike(server):
    with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        raw = stub.ListModels(model_pb2.ListModelsRequest())
        info = stub.GetServerInfo(model_pb2.GetServerInfoRequest())
        models, limits = client.models(), client.server_info()
    assert [model.name for model in models] == [model.name for model in raw.models]
    assert [model.name for model in models if model.is_default] == [raw.default_model]
    by_name = {model.name: model for model in models}
    assert by_name["tiny"].state == "ready"
    assert by_name["broken"].state == "failed"
    assert by_name["broken"].state_message
    assert by_name["tiny"].default_method in by_name["tiny"].methods
    assert (limits.version, limits.max_message_bytes, limits.max_targets) == (
        info.version,
        info.max_message_bytes,
        info.max_targets,
    )
    assert (limits.max_image_parts, limits.max_image_samples) == (1_000, 32 * limits.max_image_pixels)
    assert (info.max_image_parts, info.max_image_samples) == (1_000, 32 * info.max_image_pixels)
    assert info.max_model_runs == limits.max_model_runs == 100_000


def test_the_answer_says_the_size_of_the_upright_image(server, chelsea):
    # EXIF orientation 6: the camera was turned by 90 degrees.
    jpeg = cv2.imencode(".jpg", chelsea)[1].tobytes()
    tiff = b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06" + bytes(7)
    turned = jpeg[:2] + b"\xff\xe1" + (len(tiff) + 8).to_bytes(2, "big") + b"Exif\x00\x00" + tiff + jpeg[2:]
    with Client(server.address) as client:
        upright, portrait = client.explain(jpeg), client.explain(turned)
    assert (upright.source_size, portrait.source_size) == ((451, 300), (300, 451))
    heatmap = portrait.explanations[0].heatmap
    assert heatmap.on().shape == (451, 300)
    assert heatmap.overlay(turned).shape == (451, 300, 3)
    with pytest.raises(InvalidArgumentError, match="300x451 pixels, got 451x300"):
        heatmap.overlay(jpeg)


@pytest.mark.parametrize("shape", [(5000, 1, 3), (1, 5000, 3)])
def test_a_picture_one_pixel_wide_gets_a_map(server, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with Client(server.address) as client:
        asked = {"model": "tiny", "top_k": 10}
        at_input, at_source = (client.explain(pixels, map_size=size, **asked) for size in ("input", "source"))
    assert at_input.source_size == shape[1::-1]
    seen = 0
    for first, second in zip(at_input.explanations, at_source.explanations, strict=True):
        np.testing.assert_allclose(first.heatmap.on(), second.heatmap.values, atol=1e-6)
        seen += second.heatmap.values.any()
    assert seen > 0


def test_the_longest_timeout_is_as_good_as_none(server, photo):
    with Client(server.address, timeout=1e9) as client:
        assert client.explain(photo).model == "tiny"
