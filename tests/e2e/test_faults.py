"""Faults under load: cancellation, deadlines, a full queue, exceptions everywhere. A real server on a real port."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio

from heatlens import Client
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from heatlens_server.api import checks, explainer
from heatlens_server.app import Server
from heatlens_server.transports.grpc import services
from in_process_server import DeviceGate, batcher_of, until
from messages import Details, distinct, encoded, map_of, pixels
from server_toml import model_toml, server_toml

# On torch, whose batches take long enough for others to gather.
TOML = server_toml(
    model_toml("mlp", "tiny_mlp", max_batch_size=64),
    model_toml("poisonous"),
    max_queue_length=80,
    max_calls_per_connection=2000,
)


@pytest_asyncio.fixture
async def live(start_server) -> Server:
    """A server on this test's loop."""
    return await start_server(TOML)


def request(image: np.ndarray, model: str = "mlp") -> pb.ExplainRequest:
    return pb.ExplainRequest(model=model, image=pixels(image))


async def failure(call) -> tuple[grpc.StatusCode, Details | None]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), Details.of(raised.value)


async def test_eight_callers_share_a_batch_and_get_their_own_maps(live, stub):
    images = distinct(8)
    alone = [await stub.Explain(request(image)) for image in images]
    gate = DeviceGate(live)
    await gate.fill()
    calls = [stub.Explain(request(image)) for image in images]
    await until(lambda: batcher_of(live).waiting == 8)
    gate.open()
    together = await asyncio.gather(*calls)
    for one, other in zip(alone, together, strict=True):
        assert one.timing.batch_size == 1
        assert other.timing.batch_size == 8
        np.testing.assert_allclose(map_of(one.explanations[0]), map_of(other.explanations[0]), atol=1e-5)
        assert one.explanations[0].class_id == other.explanations[0].class_id


async def test_cancelling_one_of_eight_leaves_seven_right_answers(live, stub):
    images = distinct(8)
    alone = [await stub.Explain(request(image)) for image in images]
    gate = DeviceGate(live)
    await gate.fill()
    calls = [stub.Explain(request(image)) for image in images]
    await until(lambda: batcher_of(live).waiting == 8)
    calls[3].cancel()
    await until(lambda: batcher_of(live).waiting == 7)
    gate.open()
    for i, call in enumerate(calls):
        if i == 3:
            with pytest.raises(asyncio.CancelledError):
                await call
            continue
        answer = await call
        assert answer.timing.batch_size == 7
        np.testing.assert_allclose(map_of(answer.explanations[0]), map_of(alone[i].explanations[0]), atol=1e-5)


async def test_cancel_storm_leaks_no_place_in_the_queue(live, stub):
    image = distinct(1)[0]
    for _ in range(10):  # a connection may have 256 calls at once, and those that are cancelled end a little later
        calls = [stub.Explain(request(image)) for _ in range(20)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*(call.code() for call in calls))
    await until(lambda: len(batcher_of(live)) == 0)
    assert (await stub.Explain(request(image))).explanations


