"""The same cases through the sync client, the async client and raw stubs: the contract is the wire's, not the SDK's."""

import asyncio
from dataclasses import dataclass, field

import cv2
import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from heatlens import AsyncClient, Client, HeatlensError, PixelBox, place_map
from heatlens.v1 import explain_pb2, explain_pb2_grpc, model_pb2, model_pb2_grpc

FACES = ["sync", "async", "raw"]


@dataclass
class Answer:
    """An answer in a form that all three faces can give."""

    class_ids: list
    labels: list
    logits: list
    probabilities: list
    maps: list
    raws: list
    predictions: list
    region: tuple
    model: str
    batch_size: int


@dataclass
class Refused(Exception):
    """A failure in a form that all three faces can give."""

    code: str
    reason: str
    fields: list = field(default_factory=list)
    message: str = ""


class SdkFace:
    """The SDK. Cases are coroutines; the sync client runs in a thread."""

    def __init__(self, client):
        self.client = client

    async def explain(self, image, **options):
        try:
            answer = self.client.explain(image, **options)
            result = await answer if isinstance(self.client, AsyncClient) else answer
        except HeatlensError as error:
            fields = [violation.field for violation in error.field_violations]
            raise Refused(error.code.value, error.reason, fields, error.message) from None
        return Answer(
            class_ids=[item.class_id for item in result.explanations],
            labels=[item.label for item in result.explanations],
            logits=[item.logit for item in result.explanations],
            probabilities=[item.probability for item in result.explanations],
            maps=[item.heatmap.values for item in result.explanations],
            raws=[item.heatmap.raw() for item in result.explanations],
            predictions=[item.class_id for item in result.predictions],
            region=(
                result.source_region.left,
                result.source_region.top,
                result.source_region.right,
                result.source_region.bottom,
            ),
            model=result.model,
            batch_size=result.timing.batch_size,
        )


class SyncFace(SdkFace):
    async def explain(self, image, **options):
        return await asyncio.to_thread(lambda: asyncio.run(super(SyncFace, self).explain(image, **options)))


