"""The client for asyncio: the same calls as `heatlens.Client`, awaited."""

# ruff: noqa: ASYNC109 - `timeout` is a gRPC deadline: the server sees it too, which asyncio.timeout cannot do.

import asyncio
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc

from heatlens._calls.settings import DEFAULT_MAX_MESSAGE_BYTES, TLS, UNSET, Retry, Timeout, make_settings
from heatlens._exceptions import CallCancelledError, FailedPreconditionError, NotFoundError
from heatlens._public import public
from heatlens._results.images import ImageSource
from heatlens._results.results import Health, ModelInfo, Result, ServerInfo
from heatlens._stream.async_link import AsyncLink, AsyncStreamCall
from heatlens._stream.async_stream import AsyncStream
from heatlens._wire import answers
from heatlens._wire.names import AggregationName, MapSizeName, MapTypeName, TargetScoreName
from heatlens._wire.requests import (
    ALL,
    MaskSource,
    Metrics,
    ReferenceSource,
    check_size,
    explain_request,
    health_request,
    keep_metrics_of,
)
from heatlens._wire.status import error_of, unknown_model
from heatlens._wire.streams import OverflowName, stream_plan
from heatlens.v1 import explain_pb2_grpc, model_pb2, model_pb2_grpc

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class _Connection:
    """A channel, its event loop and its stubs."""

    loop: asyncio.AbstractEventLoop
    channel: grpc.aio.Channel
    explain: "explain_pb2_grpc.ExplainServiceAsyncStub"
    models: "model_pb2_grpc.ModelServiceAsyncStub"
    health: health_pb2_grpc.HealthStub


