"""What happens around every call: request id, token, one log line, and errors turned into statuses.

Health checks pass through untouched: probes carry no token and would flood the log.
"""

import asyncio
import hmac
import inspect
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from heatlens_server.api.gate import CallGate
from heatlens_server.api.record import CallRecord, set_current_record
from heatlens_server.core.errors import FieldViolation, HeatlensError, InvalidArgument, Unauthenticated
from heatlens_server.transports.grpc.status import REQUEST_ID_KEY, WireStatus, is_fault, to_wire

_log = logging.getLogger("heatlens.rpc")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHOWN_CHARACTERS = 500
"""How much of an error a log line repeats."""
_HEALTH_PREFIX = "/grpc.health.v1.Health/"

Context = Any  # grpc.aio.ServicerContext, whose type parameters differ per method


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps unary and bidirectional handlers of every service but health."""

    def __init__(self, gate: CallGate, *, token: str | None = None) -> None:
        """Wrap calls.

        Args:
            gate: counts the calls, and refuses them once the server drains.
            token: the bearer token that callers must send; None lets everybody in.
        """
        self._gate = gate
        self._token = None if token is None else token.encode()

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
        async def call(request: Any, context: Context) -> Any:  # noqa: ANN401 - any message
            span = _Call(method, context)
            try:
                self._authenticate(context)
                with self._gate:
                    response = await behavior(_parsed(request), context)
            except BaseException as error:
                await span.fail(error)
            span.succeed()
            return response

        return call

    def _stream(self, behavior: Callable[..., Any], method: str) -> Callable[..., Awaitable[None]]:
        if inspect.isasyncgenfunction(behavior):
            behavior = _writing(behavior)

        async def call(requests: object, context: Context) -> None:  # noqa: ARG001 - read through the context
            span = _Call(method, context)
            try:
                self._authenticate(context)
                with self._gate:
                    await behavior(_Requests(context), context)
            except BaseException as error:
                await span.fail(error)
            span.succeed()

        return call

    def _authenticate(self, context: Context) -> None:
        if self._token is None:
            return
        sent = dict(context.invocation_metadata() or ()).get("authorization", "")
        scheme, _, token = str(sent).partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), self._token):
            raise Unauthenticated("send the server's token as metadata `authorization: Bearer <token>`")


class _Call:
    """One call: its record, its log line and its end."""

    def __init__(self, method: str, context: Context) -> None:
        sent = dict(context.invocation_metadata() or ()).get(REQUEST_ID_KEY, "")
        known = isinstance(sent, str) and _REQUEST_ID.fullmatch(sent)
        self._record = CallRecord(request_id=sent if known else uuid.uuid4().hex)
        self._context = context
        self._method = method
        self._started_at = time.perf_counter()
        context.set_trailing_metadata(((REQUEST_ID_KEY, self._record.request_id),))
        set_current_record(self._record)

    def succeed(self) -> None:
        self._write(logging.INFO, "OK")

    async def fail(self, error: BaseException) -> NoReturn:
        """Log, and end the call with the error's status; what is not an error (cancellation) is raised again."""
        if isinstance(error, asyncio.CancelledError):
            self._write(logging.INFO, "CANCELLED")
            raise error
        if isinstance(error, grpc.aio.InternalError):
            # A message could not be sent: the peer is gone, and gRPC cancels this task a moment later.
            self._write(logging.INFO, "CANCELLED")
            await self._abort(WireStatus(grpc.StatusCode.CANCELLED, "", ((REQUEST_ID_KEY, self._record.request_id),)))
        if not isinstance(error, Exception):
            raise error
        status = to_wire(error, self._record.request_id)
        if isinstance(error, HeatlensError) and not is_fault(error):
            self._write(logging.INFO, status.code.name, error=error.message[:_SHOWN_CHARACTERS], reason=error.reason)
        else:
            self._write(logging.ERROR, status.code.name, error=repr(error)[:_SHOWN_CHARACTERS], exc_info=error)
        await self._abort(status)

    async def _abort(self, status: WireStatus) -> NoReturn:
        try:
            await self._context.abort(status.code, status.message, status.trailing_metadata)
        except grpc.aio.InternalError as gone:
            raise asyncio.CancelledError from gone
        raise AssertionError("abort returned")

    def _write(self, level: int, code: str, *, exc_info: Exception | None = None, **fields: str) -> None:
        if not _log.isEnabledFor(level):
            return
        duration_ms = round((time.perf_counter() - self._started_at) * 1e3, 3)
        _log.log(
            level,
            "call",
            exc_info=exc_info,
            extra={
                "method": self._method,
                "code": code,
                "duration_ms": duration_ms,
                "request_id": self._record.request_id,
                "peer": self._context.peer(),
                **self._record.fields,
                **fields,
            },
        )


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
