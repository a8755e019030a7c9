"""/metrics of a real server, number by number against what its clients saw."""

import asyncio
from collections.abc import Iterator

import grpc.aio
import pytest
from prometheus_client.openmetrics import parser as strict
from prometheus_client.parser import text_string_to_metric_families

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2, model_pb2, model_pb2_grpc
from heatlens_server.app import Server
from heatlens_server.core.errors import ConfigError
from in_process_server import PATIENCE_S, DeviceGate, batcher_of, until
from messages import distinct, encoded, pixels
from raw_stream import RawStream, kinds
from scrapes import METRICS, OPENMETRICS, probe, scrape_text
from server_toml import model_toml, server_toml

TOML = server_toml(model_toml("mlp", "tiny_mlp", max_batch_size=4), model_toml("broken"), default_model="mlp")
IMAGE = distinct(1)[0]

Samples = dict[tuple[str, ...], float]


@pytest.fixture
async def served(start_server) -> Server:
    return await start_server(TOML + METRICS)


@pytest.fixture
async def channel(served) -> Iterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}", options=[("grpc.enable_retries", 0)]) as made:
        yield made


async def scrape(server: Server) -> Samples:
    """Every sample, by its name without "heatlens_" and its labels' values, sorted by the labels' names."""
    return {
        (sample.name.removeprefix("heatlens_"), *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(await scrape_text(server))
        for sample in family.samples
    }


async def scrape_once_ran(server: Server, images: int) -> Samples:
    """A scrape once batches of so many images in all have ended, which is told a moment after their answers."""
    async with asyncio.timeout(PATIENCE_S):
        while (await scrape(server)).get(("batch_size_images_sum", "mlp")) != images:
            pass
    await until(lambda: server._gate.in_flight == 0)
    return await scrape(server)


def named(samples: Samples, name: str) -> Samples:
    return {labels: value for (found, *labels), value in samples.items() if found == name for labels in [tuple(labels)]}


def buckets(samples: Samples, name: str, model: str) -> dict[float, int]:
    """How many values came to lie in each bucket of a histogram, by the bucket's upper bound; empty ones left out."""
    bounds = sorted(
        (float(le), int(value)) for (le, of), value in named(samples, f"{name}_bucket").items() if of == model
    )
    counts = [(le, value - below) for (le, value), (_, below) in zip(bounds, [(0.0, 0), *bounds], strict=False)]
    return {le: count for le, count in counts if count}


def request(model: str = "", image: pb.Image | None = None, **options: object) -> pb.ExplainRequest:
    return pb.ExplainRequest(model=model, image=image or pixels(IMAGE), options=pb.ExplainOptions(**options))


async def code_of(call: "grpc.aio.UnaryUnaryCall") -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_calls_are_counted_as_their_callers_saw_them(served, channel):
    stub = explain_pb2_grpc.ExplainServiceStub(channel)
    answers = [await stub.Explain(request()) for _ in range(3)]
    answers += [await stub.Explain(request("mlp", encoded(IMAGE), method=method_pb2.METHOD_HI_RES_CAM))]
    steps = await stub.Explain(request(method=method_pb2.METHOD_RECIPRO_CAM))
    assert await code_of(stub.Explain(request("secret-customer"))) == "NOT_FOUND"
    assert await code_of(stub.Explain(request("broken"))) == "FAILED_PRECONDITION"
    assert await code_of(stub.Explain(request(image=pb.Image(encoded=b"garbage")))) == "INVALID_ARGUMENT"
    assert await code_of(stub.Explain(request(top_k=99))) == "INVALID_ARGUMENT"
    await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())

    gate = DeviceGate(served)
    await gate.fill()
    assert await code_of(stub.Explain(request(), timeout=0.05)) == "DEADLINE_EXCEEDED"
    await until(lambda: served._gate.in_flight == 0)
    left = stub.Explain(request())
    await until(lambda: batcher_of(served).waiting == 1)
    now = await scrape(served)
    assert (now["queue_length", "mlp"], now[("calls_in_flight",)]) == (1, 1)
    assert now["in_flight_bytes", "requests"] > IMAGE.nbytes
    left.cancel()
    await until(lambda: served._gate.in_flight == 0)
    gate.open()
    # Four of one pass, and the gate's own two.
    seen = await scrape_once_ran(served, 6)
    # Labels: code, explanation, model, rpc.
    calls = named(seen, "calls_total")
    late = sum(calls.pop((code, "grad-cam", "mlp", "Explain"), 0) for code in ("CANCELLED", "DEADLINE_EXCEEDED"))
    assert late == 2
    assert calls == {
        ("OK", "grad-cam", "mlp", "Explain"): 3,
        ("OK", "hi-res-cam", "mlp", "Explain"): 1,
        ("OK", "recipro-cam", "mlp", "Explain"): 1,
        ("NOT_FOUND", "", "", "Explain"): 1,
        ("FAILED_PRECONDITION", "", "broken", "Explain"): 1,
        ("INVALID_ARGUMENT", "grad-cam", "mlp", "Explain"): 1,
        ("INVALID_ARGUMENT", "", "mlp", "Explain"): 1,
        ("OK", "", "", "ListModels"): 1,
    }
    assert "secret-customer" not in await scrape_text(served)
    assert named(seen, "call_duration_seconds_count") == {
        ("", "Explain"): 1,
        ("broken", "Explain"): 1,
        ("mlp", "Explain"): 9,
        ("", "ListModels"): 1,
    }
    assert named(seen, "images_explained_total") == {
        ("grad-cam", "mlp"): 3,
        ("hi-res-cam", "mlp"): 1,
        ("recipro-cam", "mlp"): 1,
    }
    timings = [answer.timing for answer in (*answers, steps)]
    for stage in ("queue", "compute"):
        told_ns = [getattr(timing, f"{stage}_duration").ToNanoseconds() for timing in timings]
        assert seen[f"{stage}_duration_seconds_count", "mlp"] == 5
        assert seen[f"{stage}_duration_seconds_sum", "mlp"] == pytest.approx(
            sum(told_ns) / 1e9, abs=5e-6
        )  # whole microseconds
    assert seen["encode_duration_seconds_count", "mlp"] == 5
    # Also the gate's own two, the one that was withdrawn, and perhaps the one that came too late.
    assert 8 <= seen["decode_duration_seconds_count", "mlp"] <= 9
    assert named(seen, "images_failed_total") == {("mlp",): 0}
    assert seen["steps_total", "mlp"] >= 1
    assert seen["device_busy_seconds_total", "cpu", "mlp"] >= seen["compute_duration_seconds_sum", "mlp"]
    assert (seen["queue_length", "mlp"], seen[("calls_in_flight",)]) == (0, 0)
    assert (seen["in_flight_bytes", "requests"], seen["in_flight_bytes", "answers"]) == (0, 0)