@public
class AsyncClient:
    """Asks a heatlens server why its models say what they say, from asyncio. Create it after forking, not before.

    The connection is made by the first call, shared by all and mended by itself; it belongs to that call's event
    loop. Use the client as an asynchronous context manager, or await `close`. Cancelling a task cancels its call.

    Args:
        address: "host:port", or a gRPC target: "dns:///models.example:50051" spreads calls over all its addresses.
        timeout: seconds for a call that names none, all retries included; None: no limit.
        token: bearer token. Never sent in plaintext, except to this machine.
        tls: TLS settings; True: the default ones; False: plaintext. None: encrypt if a token goes to another machine.
        retry: when calls are tried again.
        wait_for_ready: whether calls wait, within their timeout, for a server that is not there yet.
        max_message_bytes: largest request and answer.

    Raises:
        InvalidArgumentError: an argument is wrong, or a token would travel in plaintext to another machine.
        FileNotFoundError: a certificate file does not exist.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        timeout: float | None = 30.0,
        token: str | None = None,
        tls: TLS | bool | None = None,
        retry: Retry = Retry(),  # noqa: B008 - frozen
        wait_for_ready: bool = False,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self._settings = make_settings(
            address,
            timeout=timeout,
            token=token,
            tls=tls,
            retry=retry,
            wait_for_ready=wait_for_ready,
            max_message_bytes=max_message_bytes,
        )
        # Made by the first call: a grpc.aio channel belongs to the event loop that is running then.
        self._connection: _Connection | None = None
        self._stream_calls: weakref.WeakSet[AsyncStreamCall] = weakref.WeakSet()
        self._closed = False

    def __repr__(self) -> str:
        return self._settings.describe("AsyncClient")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls still open in other tasks fail with CallCancelledError. Idempotent."""
        self._closed = True
        connection, self._connection = self._connection, None
        # Older channels (grpcio 1.76) cancel only the calls that a task awaits directly.
        for call in list(self._stream_calls):
            call.cancel()
        if connection is not None:
            await connection.channel.close()

    async def explain(
        self,
        image: ImageSource,
        *,
        model: str | None = None,
        top_k: int | None = None,
        class_ids: int | Sequence[int] | None = None,
        method: str | None = None,
        layers: str | Sequence[str] | None = None,
        map_size: MapSizeName | None = None,
        map_type: MapTypeName | None = None,
        top_predictions: int | None = None,
        target_score: TargetScoreName | None = None,
        aggregation: AggregationName | None = None,
        augment: bool = False,
        principal_component: bool = False,
        faithfulness: Metrics = False,
        mask: MaskSource | None = None,
        reference: ReferenceSource | None = None,
        min_score: float | None = None,
        return_mask: bool = False,
        timeout: Timeout = UNSET,
    ) -> Result:
        """Explain one image: which of its pixels made the model give a class its score.

        Arguments, what is returned and what is raised are those of `heatlens.Client.explain`. Files are read aside, so
        that the event loop goes on.
        """
        build = partial(
            explain_request,
            image,
            model=model,
            top_k=top_k,
            class_ids=class_ids,
            method=method,
            layers=layers,
            map_size=map_size,
            map_type=map_type,
            top_predictions=top_predictions,
            target_score=target_score,
            aggregation=aggregation,
            augment=augment,
            principal_component=principal_component,
            faithfulness=faithfulness,
            mask=mask,
            reference=reference,
            min_score=min_score,
            return_mask=return_mask,
        )
        # Reading a file would hold up the event loop.
        reads = any(isinstance(source, str | PathLike) for source in (image, mask, reference))
        request = await asyncio.to_thread(build) if reads else build()
        if isinstance(faithfulness, str) and faithfulness == ALL:
            keep_metrics_of(await self.models(timeout=timeout), request)
        return answers.result_of(
            await self._call(self._connect().explain.Explain, request, timeout), placed=map_size == "source"
        )

    def stream(
        self,
        *,
        model: str | None = None,
        max_in_flight: int | None = None,
        overflow: OverflowName = "block",
        every: int = 1,
        max_fps: float | None = None,
        smooth: float = 0.0,
        frame_timeout: float | None = None,
        jpeg_quality: int | None = None,
        top_k: int | None = None,
        class_ids: int | Sequence[int] | None = None,
        method: str | None = None,
        layers: str | Sequence[str] | None = None,
        map_size: MapSizeName | None = None,
        map_type: MapTypeName | None = None,
        top_predictions: int | None = None,
        target_score: TargetScoreName | None = None,
        aggregation: AggregationName | None = None,
        augment: bool = False,
        principal_component: bool = False,
    ) -> AsyncStream:
        """Explain the frames of a video, in order. See `heatlens.AsyncStream`.

        Arguments and what is raised are those of `heatlens.Client.stream`; the stream opens with its `async with`
        statement or first use.
        """
        plan = stream_plan(
            model=model,
            max_in_flight=max_in_flight,
            overflow=overflow,
            every=every,
            max_fps=max_fps,
            smooth=smooth,
            frame_timeout=frame_timeout,
            jpeg_quality=jpeg_quality,
            top_k=top_k,
            class_ids=class_ids,
            method=method,
            layers=layers,
            map_size=map_size,
            map_type=map_type,
            top_predictions=top_predictions,
            target_score=target_score,
            aggregation=aggregation,
            augment=augment,
            principal_component=principal_component,
            max_message_bytes=self._settings.max_message_bytes,
        )
        return AsyncStream(AsyncLink(self._start_stream, plan, timeout_s=self._settings.timeout))

    async def models(self, *, timeout: Timeout = UNSET) -> tuple[ModelInfo, ...]:
        """List the served models, whatever their state. Raises HeatlensError if the call fails."""
        return answers.models_of(
            await self._call(self._connect().models.ListModels, model_pb2.ListModelsRequest(), timeout)
        )

    async def server_info(self, *, timeout: Timeout = UNSET) -> ServerInfo:
        """Return the server's version and limits. Raises HeatlensError if the call fails."""
        return answers.server_info_of(
            await self._call(self._connect().models.GetServerInfo, model_pb2.GetServerInfoRequest(), timeout)
        )

    async def health(self, model: str | None = None, *, timeout: Timeout = UNSET) -> Health:
        """Return whether the server, or one model, serves. Never retried: it says how things are now.

        Raises:
            NotFoundError: no model of that name.
            UnavailableError: no server answers.
            HeatlensError: any other failure.
        """
        request = health_request(model)
        try:
            return answers.health_of(await self._call(self._connect().health.Check, request, timeout))
        except NotFoundError as error:
            raise unknown_model(error, model) from None

    def _connect(self) -> _Connection:
        """Return the connection, made by the first call."""
        if self._closed:
            raise FailedPreconditionError("the client is closed", reason="CLIENT_CLOSED")
        loop = asyncio.get_running_loop()
        if self._connection is None:
            settings = self._settings
            channel = (
                grpc.aio.insecure_channel(settings.address, settings.options)
                if settings.credentials is None
                else grpc.aio.secure_channel(settings.address, settings.credentials, settings.options)
            )
            self._connection = _Connection(
                loop=loop,
                channel=channel,
                explain=explain_pb2_grpc.ExplainServiceStub(channel),
                models=model_pb2_grpc.ModelServiceStub(channel),
                health=health_pb2_grpc.HealthStub(channel),
            )
        elif self._connection.loop is not loop:
            raise FailedPreconditionError(
                "the client belongs to another event loop: create one per event loop", reason="WRONG_EVENT_LOOP"
            )
        return self._connection

    async def _call(
        self,
        method: "grpc.aio.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        timeout: Timeout,
    ) -> Response:
        """Make one call; only our exceptions come out, and CancelledError if our task is cancelled."""
        settings = self._settings
        timeout_s = settings.timeout_of(timeout)
        check_size(request, settings.max_message_bytes)
        request_id, metadata = settings.call_metadata()
        try:
            return await method(
                request, timeout=timeout_s, metadata=metadata, wait_for_ready=settings.wait_for_ready or None
            )
        except grpc.RpcError as error:
            raise error_of(error, request_id) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Nobody cancelled the task: `close` cancelled the call.
            raise CallCancelledError("the client was closed during the call", request_id=request_id) from None

    def _start_stream(self) -> tuple[AsyncStreamCall, str]:
        """Begin a stream's call; return it and its request id."""
        connection = self._connect()
        settings = self._settings
        request_id, metadata = settings.call_metadata()
        call = connection.explain.StreamExplain(metadata=metadata, wait_for_ready=settings.wait_for_ready or None)
        self._stream_calls.add(call)
        return call, request_id
