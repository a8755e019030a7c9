"""Spans of a real server, as an exporter gets them: whose parent is whose, links, times, failures."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import grpc.aio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from heatlens import AsyncClient, InternalError, InvalidArgumentError
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from heatlens_server.app import Server
from heatlens_server.telemetry import tracing
from in_process_server import DeviceGate, batcher_of, until
from messages import distinct, pixels
from raw_stream import RawStream, kinds
from server_toml import model_toml, server_toml

TOML = server_toml(model_toml("mlp", "tiny_mlp", max_batch_size=4), model_toml("poisonous"), default_model="mlp")
ON = "[tracing]\nenabled = true\n"
IMAGE = distinct(1)[0]
EXPLAIN, STREAM = "heatlens.v1.ExplainService/Explain", "heatlens.v1.ExplainService/StreamExplain"
STAGES = ["compute", "decode", "encode", "queue"]

Spans = list[ReadableSpan]


@pytest.fixture
def exporter(monkeypatch) -> InMemorySpanExporter:
    made = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "otlp_exporter", lambda: made)
    return made


@pytest.fixture
async def served(exporter, start_server) -> Server:
    return await start_server(TOML + ON)


@pytest.fixture
async def stub(served) -> Iterator[explain_pb2_grpc.ExplainServiceStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options=[("grpc.enable_retries", 0)]) as made:
        yield explain_pb2_grpc.ExplainServiceStub(made)


@pytest.fixture
def spans(served, exporter) -> Callable[[], object]:
    """End the server; all spans."""

    async def spans() -> Spans:
        await until(lambda: served._gate.in_flight == 0)
        await served.drain(5.0)
        return list(exporter.get_finished_spans())

    return spans


def named(spans: Spans, name: str) -> Spans:
    return [span for span in spans if span.name == name]


def below(spans: Spans, parent: ReadableSpan) -> Spans:
    found = [span for span in spans if span.parent is not None and span.parent.span_id == parent.context.span_id]
    assert all(span.context.trace_id == parent.context.trace_id for span in found)
    return sorted(found, key=lambda span: span.name)


async def test_a_call_continues_its_callers_trace_and_its_stages_follow_each_other(served, spans):
    with TracerProvider().get_tracer("caller").start_as_current_span("caller's") as own:
        async with AsyncClient(f"127.0.0.1:{served.port}") as client:
            result = await client.explain(IMAGE)
    seen = await spans()
    (call,) = named(seen, EXPLAIN)
    assert (call.context.trace_id, call.parent.span_id) == (own.context.trace_id, own.context.span_id)
    assert call.kind is trace.SpanKind.SERVER
    assert call.status.is_unset
    assert call.resource.attributes["service.name"] == "heatlens"
    about = dict(call.attributes)
    assert about["rpc.method"], about["rpc.service"] == ("Explain", "heatlens.v1.ExplainService")
    assert (about["rpc.response.status_code"], about["heatlens.model"]) == ("OK", "mlp")
    assert (about["heatlens.explanation"], about["heatlens.batch_size"]) == ("grad-cam", 1)
    stages = below(seen, call)
    assert [span.name for span in stages] == ["batch", *STAGES]
    batch, compute, decode, encode, queue = stages
    ordered = [call.start_time, decode.start_time, queue.start_time, compute.start_time, encode.start_time]
    assert ordered == sorted(ordered)
    assert max(span.end_time for span in stages if span is not batch) <= call.end_time
    assert queue.end_time == pytest.approx(compute.start_time, abs=1e5)
    assert (compute.end_time - compute.start_time) / 1e6 == pytest.approx(result.timing.compute_ms, abs=0.01)
    assert [link.context.span_id for link in batch.links] == [call.context.span_id]


async def test_a_batch_is_linked_to_all_of_its_calls(served, stub, spans):
    gate = DeviceGate(served)
    await gate.fill()
    calls = [stub.Explain(pb.ExplainRequest(image=pixels(IMAGE))) for _ in range(3)]
    await until(lambda: batcher_of(served).waiting == 3)
    gate.open()
    for call in calls:
        await call
    seen = await spans()
    # The gate's own images belong to no call.
    (batch,) = named(seen, "batch")
    linked = {link.context.span_id for link in batch.links}
    assert linked == {span.context.span_id for span in named(seen, EXPLAIN)}
    assert batch.parent.span_id in linked
    assert (len(linked), batch.attributes["heatlens.batch_size"], batch.attributes["heatlens.failed"]) == (3, 3, 0)


async def test_calls_that_fail_or_are_cancelled(served, stub, spans):
    async with AsyncClient(f"127.0.0.1:{served.port}") as client:
        with pytest.raises(InvalidArgumentError):
            await client.explain(b"garbage")
        with pytest.raises(InternalError):
            await client.explain(IMAGE * 0 + 255, model="poisonous")
    gate = DeviceGate(served)
    await gate.fill()
    left = stub.Explain(pb.ExplainRequest(image=pixels(IMAGE)))
    await until(lambda: batcher_of(served).waiting == 1)
    left.cancel()
    await until(lambda: served._gate.in_flight == 0)
    gate.open()
    seen = await spans()
    by_code = {span.attributes["rpc.response.status_code"]: span for span in named(seen, EXPLAIN)}
    assert set(by_code) == {"INVALID_ARGUMENT", "INTERNAL", "CANCELLED"}
    stages = {code: [span.name for span in below(seen, call)] for code, call in by_code.items()}
    assert stages == {"INVALID_ARGUMENT": [], "INTERNAL": ["batch", "decode"], "CANCELLED": ["decode"]}
    assert {code for code, call in by_code.items() if not call.status.is_unset} == {"INTERNAL"}
    assert by_code["INTERNAL"].attributes["error.type"] == "INTERNAL"
    (batch,) = named(seen, "batch")
    assert batch.attributes["heatlens.failed"] == 1


async def test_each_frame_is_a_trace_linked_to_its_stream(stub, spans):
    stream = RawStream(stub)
    await stream.open(explain_every=2)
    sent = [IMAGE, IMAGE, pb.Image(encoded=b"garbage"), IMAGE, IMAGE]
    for i, image in enumerate(sent):
        await stream.send(i + 1, image)
    answered = kinds(await stream.finish())
    assert [kind for _, kind in answered] == ["result", "skipped", "INVALID_ARGUMENT", "skipped", "result"]
    seen = await spans()
    (call,) = named(seen, STREAM)
    assert (call.attributes["heatlens.frames_explained"], call.attributes["heatlens.frames_failed"]) == (2, 1)
    frames = sorted(named(seen, "frame"), key=lambda span: span.attributes["heatlens.frame_id"])
    assert [(frame.attributes["heatlens.frame_id"], frame.attributes["heatlens.outcome"]) for frame in frames] == [
        (1, "explained"),
        (3, "failed"),
        (5, "explained"),
    ]
    for frame in frames:
        assert frame.parent is None
        assert frame.context.trace_id != call.context.trace_id
        assert [link.context.span_id for link in frame.links] == [call.context.span_id]
    assert [span.name for span in below(seen, frames[1])] == []
    for frame in (frames[0], frames[2]):
        assert set(STAGES) <= {span.name for span in below(seen, frame)}


async def test_steps_are_spans(served, spans):
    async with AsyncClient(f"127.0.0.1:{served.port}") as client:
        await client.explain(IMAGE, method="recipro-cam")
    seen = await spans()
    (call,) = named(seen, EXPLAIN)
    steps = [span for span in below(seen, call) if span.name == "step"]
    assert steps
    (compute,) = named(seen, "compute")
    assert compute.start_time <= min(span.start_time for span in steps) + 1e6
    assert not named(seen, "batch")


async def test_what_the_caller_does_not_sample_is_not_recorded(stub, spans):
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    await stub.Explain(pb.ExplainRequest(image=pixels(IMAGE)), metadata=[("traceparent", parent)])
    assert await spans() == []


def test_a_server_loads_neither_library_unless_it_is_switched_on():
    program = (
        "import heatlens, heatlens_server.app, sys; print({'prometheus_client', 'opentelemetry'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
