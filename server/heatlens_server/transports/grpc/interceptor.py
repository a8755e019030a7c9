"""`api.calls` around every gRPC call, and errors turned into statuses.

Health checks pass through untouched: probes carry no token and would flood the log.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from heatlens_server.api.calls import Call, CallGate
from heatlens_server.core.errors import FieldViolation, InvalidArgument
from heatlens_server.transports.grpc.status import REQUEST_ID_KEY, WireStatus, to_wire

_HEALTH_PREFIX = "/grpc.health.v1.Health/"

Context = Any  # grpc.aio.ServicerContext, whose type parameters differ per method


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps unary and bidirectional handlers of every service but health."""

    def __init__(self, gate: CallGate) -> None:
        """Wrap calls, which the gate lets in and counts."""
        self._gate = gate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - grpc's handler type
        """Return the wrapped handler of a method."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith(_HEALTH_PREFIX):
            return handler
        deserializer = _tolerant(handler.request_deserializer)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(handler.unary_unary, method), deserializer, handler.response_serializer
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(handler.stream_stream, method), deserializer, handler.response_serializer
            )
        return handler

    def _unary(self, behavior: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        async def handle(request: Any, context: Context) -> Any:  # noqa: ANN401 - any message
            call, metadata = self._begin(method, context)
            try:
                with self._gate.admit(metadata.get("authorization", "")):
                    response = await behavior(_parsed(request), context)
            except BaseException as error:
                await self._fail(call, context, error)
            self._gate.end(call, "OK")
            return response

        return handle

    def _stream(self, behavior: Callable[..., Any], method: str) -> Callable[..., Awaitable[None]]:
        if inspect.isasyncgenfunction(behavior):
            behavior = _writing(behavior)

        async def handle(requests: object, context: Context) -> None:  # noqa: ARG001 - read through the context
            call, metadata = self._begin(method, context)
            try:
                with self._gate.admit(metadata.get("authorization", "")):
                    await behavior(_Requests(context), context)
            except BaseException as error:
                await self._fail(call, context, error)
            self._gate.end(call, "OK")

        return handle

    def _begin(self, method: str, context: Context) -> tuple[Call, dict[str, str | bytes]]:
        """The call, and its metadata."""
        metadata = dict(context.invocation_metadata() or ())
        call = self._gate.begin(method, peer=context.peer(), request_id=metadata.get(REQUEST_ID_KEY, ""))
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        return call, metadata

    async def _fail(self, call: Call, context: Context, error: BaseException) -> NoReturn:
        """End a call with its error's status; what is not an error (cancellation) is raised again."""
        if isinstance(error, asyncio.CancelledError):
            self._gate.end(call, "CANCELLED")
            raise error
        if isinstance(error, grpc.aio.InternalError):
            # A message could not be sent: the peer is gone, and gRPC cancels this task a moment later.
            self._gate.end(call, "CANCELLED")
            await _abort(context, WireStatus(grpc.StatusCode.CANCELLED, "", ((REQUEST_ID_KEY, call.request_id),)))
        if not isinstance(error, Exception):
            raise error
        status = to_wire(error, call.request_id)
        self._gate.end(call, status.code.name, error=error)
        await _abort(context, status)


async def _abort(context: Context, status: WireStatus) -> NoReturn:
    try:
        await context.abort(status.code, status.message, status.trailing_metadata)
    except grpc.aio.InternalError as gone:
        raise asyncio.CancelledError from gone
    raise AssertionError("abort returned")


def _tolerant(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserializer that returns its error, so that the handler can answer it; gRPC itself would say INTERNAL."""

    def deserialize(data: bytes) -> Any:  # noqa: ANN401 - any message
        try:
            return deserializer(data)
        except DecodeError as error:
            return error

    return deserialize


def _parsed(request: Any) -> Any:  # noqa: ANN401 - any message
    if isinstance(request, DecodeError):
        raise InvalidArgument([FieldViolation("", "the message is not valid protobuf")], reason="MESSAGE_UNDECODABLE")
    return request


class _Requests:
    """A stream's requests, as they come. What is no message raises InvalidArgument."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __aiter__(self) -> "_Requests":
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401 - any message
        request = await self._context.read()
        if request is grpc.aio.EOF:
            raise StopAsyncIteration
        return _parsed(request)


def _writing(behavior: Callable[..., AsyncIterator[Any]]) -> Callable[..., Awaitable[None]]:
    """A handler that writes its answers, of one that yields them."""

    async def call(requests: object, context: Context) -> None:
        async for response in behavior(requests, context):
            await context.write(response)

    return call
