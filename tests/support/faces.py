"""Three ways to call a server, with one form of answer: the sync client, the async client and raw stubs."""

import asyncio
from dataclasses import dataclass, field

import grpc
import grpc.aio
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from heatlens import AsyncClient, HeatlensError
from heatlens.v1 import explain_pb2, explain_pb2_grpc


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
