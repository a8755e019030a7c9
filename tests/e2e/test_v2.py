"""The open inference protocol on the port of the native one: same answers, same limits, same ends."""

import asyncio
import dataclasses

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from heatlens_server.transports.grpc.v2 import inference_pb2
from in_process_server import DeviceGate, batcher_of, until
from messages import Details, distinct, encoded, map_of, pixels
from raw_stream import PATIENCE_S, RawStream
from server_toml import model_toml, server_toml
from v2_calls import V2Calls, arrays, infer_request, method

SIZES = {"layer": pb.MAP_SIZE_LAYER, "input": pb.MAP_SIZE_INPUT, "source": pb.MAP_SIZE_SOURCE}
PICTURES = distinct(4)


@pytest.fixture
def v2(channel):
    return V2Calls(channel)


@pytest.fixture
def gate(live):
    made = DeviceGate(live)
    yield made
    made.open()


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code().name, Details(raised.value)


async def read(stream):
    async with asyncio.timeout(PATIENCE_S):
        return await stream.read()


@pytest.mark.parametrize("size", SIZES)
async def test_a_map_is_that_of_a_native_call(stub, v2, size):
    file = encoded(PICTURES[0]).encoded
    options = pb.ExplainOptions(top_k=2, map_size=SIZES[size], layers=["body"])
    native = await stub.Explain(pb.ExplainRequest(model="mlp", image=pb.Image(encoded=file), options=options))
    for image in (file, PICTURES[0]):
        response = await v2.infer(image, model="mlp", request_id="7", top_k=2, map_size=size, layer="body")
        assert (response.model_name, response.model_version, response.id) == ("mlp", native.model_version, "7")
        found = arrays(response)
        expected = np.stack([map_of(one) for one in native.explanations])
        assert (found["MAP"].shape, found["MAP"].max()) == ((1, *expected.shape), 1)
        np.testing.assert_allclose(found["MAP"][0], expected, atol=1e-6)
        assert found["CLASS_ID"].tolist() == [[one.class_id for one in native.explanations]]
        np.testing.assert_allclose(found["SCORE"][0], [one.probability for one in native.explanations], atol=1e-6)
        assert found["LABEL"] == [one.label for one in native.explanations]


async def test_images_of_a_request_share_a_batch_and_are_stacked(live, v2, gate):
    await gate.fill()
    asked = v2.infer(*PICTURES, targets=[1, 3, 5, 7], outputs=["CLASS_ID", "MAP"])
    await until(lambda: len(batcher_of(live)) == 4)
    gate.open()
    batched = arrays(await asked)
    assert [len(batch) for batch in gate.batches] == [1, 1, 4]
    assert batched["CLASS_ID"].tolist() == [[1], [3], [5], [7]]
    for i, picture in enumerate(PICTURES):
        alone = arrays(await v2.infer(picture, targets=[2 * i + 1], outputs=["MAP"]))
        assert list(alone) == ["MAP"]
        np.testing.assert_allclose(batched["MAP"][i], alone["MAP"][0], atol=1e-5)


async def test_one_bad_image_fails_its_request_by_index_and_nobody_elses(live, v2):
    good = encoded(PICTURES[0]).encoded
    bad, other = v2.infer(good, b"garbage", good), v2.infer(good)
    code, details = await refused(bad)
    assert (code, details.info.reason, details.fields) == ("INVALID_ARGUMENT", "IMAGE_UNDECODABLE", ["IMAGE[1]"])
    assert len(arrays(await other)["LABEL"]) == 1
    await until(lambda: len(batcher_of(live)) == 0)


@pytest.mark.parametrize(
    ("asked", "code", "reason", "fields"),
    [
        ({"model": "nope"}, "NOT_FOUND", "MODEL_NOT_FOUND", []),
        ({"model": "broken"}, "FAILED_PRECONDITION", "MODEL_FAILED", []),
        ({"top_k": 100}, "INVALID_ARGUMENT", "INVALID_OPTION", ["parameters.top_k"]),
        ({"layer": "nope"}, "INVALID_ARGUMENT", "INVALID_OPTION", ["parameters.layer"]),
        ({"targets": [99]}, "INVALID_ARGUMENT", "INVALID_OPTION", ["TARGET_CLASS"]),
    ],
)
async def test_errors(v2, asked, code, reason, fields):
    found, details = await refused(v2.infer(PICTURES[0], **asked))
    assert (found, details.info.reason, details.fields) == (code, reason, fields)


