"""Around every call: request ids, tokens, one log line, and statuses. A real aio server with a service that fails."""

import asyncio
import logging
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from heatlens_server.api.calls import CallGate, current_call
from heatlens_server.core.errors import DeadlineExpired, InternalError, InvalidArgument, QueueFull
from heatlens_server.telemetry.log_observer import LogObserver
from heatlens_server.transports.grpc.interceptor import CallInterceptor
from messages import Details

METHOD = "/heatlens.v1.ExplainService/Explain"
LOGGER = "heatlens.rpc"


class Service(explain_pb2_grpc.ExplainServiceServicer):
    """Fails as it is told, or echoes the model's name."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.started = asyncio.Event()
        self.blocked = False
        self.calls = 0

    async def Explain(self, request, context):
        self.calls += 1
        self.started.set()
        if self.blocked:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return pb.ExplainResponse(model=request.model)

    async def StreamExplain(self, request_iterator, context):
        async for request in request_iterator:
            if self.error is not None:
                raise self.error
            yield pb.StreamExplainResponse(frame_id=request.frame.frame_id)


class WritingService(Service):
    """Its stream is a coroutine that writes, and tells what it knows of the call."""

    async def StreamExplain(self, request_iterator, context):
        current_call().fields["seen"] = current_call().request_id
        self.started.set()
        if self.blocked:
            await asyncio.Event().wait()
        while (request := await anext(request_iterator, None)) is not None:
            if self.error is not None:
                raise self.error
            await context.write(pb.StreamExplainResponse(frame_id=request.frame.frame_id))


class Rig:
    """A server with the interceptor, and a channel to it."""

    def __init__(self, token: str | None, service: Service | None = None) -> None:
        self.service = service or Service()
        self.server = grpc.aio.server(interceptors=[CallInterceptor(CallGate(LogObserver(), token=token))])
        explain_pb2_grpc.add_ExplainServiceServicer_to_server(self.service, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), self.server)

    async def start(self) -> None:
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0)])
        self.stub = explain_pb2_grpc.ExplainServiceStub(self.channel)

    async def stop(self) -> None:
        await self.channel.close()
        await self.server.stop(None)


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig(None)
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture
async def guarded() -> AsyncIterator[Rig]:
    made = Rig("s3cret")
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture(params=[Service, WritingService], ids=["yields", "writes"])
async def streaming(request) -> AsyncIterator[Rig]:
    """Either kind of stream handler."""
    made = Rig(None, request.param())
    await made.start()
    yield made
    await made.stop()


@pytest_asyncio.fixture
async def writing() -> AsyncIterator[Rig]:
    made = Rig(None, WritingService())
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
def lines(caplog):
    """The log lines of calls so far."""
    caplog.set_level(logging.INFO, LOGGER)
    return lambda: [record for record in caplog.records if record.name == LOGGER]


async def failure(call) -> tuple[grpc.StatusCode, Details]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), Details(raised.value)


async def request_id(rig: Rig, *sent: tuple[str, str]) -> str:
    call = rig.stub.Explain(pb.ExplainRequest(), metadata=sent)
    await call
    return dict(await call.trailing_metadata())["x-request-id"]


async def test_a_good_request_id_is_kept_and_another_is_replaced(rig, lines):
    assert await request_id(rig, ("x-request-id", "my-request.1_B")) == "my-request.1_B"
    made = await request_id(rig, ("x-request-id", "a b"))
    assert len(made) == 32
    assert [line.request_id for line in lines()] == ["my-request.1_B", made]


async def test_a_call_is_one_line(rig, lines):
    answer = await rig.stub.Explain(pb.ExplainRequest(model="m"))
    assert answer.model == "m"
    (line,) = lines()
    assert (line.levelno, line.code, line.method) == (logging.INFO, "OK", METHOD)
    assert line.duration_ms >= 0
    assert line.peer
    assert not hasattr(line, "error")


async def test_the_callers_fault_is_told_and_logged_without_a_traceback(rig, lines):
    rig.service.error = InvalidArgument.of("options.top_k", "must be in [1, 2]", reason="INVALID_OPTION")
    code, details = await failure(rig.stub.Explain(pb.ExplainRequest()))
    assert (code, details.info.reason, details.fields) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_OPTION",
        ["options.top_k"],
    )
    (line,) = lines()
    assert (line.levelno, line.code, line.reason) == (logging.INFO, "INVALID_ARGUMENT", "INVALID_OPTION")
    assert line.exc_info is None
    assert details.request_id == line.request_id


@pytest.mark.parametrize("error", [ValueError("secret-1"), InternalError("secret-1"), TimeoutError("secret-1")])
async def test_our_fault_is_logged_and_not_told(rig, lines, error):
    rig.service.error = error
    code, details = await failure(rig.stub.Explain(pb.ExplainRequest()))
    assert (code, details.info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert details.message == f"internal error; request id {details.request_id}"
    (line,) = lines()
    assert (line.levelno, line.code, line.request_id) == (logging.ERROR, "INTERNAL", details.request_id)
    assert "secret-1" in line.error
    assert line.exc_info[1] is error


async def test_retry_hints_travel(rig):
    rig.service.error = QueueFull("full", retry_after_s=0.25)
    code, details = await failure(rig.stub.Explain(pb.ExplainRequest()))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details.pushback_ms == "250"
    assert details.retry.retry_delay.ToMilliseconds() == 250


async def test_a_call_after_a_failed_one_is_fine(rig):
    rig.service.error = DeadlineExpired("late")
    assert (await failure(rig.stub.Explain(pb.ExplainRequest())))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    rig.service.error = None
    assert (await rig.stub.Explain(pb.ExplainRequest(model="m"))).model == "m"


async def test_cancelled_calls_are_logged_as_such(rig, lines):
    rig.service.blocked = True
    call = rig.stub.Explain(pb.ExplainRequest())
    await rig.service.started.wait()
    call.cancel()
    async with asyncio.timeout(10):
        while not lines():  # noqa: ASYNC110 - the server learns of it through the socket
            await asyncio.sleep(0.005)
    (line,) = lines()
    assert (line.levelno, line.code) == (logging.INFO, "CANCELLED")


@pytest.mark.parametrize("garbage", [b"\xff", b"\x0a\xff", b"\x0a\x02\xc3\x28"], ids=["tag", "length", "utf-8"])
async def test_what_is_no_message_is_the_callers_fault(rig, garbage):
    code, details = await failure(rig.channel.unary_unary(METHOD)(garbage))
    assert (code, details.info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_UNDECODABLE")
    assert rig.service.calls == 0


async def test_streams_are_wrapped_too(streaming, lines):
    requests = [pb.StreamExplainRequest(frame=pb.Frame(frame_id=i)) for i in (4, 5)]
    assert [answer.frame_id async for answer in streaming.stub.StreamExplain(iter(requests))] == [4, 5]
    streaming.service.error = KeyError("secret-1")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        # One: a message that is sent when the call has ended fails it with an error of the client's core.
        [answer async for answer in streaming.stub.StreamExplain(iter(requests[:1]))]
    assert Details(raised.value).info.reason == "INTERNAL"
    assert "secret-1" not in raised.value.details()
    assert [line.code for line in lines()] == ["OK", "INTERNAL"]


async def test_a_stream_knows_its_call_and_adds_to_its_line(writing, lines):
    assert [answer async for answer in writing.stub.StreamExplain(iter([]), metadata=[("x-request-id", "mine")])] == []
    (line,) = lines()
    assert (line.request_id, line.seen, line.code) == ("mine", "mine", "OK")


async def test_a_cancelled_stream_is_logged_as_such(writing, lines, caplog):
    writing.service.blocked = True
    call = writing.stub.StreamExplain()
    await writing.service.started.wait()
    call.cancel()
    async with asyncio.timeout(10):
        while not lines():  # noqa: ASYNC110 - the server learns of it through the socket
            await asyncio.sleep(0.005)
    assert [line.code for line in lines()] == ["CANCELLED"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_message_that_cannot_be_sent_is_a_client_that_left(writing, lines):
    writing.service.error = grpc.aio.InternalError("Failed to send")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        [answer async for answer in writing.stub.StreamExplain(iter([pb.StreamExplainRequest()]))]
    assert raised.value.code() is grpc.StatusCode.CANCELLED
    assert [(line.code, line.levelno) for line in lines()] == [("CANCELLED", logging.INFO)]


async def test_garbage_in_a_stream_is_the_callers_fault(streaming):
    call = streaming.channel.stream_stream("/heatlens.v1.ExplainService/StreamExplain")(iter([b"\x0a\xff"]))
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        [answer async for answer in call]
    assert Details(raised.value).info.reason == "MESSAGE_UNDECODABLE"


async def test_the_right_token_is_let_in(guarded):
    answer = await guarded.stub.Explain(pb.ExplainRequest(model="m"), metadata=[("authorization", "Bearer s3cret")])
    assert answer.model == "m"


@pytest.mark.parametrize("metadata", [[], [("authorization", "Bearer s3cre")]])
async def test_no_token_and_another_one_are_not(guarded, metadata):
    code, details = await failure(guarded.stub.Explain(pb.ExplainRequest(), metadata=metadata))
    assert (code, details.info.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert "s3cret" not in details.message
    assert guarded.service.calls == 0


async def test_health_needs_no_token_and_no_line(guarded, lines):
    stub = health_pb2_grpc.HealthStub(guarded.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert lines() == []


async def test_unknown_method(rig):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await rig.channel.unary_unary("/heatlens.v1.ExplainService/Nope")(b"")
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