async def test_batches_are_counted_by_their_size(served, channel):
    stub = explain_pb2_grpc.ExplainServiceStub(channel)
    gate = DeviceGate(served)
    await gate.fill()
    calls = [asyncio.ensure_future(stub.Explain(request())) for _ in range(4)]
    await until(lambda: batcher_of(served).waiting == 4)
    gate.open()
    sizes = [answer.timing.batch_size for answer in await asyncio.gather(*calls)]
    assert sizes == [4] * 4
    seen = await scrape_once_ran(served, 6)
    assert buckets(seen, "batch_size_images", "mlp") == {1.0: 2, 4.0: 1}


async def test_frames_are_counted_as_their_client_saw_them(served, channel):
    stub = explain_pb2_grpc.ExplainServiceStub(channel)
    gate = DeviceGate(served)
    stream = RawStream(stub)
    await stream.open(overflow_policy=pb.OVERFLOW_POLICY_DROP_OLDEST, max_in_flight=2, explain_every=2)
    assert (await scrape(served))[("open_streams",)] == 1
    await gate.fill()
    for i in range(0, 16, 2):
        await stream.send(i + 1, pb.Image(encoded=b"garbage") if i == 2 else IMAGE)
        await stream.send(i + 2, IMAGE)
    await until(lambda: served.streams.counters.frames.created == 16)
    gate.open()
    answers = [kind for _, kind in kinds(await stream.finish())]
    outcomes = {
        "explained": answers.count("result"),
        "skipped": answers.count("skipped"),
        "dropped": answers.count("ABORTED") + answers.count("RESOURCE_EXHAUSTED"),
        "failed": answers.count("INVALID_ARGUMENT"),
    }
    assert outcomes["dropped"] > 0
    assert (outcomes["skipped"], sum(outcomes.values())) == (8, 16)
    await until(lambda: served._gate.in_flight == 0)
    seen = await scrape(served)
    assert named(seen, "frames_total") == {("mlp", kind): count for kind, count in outcomes.items() if count}
    assert seen["frame_age_seconds_count", "mlp"] == outcomes["explained"]
    assert named(seen, "calls_total") == {("OK", "grad-cam", "mlp", "StreamExplain"): 1}
    assert seen["images_explained_total", "grad-cam", "mlp"] == outcomes["explained"]
    assert seen[("open_streams",)] == 0


