"""`api.calls` around every gRPC call, and errors turned into statuses.

Whatever its kind, a call is handled as a stream is, with a context that reads and writes: gRPC would read the message
of any other before a handler could refuse the call, or count the message's bytes. Health checks are handled by
`health_calls`: probes carry no token and would flood the log.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import grpc.aio

from heatlens_server.api.admission import MAX_NAME_BYTES, Admission
from heatlens_server.api.calls import Call, CallGate
from heatlens_server.core.errors import FieldViolation, InvalidArgument, StreamLimit
from heatlens_server.transports.grpc.health_calls import HEALTH_PREFIX, HealthCalls
from heatlens_server.transports.grpc.parsing import parsed, tolerant
from heatlens_server.transports.grpc.refusals import Refusals
from heatlens_server.transports.grpc.status import REQUEST_ID_KEY, WireStatus, to_wire
from heatlens_server.transports.grpc.traffic import OpenCall, Traffic

_COPIES = 2
"""How often an answer that waits to be taken is in memory: as Python's bytes and as gRPC's."""

_REFLECTION_PREFIX = "/grpc.reflection."

_MOST_REFLECTING = 1024

_FAULTS_OF_CALLERS = frozenset(
    (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    )
)

Context = Any  # grpc.aio.ServicerContext, whose type parameters differ per method


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps unary and bidirectional handlers of every service."""

    def __init__(
        self,
        gate: CallGate,
        before_reading: Mapping[str, Callable[[str], None]] | None = None,
        *,
        for_administrators: Container[str] = (),
        traffic: Traffic | None = None,
        refusals: Refusals | None = None,
    ) -> None:
        """Wrap calls.

        Args:
            gate: lets calls in and counts them.
            before_reading: by method, what may refuse a single request of a peer by raising a HeatlensError before its
                message is read.
            for_administrators: the methods that change models.
            traffic: is told what calls account for; None: nobody asks.
            refusals: how fast calls are refused for what they ask; None: of each host of its own.
        """
        self._gate = gate
        self._before_reading = before_reading or {}
        self._for_administrators = for_administrators
        self._traffic = traffic or Traffic(gate.admission.max_message_bytes)
        self._refusals = refusals or Refusals()
        self._health = HealthCalls(gate.admission, self._traffic)
        self._reflecting = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:  # noqa: ANN401 - grpc's handler type
        """Return the wrapped handler of a method."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None:
            return handler
        if method.startswith(HEALTH_PREFIX):
            return self._health.handler(handler)
        if handler.unary_unary is not None:
            return grpc.stream_stream_rpc_method_handler(self._unary(handler, method))
        if handler.stream_stream is not None:
            behavior = self._stream(handler.stream_stream, method, tolerant(handler.request_deserializer))
            return grpc.stream_stream_rpc_method_handler(behavior, None, handler.response_serializer)
        return handler

    def _unary(self, handler: Any, method: str) -> Callable[..., Awaitable[None]]:  # noqa: ANN401 - grpc's handler type
        deserialize, serialize = tolerant(handler.request_deserializer), handler.response_serializer
        admission = self._gate.admission
        check = self._before_reading.get(method)
        changes_models = method in self._for_administrators

        async def answer(call: Call, context: Context, came: OpenCall) -> bytes:
            with await admission.requests.await_message(call.peer, admission.max_message_bytes) as held:
                came.awaits = True
                data = await admission.receive(held, context.read())
                if data is grpc.aio.EOF:
                    came.read(0)
                    raise InvalidArgument([FieldViolation("", "the call has no message")], reason="MESSAGE_MISSING")
                held.keep(len(data))
                came.read(len(data))
                request = deserialize(data)
                del data  # also where it is refused: the error's traceback would keep it
                request = parsed(request)
                response = serialize(await handler.unary_unary(request, context))
            if call.answer is not None:
                call.answer.keep(_COPIES * len(response))
            return bytes(response)

        async def handle(requests: object, context: Context) -> None:  # noqa: ARG001 - read through the context
            call, authorization = self._begin(method, context)
            names = _client_names(context) if changes_models else ()
            with self._traffic.call(call.peer, remaining=context.time_remaining) as came:
                try:
                    with self._gate.admit(authorization, changes_models=changes_models, client_names=names):
                        if check is not None:
                            check(call.peer)
                        response = await answer(call, context, came)
                        with admission.sending(call.peer):
                            await context.write(response)
                except BaseException as error:
                    failure = self._fail(call, error, came)
                else:
                    self._gate.end(call, "OK")
                    return
                await self._refuse(context, came, failure)

        return handle

    def _stream(
        self, behavior: Callable[..., Any], method: str, parse: Callable[[bytes], Any]
    ) -> Callable[..., Awaitable[None]]:
        if inspect.isasyncgenfunction(behavior):
            behavior = _writing(behavior)

        async def handle(requests: object, context: Context) -> None:  # noqa: ARG001 - read through the context
            call, authorization = self._begin(method, context)
            with self._traffic.call(call.peer, is_stream=True, remaining=context.time_remaining) as came:
                try:
                    with self._gate.admit(authorization):
                        sending = _Sending(context, self._gate.admission, call.peer)
                        if method.startswith(_REFLECTION_PREFIX):
                            with self._reflection():
                                await behavior(
                                    _Names(context, came, parse, admission=self._gate.admission, peer=call.peer),
                                    sending,
                                )
                        else:
                            await behavior(_Requests(context, came, parse), sending)
                except BaseException as error:
                    failure = self._fail(call, error, came)
                else:
                    self._gate.end(call, "OK")
                    return
                await self._refuse(context, came, failure)

        return handle

    @contextmanager
    def _reflection(self) -> Iterator[None]:
        """While a stream of reflection is open: no other bound counts these."""
        if self._reflecting >= _MOST_REFLECTING:
            raise StreamLimit(f"{_MOST_REFLECTING} streams of reflection are open already")
        self._reflecting += 1
        try:
            yield
        finally:
            self._reflecting -= 1

    def _begin(self, method: str, context: Context) -> tuple[Call, str | bytes]:
        """The call, and what its caller sent as `authorization`: nothing if that was several, which proxies may mix."""
        sent = tuple(context.invocation_metadata() or ())
        headers = dict(sent)
        call = self._gate.begin(
            method, peer=context.peer(), request_id=headers.get(REQUEST_ID_KEY, ""), headers=headers
        )
        self._traffic.account(call.peer, sum(len(key) + len(value) for key, value in sent))
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        authorizations = [value for key, value in sent if key == "authorization"]
        return call, authorizations[0] if len(authorizations) == 1 else ""

    def _fail(self, call: Call, error: BaseException, came: OpenCall) -> WireStatus:
        """The status that a call ends with by an error; what is none (cancellation) is raised again."""
        if isinstance(error, asyncio.CancelledError):
            self._gate.end(call, "CANCELLED")
            raise error
        if isinstance(error, grpc.aio.InternalError):
            # A message could not be sent: the peer is gone, and gRPC cancels this task a moment later.
            self._gate.end(call, "CANCELLED")
            return WireStatus(grpc.StatusCode.CANCELLED, "", ((REQUEST_ID_KEY, call.request_id),))
        if not isinstance(error, Exception):
            raise error
        status = to_wire(error, call.request_id)
        came.is_at_fault = status.code in _FAULTS_OF_CALLERS
        self._gate.end(call, status.code.name, error=error)
        return status

    async def _refuse(self, context: Context, came: OpenCall, status: WireStatus) -> NoReturn:
        """End a call, after a while where many of its host are refused. Its error, which keeps the message, is gone."""
        if came.is_at_fault and not await self._refusals.wait(came.peer):
            came.leave()
        await _abort(context, status)


def _client_names(context: Context) -> list[str]:
    """The names of the caller's certificate, which TLS has verified."""
    known = context.auth_context()
    keys = ("x509_common_name", "x509_subject_alternative_name")
    return [name.decode(errors="replace") for key in keys for name in known.get(key, ())]


