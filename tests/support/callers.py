"""Three ways to call a server, with one form of answer: the sync client, the async client and raw stubs."""

import asyncio
from dataclasses import dataclass, field

import grpc
import grpc.aio
import numpy as np
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from heatlens import HeatlensError
from heatlens._wire.field_names import argument_of
from heatlens.v1 import explain_pb2, explain_pb2_grpc, method_pb2


@dataclass
class Answer:
    """An answer in a form that all three callers can give."""

    class_ids: list
    labels: list
    logits: list
    probabilities: list
    maps: list
    raws: list
    predictions: list
    region: tuple
    model: str
    model_version: str
    batch_size: int


@dataclass
class StreamAnswer:
    """The answer for one frame: of the last three, one is set."""

    frame_id: int
    answer: Answer | None = None
    refused: "Refused | None" = None
    skipped: bool = False


@dataclass
class Refused(Exception):
    """A failure in a form that all three callers can give."""

    code: str
    reason: str
    fields: list = field(default_factory=list)
    message: str = ""


class AsyncCaller:
    """The SDK: an AsyncClient, or a client for threads with its methods."""

    # What it calls a field of the protocol.
    field_name = staticmethod(argument_of)

    def __init__(self, client):
        self.client = client

    async def explain(self, image, **options):
        try:
            return answer_of_sdk(await self.client.explain(image, **options))
        except HeatlensError as error:
            raise refused_by_sdk(error) from None

    async def stream(self, frames, **options):
        """The window in force, and one StreamAnswer for each frame."""
        try:
            async with self.client.stream(**options) as stream:
                return stream.window, [stream_answer_of_sdk(item) async for item in stream.map(frames)]
        except HeatlensError as error:
            raise refused_by_sdk(error) from None


def refused_by_sdk(error):
    fields = [violation.field for violation in error.field_violations]
    return Refused(error.code.value, error.reason, fields, error.message)


def stream_answer_of_sdk(item):
    return StreamAnswer(
        frame_id=item.frame_id,
        answer=item.result and answer_of_sdk(item.result),
        refused=item.error and refused_by_sdk(item.error),
        skipped=item.skipped,
    )


def answer_of_sdk(result):
    region = result.source_region
    return Answer(
        class_ids=[item.class_id for item in result.explanations],
        labels=[item.label for item in result.explanations],
        logits=[item.logit for item in result.explanations],
        probabilities=[item.probability for item in result.explanations],
        maps=[item.heatmap.values for item in result.explanations],
        raws=[item.heatmap.raw() for item in result.explanations],
        predictions=[item.class_id for item in result.predictions],
        region=(region.left, region.top, region.right, region.bottom),
        model=result.model,
        model_version=result.model_version,
        batch_size=result.timing.batch_size,
    )


class RawCaller:
    """Generated stubs and messages written by hand: what a client in another language would do."""

    field_name = staticmethod(str)

    def __init__(self, channel):
        self.stub = explain_pb2_grpc.ExplainServiceStub(channel)

    async def explain(self, image, *, model="", timeout=30, **options):  # noqa: ASYNC109 - a gRPC deadline
        request = explain_pb2.ExplainRequest(model=model, image=self.image(image), options=self.options(**options))
        try:
            return self.answer(await self.stub.Explain(request, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            raise self.refused(error) from None

    async def stream(
        self,
        frames,
        *,
        model="",
        max_in_flight=0,
        overflow=None,
        every=0,
        max_fps=0,
        smooth=0,
        frame_timeout=None,
        **options,
    ):
        """The window in force, and one StreamAnswer for each frame."""
        config = explain_pb2.StreamConfig(
            model=model,
            options=self.options(**options),
            max_in_flight=max_in_flight,
            explain_every=every,
            max_frames_per_second=max_fps,
            temporal_smoothing=smooth,
        )
        if overflow:
            name = "OVERFLOW_POLICY_" + overflow.upper().replace("-", "_")
            config.overflow_policy = explain_pb2.OverflowPolicy.Value(name)
        if frame_timeout is not None:
            config.frame_timeout.FromNanoseconds(int(frame_timeout * 1e9))

        call = self.stub.StreamExplain()

        async def write():
            for frame_id, frame in enumerate(frames):
                message = explain_pb2.Frame(frame_id=frame_id, image=self.image(frame))
                await call.write(explain_pb2.StreamExplainRequest(frame=message))
            await call.done_writing()

        try:
            await call.write(explain_pb2.StreamExplainRequest(config=config))
            # Frames follow once the stream is admitted: a write that fails would hide why it was not.
            responses = [await call.read()]
            writing = asyncio.create_task(write())
            while (response := await call.read()) is not grpc.aio.EOF:
                responses.append(response)
            await writing
        except grpc.aio.AioRpcError as error:
            raise self.refused(error) from None
        assert responses[0].frame_id == 0
        return responses[0].started.max_in_flight, [self.stream_answer(response) for response in responses[1:]]

    @staticmethod
    def image(image):
        if isinstance(image, bytes):
            return explain_pb2.Image(encoded=image)
        return explain_pb2.Image(
            pixels=explain_pb2.Tensor(data_type=explain_pb2.DATA_TYPE_UINT8, shape=image.shape, data=image.tobytes())
        )

    @staticmethod
    def options(*, top_k=None, class_ids=None, method=None, layers=(), map_size=None, map_type=None, top_predictions=0):
        options = explain_pb2.ExplainOptions(layers=layers, top_predictions=top_predictions)
        if top_k is not None:
            options.top_k = top_k
        if class_ids is not None:
            options.class_ids.values.extend(class_ids)
        if method:
            options.method = method_pb2.Method.Value("METHOD_" + method.upper().replace("-", "_"))
        if map_size:
            options.map_size = explain_pb2.MapSize.Value("MAP_SIZE_" + map_size.upper())
        if map_type:
            options.map_type = explain_pb2.DataType.Value("DATA_TYPE_" + map_type.upper())
        return options

    def stream_answer(self, response):
        kind = response.WhichOneof("payload")
        if kind == "result":
            return StreamAnswer(response.frame_id, answer=self.answer(response.result))
        if kind == "error":
            name = next(code.name for code in grpc.StatusCode if code.value[0] == response.error.code)
            refused = self.refusal(name, response.error.message, response.error)
            return StreamAnswer(response.frame_id, refused=refused)
        assert kind == "skipped"
        return StreamAnswer(response.frame_id, skipped=True)

    def answer(self, response):
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
            model_version=response.model_version,
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

    def refused(self, error):
        return self.refusal(error.code().name, error.details(), rpc_status.from_call(error))

    @staticmethod
    def refusal(code, message, status):
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        assert status is not None, "every error has details"
        for detail in status.details:
            detail.Unpack(info) or detail.Unpack(bad)
        assert info.domain == "heatlens"
        fields = [violation.field for violation in bad.field_violations]
        return Refused(code, info.reason, fields, message)