async def test_models_and_the_process(served):
    seen = await scrape(served)
    # Labels: model, state.
    assert {labels for labels, value in named(seen, "model_state").items() if value} == {
        ("broken", "failed"),
        ("mlp", "ready"),
    }
    assert named(seen, "model_changes_total") == {
        ("broken", "loading"): 1,
        ("broken", "failed"): 1,
        ("mlp", "loading"): 1,
        ("mlp", "ready"): 1,
    }
    model = served.fleet.get("mlp")
    assert named(seen, "model_info") == {("cpu", "torch", "mlp", "fp32", model.version): 1}
    assert seen["model_load_duration_seconds_count", "mlp"] == 1
    assert named(seen, "export_cache_lookups_total") == {}
    assert seen[("process_resident_memory_bytes",)] > 1e7


async def test_an_export_of_an_earlier_start_is_a_hit(start_server):
    toml = server_toml(model_toml("tiny", engine=None, layers=("body", "stem")) + "\nwait_for_export = true")
    first, second = [await start_server(toml + METRICS) for _ in range(2)]
    assert named(await scrape(first), "export_cache_lookups_total").keys() < {("tiny", "hit"), ("tiny", "miss")}
    assert named(await scrape(second), "export_cache_lookups_total") == {("tiny", "hit"): 1}


async def test_names_and_units_keep_to_the_rules(served, channel):
    await explain_pb2_grpc.ExplainServiceStub(channel).Explain(request())
    await until(lambda: served._gate.in_flight == 0)
    families = list(strict.text_string_to_metric_families(await scrape_text(served, OPENMETRICS)))
    ours = [family for family in families if not family.name.startswith("process_")]
    assert len(ours) > 20
    for family in ours:
        assert family.name.startswith("heatlens_")
        assert family.documentation.endswith(".")
        # https://prometheus.io/docs/practices/naming: base units, in the plural, no type in the name.
        assert not {"ms", "milliseconds", "kb", "mb", "percent", "counter", "gauge", "count", "total"} & set(
            family.name.split("_")
        )
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_images"))


async def test_an_address_that_is_taken_stops_the_start(served, start_server):
    with pytest.raises(ConfigError, match=r"^metrics\.listen: cannot listen on 127\.0\.0\.1:\d+: Address already"):
        await start_server(TOML + f'[metrics]\nlisten = "127.0.0.1:{served.metrics_port}"\n')


async def test_probes_say_by_http_what_health_says(start_server):
    server = await start_server(TOML + METRICS)
    assert await probe(server, "live") == (200, "live\n")
    assert await probe(server, "ready") == (200, "ready\n")
    await server.fleet.unload("mlp")
    assert await probe(server, "ready") == (503, "not ready\n")
    assert await probe(server, "live") == (200, "live\n")


async def test_it_is_off_unless_it_is_asked_for_and_ends_with_the_server(start_server):
    assert (await start_server(TOML)).metrics_port == 0
    server = await start_server(TOML + METRICS)
    assert await server.drain(1.0)
    with pytest.raises(OSError, match="refused"):
        await scrape(server)


async def test_the_memory_of_a_models_own_process_is_told(start_server):
    server = await start_server(
        server_toml('[[models]]\nname = "own"\nsource = "embedded:efficientnet_lite0"\nisolation = "process"') + METRICS
    )
    seen = named(await scrape(server), "model_process_resident_memory_bytes")
    assert [model for model, _version in seen] == ["own"]
    # Python, numpy and onnxruntime at least.
    assert all(30e6 < size_bytes < 2e9 for size_bytes in seen.values())