async def _abort(context: Context, status: WireStatus) -> NoReturn:
    try:
        await context.abort(status.code, status.message, status.trailing_metadata)
    except grpc.aio.InternalError as gone:
        raise asyncio.CancelledError from gone
    raise AssertionError("abort returned")


class _Sending:
    """A call's context whose writes are watched: see `Admission.sending`."""

    def __init__(self, context: Context, admission: Admission, peer: str) -> None:
        self._context = context
        self._admission = admission
        self._peer = peer

    async def write(self, message: object) -> None:
        with self._admission.sending(self._peer):
            await self._context.write(message)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - of grpc's context
        return getattr(self._context, name)


class _Requests:
    """A stream's requests, as they come. What is no message raises InvalidArgument."""

    def __init__(self, context: Context, came: OpenCall, parse: Callable[[bytes], Any]) -> None:
        self._context = context
        self._came = came
        self._parse = parse

    def __aiter__(self) -> "_Requests":
        return self

    async def __anext__(self) -> Any:  # noqa: ANN401 - any message
        data = await self._context.read()
        if data is grpc.aio.EOF:
            raise StopAsyncIteration
        self._came.read(len(data))
        return parsed(self._parse(data))


class _Names(_Requests):
    """The requests of a stream that asks for names: small ones, of which few are awaited at a time."""

    def __init__(
        self, context: Context, came: OpenCall, parse: Callable[[bytes], Any], admission: Admission, peer: str
    ) -> None:
        super().__init__(context, came, parse)
        self._admission = admission
        self._peer = peer

    async def __anext__(self) -> Any:  # noqa: ANN401 - any message
        admission = self._admission
        with await admission.reflection.await_message(self._peer, admission.max_message_bytes) as held:
            data = await admission.receive(held, self._context.read())
        if data is grpc.aio.EOF:
            raise StopAsyncIteration
        self._came.read(len(data))
        if len(data) > MAX_NAME_BYTES:
            del data  # the error's traceback would keep it
            why = f"the message has more than {MAX_NAME_BYTES} bytes"
            raise InvalidArgument([FieldViolation("", why)], reason="MESSAGE_TOO_COMPLEX")
        return parsed(self._parse(data))


def _writing(behavior: Callable[..., AsyncIterator[Any]]) -> Callable[..., Awaitable[None]]:
    """A handler that writes its answers, of one that yields them."""

    async def call(requests: object, context: Context) -> None:
        async for response in behavior(requests, context):
            await context.write(response)

    return call