async def test_deadline_that_expires_in_the_queue_spares_the_model(live, stub):
    image = distinct(1)[0]
    await stub.Explain(request(image))
    gate = DeviceGate(live)
    await gate.fill()
    code, _ = await failure(stub.Explain(request(image), timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: len(batcher_of(live)) == 0)
    gate.open()
    await stub.Explain(request(image))
    assert gate.batches == [[(0, 0, 0)], [(0, 0, 0)], [tuple(image[0, 0])]]


async def test_full_queue_refuses_at_once_and_recovers(live, stub):
    image = distinct(1)[0]
    gate = DeviceGate(live)
    await gate.fill()
    waiting = [stub.Explain(request(image)) for _ in range(80)]
    await until(lambda: batcher_of(live).waiting == 80)
    loop = asyncio.get_running_loop()
    started = loop.time()
    code, details = await failure(stub.Explain(request(image)))
    assert loop.time() - started < 5  # refused, not queued: nothing will run before the gate is open
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details is not None
    assert details.info.reason == "QUEUE_FULL"
    assert details.has_retry
    assert int(details.pushback_ms) > 0
    gate.open()
    answers = await asyncio.gather(*waiting)
    assert len(answers) == 80
    assert (await stub.Explain(request(image))).explanations


async def test_poison_image_fails_alone_with_nothing_of_ours_in_the_text(live, stub, caplog):
    images = distinct(4)
    white = np.full((64, 64, 3), 255, np.uint8)
    gate = DeviceGate(live, "poisonous")
    await gate.fill()
    calls = [stub.Explain(request(image, "poisonous")) for image in [*images[:2], white, *images[2:]]]
    await until(lambda: batcher_of(live, "poisonous").waiting == 5)
    gate.open()
    code, details = await failure(calls.pop(2))
    assert code is grpc.StatusCode.INTERNAL
    assert details is not None
    assert details.request_id in details.message
    assert "secret-poison-text" not in details.message
    assert "secret-poison-text" in caplog.text
    for answer in await asyncio.gather(*calls):
        assert answer.explanations


PLACES = {
    "decode_plain": checks,
    "fit_source": checks,
    "plan_query": explainer,
    "answer_of": explainer,
    "query_of": services,
    "response_of": services,
}


@pytest.mark.parametrize("place", PLACES)
async def test_exception_inside_is_internal_and_the_server_lives(live, stub, monkeypatch, caplog, place):
    def fail(*_args, **_kwargs):
        raise KeyError("secret-token-123")

    image = distinct(1)[0]
    sent = pb.ExplainRequest(model="mlp", image=encoded(image))
    with monkeypatch.context() as patched:
        patched.setattr(PLACES[place], place, fail)
        code, details = await failure(stub.Explain(sent, metadata=[("x-request-id", "my-request.1")]))
    assert code is grpc.StatusCode.INTERNAL
    assert details is not None
    assert details.message == "internal error; request id my-request.1"
    assert details.info.reason == "INTERNAL"
    assert "secret-token-123" in caplog.text
    assert any(getattr(record, "request_id", None) == "my-request.1" for record in caplog.records)
    assert (await stub.Explain(sent)).explanations
    assert len(batcher_of(live)) == 0


async def test_sixty_four_callers_with_distinct_images_get_their_own_maps(stub):
    images = distinct(64)
    alone = [await stub.Explain(request(image)) for image in images]
    for _ in range(3):
        together = await asyncio.gather(*(stub.Explain(request(image)) for image in images))
        assert max(answer.timing.batch_size for answer in together) > 1
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(map_of(one.explanations[0]), map_of(other.explanations[0]), atol=1e-5)


def test_sixty_four_threads_that_share_a_client_get_their_own_maps(server):
    images = distinct(64)
    with Client(server.address) as client, ThreadPoolExecutor(64) as pool:
        alone = [client.explain(image, model="tiny_mlp") for image in images]
        together = list(pool.map(lambda image: client.explain(image, model="tiny_mlp"), images))
    assert max(result.timing.batch_size for result in together) > 1
    for one, other in zip(alone, together, strict=True):
        assert one.explanations[0].class_id == other.explanations[0].class_id
        np.testing.assert_allclose(one.explanations[0].heatmap.values, other.explanations[0].heatmap.values, atol=1e-5)


async def test_garbage_bytes_are_the_callers_fault(live):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{live.port}") as channel:
        raw = channel.unary_unary("/heatlens.v1.ExplainService/Explain")
        for garbage in (b"\xff\xff\xff\xff", b"\x0a\xff", bytes(range(256))):
            code, details = await failure(raw(garbage))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert details is not None
            assert details.info.reason == "MESSAGE_UNDECODABLE"


async def test_every_call_is_one_json_line_with_its_request_id(server):
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        await stub.Explain(request(distinct(1)[0], "tiny"), metadata=[("x-request-id", "find-me")])
    # Lines are written by a thread of their own.
    await until(lambda: "find-me" in server.log())
    lines = [json.loads(line) for line in server.log().splitlines() if "find-me" in line]
    assert len(lines) == 1
    assert lines[0]["code"] == "OK"
    assert lines[0]["method"] == "/heatlens.v1.ExplainService/Explain"
    assert lines[0]["duration_ms"] > 0
