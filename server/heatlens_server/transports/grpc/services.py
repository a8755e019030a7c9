"""The services: requests become queries, and answers responses."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager

import grpc.aio

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, model_pb2, model_pb2_grpc
from heatlens_server.api.answer import Answer
from heatlens_server.api.calls import current_call
from heatlens_server.api.checks import Limits
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.models import server_info
from heatlens_server.api.query import StreamMessage
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.api.stream.session import StreamSession
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.reload import Reloader
from heatlens_server.fleet.served_model import ModelStatus
from heatlens_server.fleet.versions import is_default
from heatlens_server.transports.grpc.requests import explain_path, query_of, stream_message_of, stream_path
from heatlens_server.transports.grpc.responses import model_of, response_of, server_info_of
from heatlens_server.transports.grpc.status import to_status


class ExplainServicer(explain_pb2_grpc.ExplainServiceServicer):
    """Explains images and streams of frames."""

    def __init__(self, explainer: Explainer, open_streams: OpenStreams) -> None:
        """Serve what `explainer` answers; `open_streams` counts the streams."""
        self._explainer = explainer
        self._open_streams = open_streams

    async def Explain(  # noqa: N802 - the contract's name
        self, request: pb.ExplainRequest, context: grpc.aio.ServicerContext[pb.ExplainRequest, pb.ExplainResponse]
    ) -> pb.ExplainResponse:
        """Explain one image."""
        with _fields_as(explain_path):
            query = query_of(request)
            return await self._explainer.explain(query, response_of, timeout_s=context.time_remaining())

    async def StreamExplain(  # type: ignore[override]  # noqa: N802 - a coroutine that writes, not a generator
        self,
        request_iterator: AsyncIterator[pb.StreamExplainRequest],
        context: grpc.aio.ServicerContext[pb.StreamExplainRequest, pb.StreamExplainResponse],
    ) -> None:
        """Explain the frames of a stream."""
        session = StreamSession(self._explainer, self._open_streams, GrpcStream(request_iterator, context.write))
        with _fields_as(stream_path), self._open_streams.admit(session, context.peer()):
            await session.run()


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Describes the models of a fleet and the server's limits; changes them for administrators."""

    def __init__(self, fleet: Fleet, limits: Limits, reloader: Reloader) -> None:
        """Describe `fleet` and `limits`; change the fleet by `reloader`."""
        self._fleet = fleet
        self._limits = limits
        self._reloader = reloader

    async def ListModels(  # noqa: N802 - the contract's name
        self,
        request: model_pb2.ListModelsRequest,  # noqa: ARG002 - empty
        context: object,  # noqa: ARG002 - unused
    ) -> model_pb2.ListModelsResponse:
        """List the models, in the order of the configuration."""
        return model_pb2.ListModelsResponse(
            models=[self._model_of(status) for status in self._fleet], default_model=self._fleet.default
        )

    async def GetServerInfo(  # noqa: N802 - the contract's name
        self,
        request: model_pb2.GetServerInfoRequest,  # noqa: ARG002 - empty
        context: object,  # noqa: ARG002 - unused
    ) -> model_pb2.GetServerInfoResponse:
        """Return the version and every limit in force."""
        return server_info_of(server_info(self._fleet, self._limits))

    async def LoadModel(  # noqa: N802 - the contract's name
        self,
        request: model_pb2.LoadModelRequest,
        context: object,  # noqa: ARG002 - unused
    ) -> model_pb2.LoadModelResponse:
        """Load a model of the configuration."""
        return model_pb2.LoadModelResponse(
            model=self._model_of(await self._reloader.load(request.name, request.version))
        )

    async def UnloadModel(  # noqa: N802 - the contract's name
        self,
        request: model_pb2.UnloadModelRequest,
        context: object,  # noqa: ARG002 - unused
    ) -> model_pb2.UnloadModelResponse:
        """Take a model out."""
        await self._reloader.unload(request.name, request.version)
        return model_pb2.UnloadModelResponse()

    async def ReloadModel(  # noqa: N802 - the contract's name
        self,
        request: model_pb2.ReloadModelRequest,
        context: object,  # noqa: ARG002 - unused
    ) -> model_pb2.ReloadModelResponse:
        """Load a model again, beside the one that serves."""
        status = await self._reloader.replace(request.name, request.version)
        return model_pb2.ReloadModelResponse(model=self._model_of(status))

    def _model_of(self, status: ModelStatus) -> model_pb2.Model:
        return model_of(status, is_default_version=is_default(status, self._fleet))


class GrpcStream:
    """The client's end of a stream. Implements `api.stream.session.StreamPeer`."""

    def __init__(
        self,
        requests: AsyncIterator[pb.StreamExplainRequest],
        write: Callable[[pb.StreamExplainResponse], Awaitable[None]],
    ) -> None:
        """Read `requests` and send responses by `write`, which waits while the client does not read."""
        self._requests = requests
        self._write = write
        self._request_id = current_call().request_id

    async def read(self) -> StreamMessage | None:
        """The next message; None at the end."""
        request = await anext(self._requests, None)
        return None if request is None else stream_message_of(request)

    def encode(self, answer: Answer) -> pb.ExplainResponse:
        """What `send` takes of an answer."""
        return response_of(answer)

    async def start(self, *, model: str, model_version: str, max_in_flight: int) -> None:
        """Tell that the configuration is accepted."""
        started = pb.StreamStarted(model=model, model_version=model_version, max_in_flight=max_in_flight)
        await self._write(pb.StreamExplainResponse(started=started))

    async def send(self, frame_id: int, outcome: pb.ExplainResponse | Exception | None) -> None:
        """Answer a frame: with its response, with its error, or that it was skipped."""
        if outcome is None:
            response = pb.StreamExplainResponse(frame_id=frame_id, skipped=pb.FrameSkipped())
        elif isinstance(outcome, Exception):
            error = outcome.within(stream_path) if isinstance(outcome, InvalidArgument) else outcome
            response = pb.StreamExplainResponse(frame_id=frame_id, error=to_status(error, self._request_id))
        else:
            response = pb.StreamExplainResponse(frame_id=frame_id, result=outcome)
        await self._write(response)


@contextmanager
def _fields_as(path: Callable[[str], str]) -> Iterator[None]:
    """Errors about a query's fields name the paths that these have in the request."""
    try:
        yield
    except InvalidArgument as error:
        raise error.within(path) from error.__cause__
