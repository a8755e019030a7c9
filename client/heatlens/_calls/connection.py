"""How the clients reach a server: a channel for threads, and one for asyncio."""

# ruff: noqa: ASYNC109 - `timeout` is a gRPC deadline: the server sees it too, which asyncio.timeout cannot do.

import asyncio
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2_grpc

from heatlens._calls.settings import Settings, Timeout
from heatlens._exceptions import CallCancelledError, FailedPreconditionError, HeatlensError
from heatlens._stream.calls import AsyncStreamCall, StreamCall
from heatlens._wire.requests import check_size
from heatlens._wire.status import CONNECTION_LOST, REPLICA_DIED, error_of
from heatlens.v1 import explain_pb2, explain_pb2_grpc, model_pb2, model_pb2_grpc

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")

_SAFE_TWICE = (explain_pb2.ExplainRequest, model_pb2.ListModelsRequest, model_pb2.GetServerInfoRequest)
"""What changes nothing on a server, so that it may be asked again."""


class Connection:
    """A channel for threads. Made when the client is, connected by the first call."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._channel = (
            grpc.insecure_channel(settings.target, settings.options)
            if settings.credentials is None
            else grpc.secure_channel(settings.target, settings.credentials, settings.options)
        )
        self._stubs = Stubs(
            explain_pb2_grpc.ExplainServiceStub(self._channel),
            model_pb2_grpc.ModelServiceStub(self._channel),
            health_pb2_grpc.HealthStub(self._channel),
        )
        self._closed = False

    @property
    def stubs(self) -> "Stubs":
        """The services. Raises FailedPreconditionError after `close`."""
        if self._closed:
            raise _client_closed()
        return self._stubs

    def close(self) -> None:
        """Close the channel; open calls are cancelled. Idempotent."""
        self._closed = True
        self._channel.close()

    def call(
        self,
        method: "grpc.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        timeout: Timeout,
    ) -> Response:
        """Make one call; only our exceptions come out."""
        settings = self._settings
        check_size(request, settings.max_message_bytes)
        request_id, metadata = settings.call_metadata(getattr(request, "model", ""))
        attempts = Attempts(settings, timeout, request)
        try:
            while True:
                try:
                    return method(
                        request,
                        timeout=attempts.left_s,
                        metadata=metadata,
                        wait_for_ready=settings.wait_for_ready or None,
                    )
                except grpc.RpcError as error:
                    attempts.check_another(error_of(error, request_id))
        except ValueError:
            # Closed by another thread meanwhile: gRPC says so with a bare ValueError.
            if not self._closed:
                raise
            raise _client_closed() from None

    def start_stream(
        self, requests: Iterator[explain_pb2.StreamExplainRequest], *, model: str
    ) -> tuple[StreamCall, str]:
        """Begin a stream's call; return it and its request id."""
        settings = self._settings
        request_id, metadata = settings.call_metadata(model)
        stream = self.stubs.explain.StreamExplain
        try:
            call = stream(requests, metadata=metadata, wait_for_ready=settings.wait_for_ready or None)
        except ValueError:
            # As in `call`.
            if not self._closed:
                raise
            raise _client_closed() from None
        return call, request_id


