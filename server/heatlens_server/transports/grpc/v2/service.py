"""The protocol's methods, under the name of its package: `inference.GRPCInferenceService`."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import grpc
import grpc.aio

from heatlens_server.api.answer import Answer
from heatlens_server.api.calls import current_call
from heatlens_server.api.checks import quoted
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.models import heatlens_version, is_ready, known_name
from heatlens_server.api.query import MapSize, Query
from heatlens_server.api.stream.independent import RequestStream, Turn
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.events import Trace
from heatlens_server.fleet.reload import Reloader
from heatlens_server.fleet.served_model import ModelStatus, ServedModel
from heatlens_server.fleet.versions import choose, point_of
from heatlens_server.telemetry.statistics import Statistics
from heatlens_server.transports.grpc.parsing import MOST_FIELDS
from heatlens_server.transports.grpc.status import to_status
from heatlens_server.transports.grpc.v2 import inference_pb2 as pb
from heatlens_server.transports.grpc.v2.models import config_of, index_of, metadata_of, statistics_of
from heatlens_server.transports.grpc.v2.reflection import SERVICE
from heatlens_server.transports.grpc.v2.requests import inference_of, path_of
from heatlens_server.transports.grpc.v2.responses import infer_response_of

FOR_ADMINISTRATORS = ("RepositoryModelLoad", "RepositoryModelUnload")

Context = Any  # grpc.aio.ServicerContext, whose type parameters differ per method


class InferenceService:
    """Explains images by the open inference protocol."""

    def __init__(
        self, explainer: Explainer, open_streams: OpenStreams, reloader: Reloader, statistics: Statistics
    ) -> None:
        """Serve what `explainer` answers.

        Args:
            explainer: explains.
            open_streams: counts the streams.
            reloader: changes the models, for administrators.
            statistics: what they did.
        """
        self._explainer = explainer
        self._fleet = explainer.fleet
        self._open_streams = open_streams
        self._reloader = reloader
        self._statistics = statistics

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods."""
        unary: dict[str, tuple[Callable[..., Awaitable[Any]], Any]] = {
            "ServerLive": (self._server_live, pb.ServerLiveRequest),
            "ServerReady": (self._server_ready, pb.ServerReadyRequest),
            "ModelReady": (self._model_ready, pb.ModelReadyRequest),
            "ServerMetadata": (self._server_metadata, pb.ServerMetadataRequest),
            "ModelMetadata": (self._model_metadata, pb.ModelMetadataRequest),
            "ModelConfig": (self._model_config, pb.ModelConfigRequest),
            "ModelStatistics": (self._model_statistics, pb.ModelStatisticsRequest),
            "ModelInfer": (self._model_infer, pb.ModelInferRequest),
            "RepositoryIndex": (self._repository_index, pb.RepositoryIndexRequest),
            "RepositoryModelLoad": (self._load_model, pb.RepositoryModelLoadRequest),
            "RepositoryModelUnload": (self._unload_model, pb.RepositoryModelUnloadRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(method, request.FromString, _serialized)
            for name, (method, request) in unary.items()
        }
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._model_stream_infer, pb.ModelInferRequest.FromString, _serialized
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def infer(
        self,
        request: pb.ModelInferRequest,
        *,
        timeout_s: float | None,
        turn: Turn | None = None,
        trace: Trace | None = None,
    ) -> pb.ModelInferResponse:
        """Explain the images of a request.

        Args:
            request: whose.
            timeout_s: how long the caller will wait; None: for ever.
            turn: as in `Explainer.explain`.
            trace: the same.

        Raises:
            HeatlensError: as `Explainer.explain`; a wrong field is named as the request has it.
        """
        current_call().fields["model"] = known_name(self._fleet, request.model_name)
        limits = self._explainer.limits
        asked = inference_of(request, most_images=min(limits.max_queue_length, MOST_FIELDS))
        queries = await self._of_one_version(asked.queries)
        limits_s = [limit for limit in (timeout_s, asked.timeout_s) if limit is not None]
        explain = functools.partial(
            self._explainer.explain, encode=_itself, timeout_s=min(limits_s, default=None), turn=turn, trace=trace
        )
        is_batch = len(queries) > 1
        answers = await _together(
            [_explained(explain, query, i if is_batch else None) for i, query in enumerate(queries)]
        )
        make = functools.partial(
            infer_response_of,
            answers,
            outputs=asked.outputs,
            request_id=request.id,
            max_message_bytes=limits.max_message_bytes,
        )
        # As `Explainer.answer`: maps of the source image's size are megabytes.
        return await asyncio.to_thread(make) if queries[0].options.map_size is MapSize.SOURCE else make()

    async def _of_one_version(self, queries: Sequence[Query]) -> Sequence[Query]:
        """The queries of a request: their answers are one, so that the first image chooses the version for all."""
        first = queries[0]
        if len(queries) == 1 or first.image is None:
            return queries
        point = functools.partial(point_of, first.image.data)
        await self._fleet.idle.awake(first.model, first.model_version, point)
        version = self._fleet.get(first.model, first.model_version, point).version
        return [replace(query, model_version=version) for query in queries]

    def _model(self, name: str, version: str) -> ServedModel:
        """The ready or idle model of that name and version; the default ones for empty ones."""
        return self._status(name, version).known or self._fleet.get(name, version, _not_by_weight)

    def _status(self, name: str, version: str) -> ModelStatus:
        return choose(self._fleet, name or self._fleet.default, version, _not_by_weight)

    async def _server_live(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:  # noqa: ARG002
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:  # noqa: ARG002
        return pb.ServerReadyResponse(ready=is_ready(self._fleet))

    async def _model_ready(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:  # noqa: ARG002
        return pb.ModelReadyResponse(ready=self._status(request.name, request.version).can_answer)

    async def _server_metadata(
        self,
        request: pb.ServerMetadataRequest,  # noqa: ARG002 - empty
        context: Context,  # noqa: ARG002 - unused
    ) -> pb.ServerMetadataResponse:
        extensions = ("model_configuration", "model_repository", "statistics")
        return pb.ServerMetadataResponse(name="heatlens", version=heatlens_version(), extensions=extensions)

    async def _model_metadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:  # noqa: ARG002
        model = self._model(request.name, request.version)
        return metadata_of(model, [one.version for one in self._fleet if one.name == model.name and one.can_answer])

    async def _model_config(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:  # noqa: ARG002
        return pb.ModelConfigResponse(config=config_of(self._model(request.name, request.version)))

    async def _model_statistics(
        self,
        request: pb.ModelStatisticsRequest,
        context: Context,  # noqa: ARG002 - unused
    ) -> pb.ModelStatisticsResponse:
        asked = request.name or request.version
        names = [self._status(request.name, request.version).name] if asked else [one.name for one in self._fleet]
        return pb.ModelStatisticsResponse(
            model_stats=[
                statistics_of(name, [one.version for one in self._fleet if one.name == name], self._statistics.of(name))
                for name in dict.fromkeys(names)
            ]
        )

    async def _repository_index(
        self,
        request: pb.RepositoryIndexRequest,
        context: Context,  # noqa: ARG002 - unused
    ) -> pb.RepositoryIndexResponse:
        _check_repository(request.repository_name)
        return index_of(self._fleet, ready=request.ready)

    async def _load_model(
        self,
        request: pb.RepositoryModelLoadRequest,
        context: Context,  # noqa: ARG002 - unused
    ) -> pb.RepositoryModelLoadResponse:
        """Load a model; one that serves is loaded again, as by Triton."""
        _check_repository(request.repository_name, request.parameters)
        serves = any(one.name == request.model_name and one.served is not None for one in self._fleet)
        await (self._reloader.replace if serves else self._reloader.load)(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def _unload_model(
        self,
        request: pb.RepositoryModelUnloadRequest,
        context: Context,  # noqa: ARG002 - unused
    ) -> pb.RepositoryModelUnloadResponse:
        # Stock clients always send it, and no model depends on another.
        _check_repository(request.repository_name, request.parameters, known="unload_dependents")
        await self._reloader.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def _model_infer(self, request: pb.ModelInferRequest, context: Context) -> pb.ModelInferResponse:
        return await self.infer(request, timeout_s=context.time_remaining())

    async def _model_stream_infer(self, requests: AsyncIterator[pb.ModelInferRequest], context: Context) -> None:
        stream = RequestStream(self._explainer, self._open_streams, _Peer(self, requests, context))
        with self._open_streams.admit(stream, context.peer()):
            await stream.run()


class _Peer:
    """The client's end of a stream. Implements `api.stream.independent.RequestPeer`."""

    def __init__(
        self, service: InferenceService, requests: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> None:
        self._service = service
        self._requests = requests
        self._context = context
        self._request_id = current_call().request_id

    async def read(self) -> pb.ModelInferRequest | None:
        return await anext(self._requests, None)

    def about(self, request: pb.ModelInferRequest) -> tuple[str, int]:
        return request.model_name, request.ByteSize()

    async def answer(self, request: pb.ModelInferRequest, turn: Turn, trace: Trace) -> pb.ModelInferResponse:
        return await self._service.infer(request, timeout_s=self._context.time_remaining(), turn=turn, trace=trace)

    async def send(self, request: pb.ModelInferRequest, outcome: pb.ModelInferResponse | Exception) -> None:
        if isinstance(outcome, Exception):
            response = pb.ModelStreamInferResponse(
                error_message=to_status(outcome, self._request_id).message,
                infer_response=pb.ModelInferResponse(id=request.id),
            )
        else:
            response = pb.ModelStreamInferResponse(infer_response=outcome)
        await self._context.write(response)


async def _explained(explain: Callable[[Query], Awaitable[Answer]], query: Query, image: int | None) -> Answer:
    """The answer of an image; errors name fields as the request has them."""
    try:
        return await explain(query)
    except InvalidArgument as error:
        raise error.within(functools.partial(path_of, image=image)) from error.__cause__


async def _together(answers: list[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """All answers, or the first error; then the others give up their places."""
    tasks = [asyncio.create_task(answer) for answer in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _check_repository(name: str, parameters: Mapping[str, object] = MappingProxyType({}), *, known: str = "") -> None:
    """Refuse what would be left out without a word.

    Raises:
        InvalidArgument: a repository is named, or a parameter other than `known`.
    """
    if name:
        raise InvalidArgument.of(
            "repository_name", "must be empty: the configuration is the only repository", reason="INVALID_OPTION"
        )
    if unknown := sorted(parameters.keys() - {known}):
        why = f"unknown parameter {quoted(unknown[0])}: the server's configuration says how a model is loaded"
        raise InvalidArgument.of("parameters", why, reason="INVALID_OPTION")


def _not_by_weight() -> float:
    """A point beyond those of all canaries."""
    return 1.0


def _itself(answer: Answer) -> Answer:
    return answer


def _serialized(message: Any) -> bytes:  # noqa: ANN401 - any message
    data: bytes = message.SerializeToString()
    return data