class RawFace:
    """Generated stubs and messages written by hand: what a client in another language would do."""

    def __init__(self, channel):
        self.stub = explain_pb2_grpc.ExplainServiceStub(channel)

    async def explain(
        self,
        image,
        *,
        model="",
        top_k=None,
        class_ids=None,
        method=None,
        layers=(),
        map_size=None,
        map_type=None,
        top_predictions=0,
        timeout=30,  # noqa: ASYNC109 - a gRPC deadline
    ):
        request = explain_pb2.ExplainRequest(model=model)
        if isinstance(image, bytes):
            request.image.encoded = image
        else:
            request.image.pixels.data_type = explain_pb2.DATA_TYPE_UINT8
            request.image.pixels.shape.extend(image.shape)
            request.image.pixels.data = image.tobytes()
        options = request.options
        if top_k is not None:
            options.top_k = top_k
        if class_ids is not None:
            options.class_ids.values.extend(class_ids)
        if method:
            options.method = explain_pb2.Method.Value("METHOD_" + method.upper().replace("-", "_"))
        options.layers.extend(layers)
        if map_size:
            options.map_size = explain_pb2.MapSize.Value("MAP_SIZE_" + map_size.upper())
        if map_type:
            options.map_type = explain_pb2.DataType.Value("DATA_TYPE_" + map_type.upper())
        options.top_predictions = top_predictions
        try:
            response = await self.stub.Explain(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise self.refused(error) from None
        maps = [self.map_of(item.map) for item in response.explanations]
        box = response.source_region
        return Answer(
            class_ids=[item.class_id for item in response.explanations],
            labels=[item.label for item in response.explanations],
            logits=[item.logit for item in response.explanations],
            probabilities=[item.probability for item in response.explanations],
            maps=maps,
            raws=[
                values * np.float32(item.map_scale) + np.float32(item.map_offset)
                for values, item in zip(maps, response.explanations, strict=True)
            ],
            predictions=[item.class_id for item in response.predictions],
            region=(box.left, box.top, box.right, box.bottom),
            model=response.model,
            batch_size=response.timing.batch_size,
        )

    @staticmethod
    def map_of(tensor):
        kinds = {
            explain_pb2.DATA_TYPE_FLOAT32: "<f4",
            explain_pb2.DATA_TYPE_FLOAT16: "<f2",
            explain_pb2.DATA_TYPE_UINT8: "u1",
        }
        stored = np.frombuffer(tensor.data, kinds[tensor.data_type]).reshape(tuple(tensor.shape))
        return stored.astype(np.float32) / (255 if stored.dtype == np.uint8 else 1)

    @staticmethod
    def refused(error):
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        status = rpc_status.from_call(error)
        assert status is not None, "every error has details"
        for detail in status.details:
            detail.Unpack(info) or detail.Unpack(bad)
        assert info.domain == "heatlens"
        fields = [violation.field for violation in bad.field_violations]
        return Refused(error.code().name, info.reason, fields, error.details())


@pytest.fixture(params=FACES)
async def face(request, server):
    if request.param == "raw":
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield RawFace(channel)
    elif request.param == "async":
        async with AsyncClient(server.address) as client:
            yield SdkFace(client)
    else:
        with Client(server.address) as client:
            yield SyncFace(client)


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


async def test_default_is_the_top_class(face, photo):
    answer = await face.explain(photo, top_predictions=3)
    assert answer.model == "tiny"
    assert answer.class_ids == answer.predictions[:1]
    assert len(answer.predictions) == 3
    assert answer.batch_size >= 1
    assert_is_map(answer.maps[0])
    # ReLU, then min-max: the raw map is not negative and the normalised one is 0 or reaches 1.
    assert answer.raws[0].min() >= -1e-6
    assert answer.maps[0].max() in {0.0, 1.0}


async def test_top_k_is_in_order_of_probability(face, photo):
    answer = await face.explain(photo, top_k=4, top_predictions=4)
    assert answer.class_ids == answer.predictions
    assert answer.logits == sorted(answer.logits, reverse=True)
    assert all(0 <= probability <= 1 for probability in answer.probabilities)


async def test_class_ids_are_in_the_order_asked_for(face, photo):
    answer = await face.explain(photo, class_ids=[5, 0, 3])
    assert answer.class_ids == [5, 0, 3]
    assert len(answer.maps) == 3


async def test_every_class_id_of_top_k_gets_the_same_map_when_asked_for(face, photo):
    top = await face.explain(photo, top_k=3)
    same = await face.explain(photo, class_ids=top.class_ids)
    for first, second in zip(top.maps, same.maps, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


async def test_encoded_and_pixels_agree(face, chelsea):
    png = cv2.imencode(".png", chelsea[:, :, ::-1])[1].tobytes()
    encoded, pixels = await face.explain(png, top_k=2), await face.explain(chelsea, top_k=2)
    assert encoded.class_ids == pixels.class_ids
    for first, second in zip(encoded.maps, pixels.maps, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


async def test_every_method_of_the_model(face, photo, tiny):
    assert "grad-cam" in tiny.methods
    for method in tiny.methods:
        assert_is_map((await face.explain(photo, method=method)).maps[0])


async def test_every_layer_of_the_model(face, photo, tiny):
    for layer in tiny.layers:
        assert_is_map((await face.explain(photo, method="grad-cam", layers=[layer])).maps[0])


async def test_map_sizes(face, photo, tiny):
    layer = await face.explain(photo, map_size="layer")
    placed = await face.explain(photo, map_size="source")
    of_input = await face.explain(photo, map_size="input")
    assert_is_map(of_input.maps[0], (tiny.input_height_px, tiny.input_width_px))
    assert_is_map(placed.maps[0], (300, 451))
    assert layer.maps[0].size < of_input.maps[0].size
    # The server places the map of the input's size, with the code that clients have too.
    expected = place_map(of_input.maps[0], PixelBox(*of_input.region), (451, 300))
    np.testing.assert_allclose(placed.maps[0], expected, atol=1e-4)
    assert layer.region == of_input.region == placed.region


async def test_source_region_lies_in_the_image(face, photo):
    left, top, right, bottom = (await face.explain(photo)).region
    assert 0 <= left < right <= 451
    assert 0 <= top < bottom <= 300


@pytest.mark.parametrize(("map_type", "tolerance"), [("float16", 1e-3), ("uint8", 0.51 / 255)])
async def test_map_types(face, photo, map_type, tolerance):
    exact = await face.explain(photo, map_size="input")
    small = await face.explain(photo, map_size="input", map_type=map_type)
    np.testing.assert_allclose(small.maps[0], exact.maps[0], atol=tolerance + 1e-5)


async def test_concurrent_calls_get_their_own_answers(face, chelsea):
    images = [np.ascontiguousarray(np.roll(chelsea, 40 * i, axis=1)) for i in range(8)]
    alone = [await face.explain(image, top_k=2) for image in images]
    together = await asyncio.gather(*(face.explain(image, top_k=2) for image in images))
    for one, other in zip(alone, together, strict=True):
        assert one.class_ids == other.class_ids
        for first, second in zip(one.maps, other.maps, strict=True):
            np.testing.assert_allclose(first, second, atol=1e-4)


async def test_unknown_model(face, photo):
    with pytest.raises(Refused) as caught:
        await face.explain(photo, model="nope")
    assert (caught.value.code, caught.value.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert "tiny" in caught.value.message


async def test_failed_model(face, photo):
    with pytest.raises(Refused) as caught:
        await face.explain(photo, model="broken")
    assert (caught.value.code, caught.value.reason) == ("FAILED_PRECONDITION", "MODEL_FAILED")


@pytest.mark.parametrize("garbage", [b"garbage", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n" + bytes(100)])
async def test_undecodable_image(face, garbage):
    with pytest.raises(Refused) as caught:
        await face.explain(garbage)
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "IMAGE_UNDECODABLE")
    assert caught.value.fields == ["image.encoded"]


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
async def test_wrong_options_are_named(face, photo, options, path):
    with pytest.raises(Refused) as caught:
        await face.explain(photo, **options)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert path in caught.value.fields


async def test_wrong_calls_do_not_harm_the_next(face, photo):
    for _ in range(3):
        with pytest.raises(Refused):
            await face.explain(b"garbage")
    assert_is_map((await face.explain(photo)).maps[0])


async def test_the_embedded_model_sees_a_cat(face, photo):
    answer = await face.explain(photo, model="efficientnet_lite0", top_k=3)
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