async def test_a_timeout_by_parameter_is_a_deadline(v2):
    code, details = await refused(v2.infer(PICTURES[0], timeout=1))
    assert (code, details.info.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXPIRED")


async def test_versions(v2):
    version = (await v2.infer(PICTURES[0])).model_version
    request = infer_request(PICTURES[0], model="mlp")
    request.model_version = version
    assert (await v2.call("ModelInfer", request)).model_version == version
    request.model_version = "nope"
    code, details = await refused(v2.call("ModelInfer", request))
    assert (code, "mlp" in details.message, version in details.message) == ("NOT_FOUND", True, True)


async def test_all_images_of_a_request_get_the_version_of_the_first(start_server):
    versions = [
        model_toml("m", "tiny_mlp").replace("[[models]]", f"[[models]]\n{keys}")
        for keys in ('version = "1"', 'version = "2"\nweight = 0.5')
    ]
    server = await start_server(server_toml(*versions))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        v2 = V2Calls(channel)
        alone = [(await v2.infer(one)).model_version for one in PICTURES]
        assert set(alone) == {"1", "2"}
        for first in range(len(PICTURES)):
            turned = PICTURES[first:] + PICTURES[:first]
            assert (await v2.infer(*turned)).model_version == alone[first]
        metadata = await v2.call("ModelMetadata", inference_pb2.ModelMetadataRequest(name="m"))
        assert list(metadata.versions) == ["1", "2"]


async def test_what_is_there(v2):
    assert (await v2.call("ServerLive")).live
    assert (await v2.call("ServerReady")).ready
    assert (await v2.call("ServerMetadata")).name == "heatlens"
    ready = {name: inference_pb2.ModelReadyRequest(name=name) for name in ("", "mlp", "broken", "nope")}
    assert [(await v2.call("ModelReady", ready[name])).ready for name in ("", "mlp", "broken")] == [True, True, False]
    assert (await refused(v2.call("ModelReady", ready["nope"])))[0] == "NOT_FOUND"
    metadata = await v2.call("ModelMetadata", inference_pb2.ModelMetadataRequest(name="mlp"))
    assert (metadata.name, len(metadata.versions)) == ("mlp", 1)
    index = (await v2.call("RepositoryIndex", inference_pb2.RepositoryIndexRequest(ready=True))).models
    assert [(one.name, one.state) for one in index] == [("mlp", "READY"), ("poisonous", "READY")]
    named = inference_pb2.RepositoryIndexRequest(repository_name="other")
    code, details = await refused(v2.call("RepositoryIndex", named))
    assert (code, details.fields) == ("INVALID_ARGUMENT", ["repository_name"])


async def test_an_idle_model_answers_as_natively(start_server):
    """It is ready, tells what it told before, and any kind of request loads it."""
    server = await start_server(server_toml(model_toml("a", "tiny_mlp"), model_toml("b", "tiny_mlp")))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        v2, health = V2Calls(channel), health_pb2_grpc.HealthStub(channel)

        async def told():
            named = {"name": "a"}
            return [
                (await v2.call("ServerReady")).ready,
                (await v2.call("ModelReady", inference_pb2.ModelReadyRequest(**named))).ready,
                await v2.call("ModelMetadata", inference_pb2.ModelMetadataRequest(**named)),
                await v2.call("ModelConfig", inference_pb2.ModelConfigRequest(**named)),
                (await v2.call("RepositoryIndex")).models[0].state,
            ]

        async def stream(*images, **asked):
            opened = v2.stream()
            await opened.write(infer_request(*images, **asked))
            await opened.done_writing()
            answer = await read(opened)
            assert not answer.error_message
            return answer.infer_response

        before = await told()
        assert (before[:2], before[-1]) == ([True, True], "READY")
        for ask, images in ((v2.infer, PICTURES[:1]), (v2.infer, PICTURES), (stream, PICTURES[:1])):
            served = next(one for one in server.fleet if one.name == "a")
            await server.fleet.rest(served, "the test says so")
            assert await told() == before
            native = await health.Check(health_pb2.HealthCheckRequest(service="heatlens.v1.ExplainService/a"))
            assert native.status == health_pb2.HealthCheckResponse.SERVING
            assert (await v2.call("RepositoryIndex")).models[0].reason.startswith("idle")
            assert len(arrays(await ask(*images, model="a"))["LABEL"]) == len(images)
            assert [one.reason for one in (await v2.call("RepositoryIndex")).models] == ["", ""]


async def test_statistics_count_calls_images_and_runs(live, v2, stub, gate):
    statistics = inference_pb2.ModelStatisticsRequest(name="mlp")

    async def told():
        (one,) = (await v2.call("ModelStatistics", statistics)).model_stats
        return one, {field.name: part.count for field, part in one.inference_stats.ListFields() if part.count}

    assert (await told())[1] == {}
    await gate.fill()  # two runs of the gate's own, which answer nobody
    asked = v2.infer(*PICTURES)
    await until(lambda: len(batcher_of(live)) == 4)
    gate.open()
    await asked
    await stub.Explain(pb.ExplainRequest(model="mlp", image=pixels(PICTURES[0])))
    await refused(v2.infer(b"garbage"))
    stream = v2.stream()
    for one in (PICTURES[0], b"garbage"):
        await stream.write(infer_request(one))
    await stream.done_writing()
    for _ in range(2):
        await read(stream)
    await until(lambda: live.streams.counters.open == 0)
    images = dict.fromkeys(("queue", "compute_infer", "compute_output"), 6)
    # Those of the gate are decoded as well.
    expected = {"success": 3, "fail": 2, "compute_input": 8, **images}
    async with asyncio.timeout(PATIENCE_S):
        # A caller may have its answer before it is counted.
        while (await told())[1] != expected or (await told())[0].execution_count < len(gate.batches):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    one, _ = await told()
    assert (one.inference_count, one.execution_count, one.last_inference > 0) == (6, len(gate.batches), True)
    assert (one.name, one.version) == ("mlp", (await v2.infer(PICTURES[0])).model_version)
    everything = await v2.call("ModelStatistics")
    assert [one.name for one in everything.model_stats] == ["mlp", "poisonous", "broken"]
    statistics.version = "nope"
    assert (await refused(v2.call("ModelStatistics", statistics)))[0] == "NOT_FOUND"


async def test_a_request_holds_no_more_than_a_message_and_a_queue_take(v2):
    # Four maps of a megabyte are more than a message, though each of them is not.
    large = [np.zeros((300, 300, 3), np.uint8)] * 3
    code, details = await refused(v2.infer(*large, map_size="source"))
    assert (code, details.info.reason, details.fields) == (
        "INVALID_ARGUMENT",
        "ANSWER_TOO_LARGE",
        ["parameters.map_size"],
    )
    assert arrays(await v2.infer(*large[:2], map_size="source", outputs=["MAP"]))["MAP"].shape == (2, 1, 300, 300)
    code, details = await refused(v2.infer(*[np.zeros((1, 1, 3), np.uint8)] * 257))
    assert (code, "at most 256 images" in details.message) == ("INVALID_ARGUMENT", True)


async def test_a_message_of_many_elements_is_refused_and_ends_a_stream(channel):
    many = inference_pb2.InferTensorContents(uint_contents=bytes(500_000))
    bomb = infer_request(PICTURES[0])
    bomb.inputs[0].contents.CopyFrom(many)
    code, details = await refused(V2Calls(channel).call("ModelInfer", bomb))
    assert (code, details.info.reason) == ("INVALID_ARGUMENT", "MESSAGE_TOO_COMPLEX")
    stream = V2Calls(channel).stream()
    await stream.write(infer_request(PICTURES[0], request_id="first"))
    await stream.write(bomb)
    assert (await read(stream)).infer_response.id == "first"
    code, details = await refused(read(stream))
    assert (code, details.info.reason) == ("INVALID_ARGUMENT", "MESSAGE_TOO_COMPLEX")


async def test_a_full_server_refuses_before_it_reads(start_server):
    server = await start_server(server_toml(model_toml("mlp", "tiny_mlp", max_batch_size=1), max_queue_length=1))
    gate = DeviceGate(server)
    await gate.fill()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=[("grpc.enable_retries", 0)]) as channel:
        waiting = V2Calls(channel).infer(PICTURES[0])
        await until(lambda: batcher_of(server).refusal() is not None)
        silent = channel.stream_unary(method("ModelInfer"))()
        code, details = await refused(silent)
        assert (code, details.info.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        gate.open()
        await waiting


async def test_a_stream_answers_in_order_and_errors_are_values(v2):
    stream = v2.stream()
    requests = [infer_request(one, request_id=str(i), outputs=["LABEL"]) for i, one in enumerate(PICTURES)]
    requests[2] = infer_request(b"garbage", request_id="2")
    for request in requests:
        await stream.write(request)
    await stream.done_writing()
    answers = [await read(stream) for _ in requests]
    assert [one.infer_response.id for one in answers] == ["0", "1", "2", "3"]
    assert [one.error_message[:6] for one in answers] == ["", "", "IMAGE:", ""]
    assert await read(stream) is grpc.aio.EOF
    assert await stream.code() is grpc.StatusCode.OK


async def test_requests_of_a_stream_run_together(v2, gate):
    with gate.closed():
        stream = v2.stream()
        await stream.write(infer_request(PICTURES[0]))
        await until(lambda: gate.entered == 1)
        for one in PICTURES:
            await stream.write(infer_request(one))
        await stream.done_writing()
    for _ in range(5):
        assert not (await read(stream)).error_message
    assert sum(map(len, gate.batches)) == 5
    assert len(gate.batches) < 5


async def test_streams_of_both_kinds_share_their_number(live, stub, v2):
    streams = [v2.stream() for _ in range(3)]
    await until(lambda: live.streams.counters.streams.open == 3)
    other = RawStream(stub)
    await other.configure()
    code, details, _ = await other.failure()
    assert (code.name, details.info.reason) == ("RESOURCE_EXHAUSTED", "STREAM_LIMIT")
    for stream in streams:
        stream.cancel()


async def test_a_client_that_leaves_gives_everything_back(live, v2, gate):
    await gate.fill()
    stream = v2.stream()
    for one in PICTURES:
        await stream.write(infer_request(one))
    await until(lambda: len(batcher_of(live)) == 4)
    stream.cancel()
    await until(lambda: len(batcher_of(live)) == 0)
    gate.open()


async def test_a_drain_answers_what_was_read_and_ends_the_stream(start_server):
    server = await start_server(server_toml(model_toml("mlp", "tiny_mlp")))
    gate = DeviceGate(server)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with gate.closed():
            stream = V2Calls(channel).stream()
            for i in range(2):
                await stream.write(infer_request(PICTURES[i], request_id=str(i)))
            await until(lambda: server.streams.counters.frames.open == 2)
            draining = asyncio.create_task(server.drain(PATIENCE_S))
            await until(lambda: server._gate._draining)
            code, details = await refused(V2Calls(channel).call("ServerReady"))
            assert (code, details.info.reason) == ("UNAVAILABLE", "SERVER_DRAINING")
        assert [(await read(stream)).infer_response.id for _ in range(2)] == ["0", "1"]
        code, details = await refused(read(stream))
        assert (code, details.info.reason) == ("UNAVAILABLE", "SERVER_DRAINING")
        assert await draining
    counters = dataclasses.asdict(server.streams.counters)
    assert all(one["created"] == one["released"] for one in counters.values())


async def test_the_token_is_asked_for(start_server):
    server = await start_server(server_toml(model_toml("mlp", "tiny_mlp"), token="secret"))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        v2 = V2Calls(channel)
        for name in ("ServerLive", "ModelInfer"):
            assert (await refused(v2.call(name)))[0] == "UNAUTHENTICATED"
        assert (await v2.call("ServerLive", metadata=[("authorization", "Bearer secret")])).live


async def test_it_can_be_turned_off(start_server):
    server = await start_server(server_toml(model_toml("mlp", "tiny_mlp"), v2=False))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await V2Calls(channel).call("ServerLive")
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
        request = pb.ExplainRequest(image=pixels(PICTURES[0]))
        assert (await explain_pb2_grpc.ExplainServiceStub(channel).Explain(request)).explanations