class AsyncConnection:
    """A channel for asyncio. Made by the first call: it belongs to the event loop that is running then."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opened: tuple[asyncio.AbstractEventLoop, grpc.aio.Channel, AsyncStubs] | None = None
        self._stream_calls: weakref.WeakSet[AsyncStreamCall] = weakref.WeakSet()
        self._closed = False

    @property
    def stubs(self) -> "AsyncStubs":
        """The services.

        Raises:
            FailedPreconditionError: after `close`, or in another event loop than before.
        """
        if self._closed:
            raise _client_closed()
        loop = asyncio.get_running_loop()
        if self._opened is None:
            settings = self._settings
            channel = (
                grpc.aio.insecure_channel(settings.target, settings.options)
                if settings.credentials is None
                else grpc.aio.secure_channel(settings.target, settings.credentials, settings.options)
            )
            stubs = AsyncStubs(
                explain_pb2_grpc.ExplainServiceStub(channel),
                model_pb2_grpc.ModelServiceStub(channel),
                health_pb2_grpc.HealthStub(channel),
            )
            self._opened = loop, channel, stubs
        opened_by, _, stubs = self._opened
        if opened_by is not loop:
            raise FailedPreconditionError(
                "the client belongs to another event loop: create one per event loop", reason="WRONG_EVENT_LOOP"
            )
        return stubs

    async def close(self) -> None:
        """Close the channel; open calls are cancelled. Idempotent."""
        self._closed = True
        opened, self._opened = self._opened, None
        # Older channels (grpcio 1.76) cancel only the calls that a task awaits directly.
        for call in list(self._stream_calls):
            call.cancel()
        if opened is not None:
            _, channel, _ = opened
            await channel.close()

    async def call(
        self,
        method: "grpc.aio.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        timeout: Timeout,
    ) -> Response:
        """Make one call; only our exceptions come out, and CancelledError if our task is cancelled."""
        settings = self._settings
        check_size(request, settings.max_message_bytes)
        request_id, metadata = settings.call_metadata(getattr(request, "model", ""))
        attempts = Attempts(settings, timeout, request)
        try:
            while True:
                try:
                    return await method(
                        request,
                        timeout=attempts.left_s,
                        metadata=metadata,
                        wait_for_ready=settings.wait_for_ready or None,
                    )
                except grpc.RpcError as error:
                    attempts.check_another(error_of(error, request_id))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # The task was not cancelled: `close` cancelled the call.
            raise CallCancelledError("the client was closed during the call", request_id=request_id) from None

    def start_stream(self, *, model: str) -> tuple[AsyncStreamCall, str]:
        """Begin a stream's call; return it and its request id."""
        settings = self._settings
        request_id, metadata = settings.call_metadata(model)
        call = self.stubs.explain.StreamExplain(metadata=metadata, wait_for_ready=settings.wait_for_ready or None)
        self._stream_calls.add(call)
        return call, request_id


class Attempts:
    """The attempts of one call beyond gRPC's own: where a replica on Ray died, or a connection within the answer.

    gRPC knows codes only, and calls again only as long as nothing of an answer has come (gRPC proposal A6).

    Attributes:
        left_s: the seconds that the call has left; None: no limit.
    """

    def __init__(self, settings: Settings, timeout: Timeout, request: Message) -> None:
        """Begin the first attempt. Raises InvalidArgumentError where `timeout` is no number of seconds."""
        self.left_s = settings.timeout_of(timeout)
        self._until_s = None if self.left_s is None else time.monotonic() + self.left_s
        self._left = settings.max_attempts if isinstance(request, _SAFE_TWICE) else 1

    def check_another(self, failure: HeatlensError) -> None:
        """Begin another attempt, or raise `failure`."""
        self._left -= 1
        if self._until_s is not None:
            self.left_s = self._until_s - time.monotonic()
        passes = failure.reason in (CONNECTION_LOST, REPLICA_DIED)
        if not passes or self._left < 1 or (self.left_s is not None and self.left_s <= 0):
            raise failure from None


@dataclass(frozen=True, slots=True)
class Stubs:
    """The services that a channel reaches."""

    explain: explain_pb2_grpc.ExplainServiceStub
    models: model_pb2_grpc.ModelServiceStub
    health: health_pb2_grpc.HealthStub


@dataclass(frozen=True, slots=True)
class AsyncStubs:
    """The services that a channel of asyncio reaches."""

    explain: "explain_pb2_grpc.ExplainServiceAsyncStub"
    models: "model_pb2_grpc.ModelServiceAsyncStub"
    health: health_pb2_grpc.HealthStub


def _client_closed() -> FailedPreconditionError:
    return FailedPreconditionError("the client is closed", reason="CLIENT_CLOSED")
