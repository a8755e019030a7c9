"""A model of two engines on a real server: its answers, their order, and one of the two that fails."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from heatlens import AsyncClient, DeviceInfo, Health, ModelInfo
from heatlens_server.app import Server
from heatlens_server.scheduling import device_threads
from in_process_server import until
from messages import distinct
from scrapes import METRICS, scrape_text
from server_toml import model_toml, server_toml

IMAGES = distinct(24)
NAMES = ("cpu#0", "cpu#1")


@pytest_asyncio.fixture
async def live(start_server, monkeypatch) -> Server:
    monkeypatch.setattr(device_threads, "FIRST_RETRY_S", 0.01)
    one, two = (model_toml(name, "tiny_mlp", max_batch_size=4) for name in ("one", "two"))
    return await start_server(server_toml(one, f"{two}\ninstances = 2") + METRICS)


@pytest_asyncio.fixture
async def client(live) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"127.0.0.1:{live.port}") as made:
        yield made


async def model_of(client: AsyncClient) -> ModelInfo:
    return next(model for model in await client.models() if model.name == "two")


async def samples(live: Server, name: str) -> dict[str, float]:
    """The values of a metric by device, of the model with two."""
    families = text_string_to_metric_families(await scrape_text(live))
    found = [sample for family in families for sample in family.samples if sample.name == f"heatlens_{name}"]
    return {sample.labels["device"]: sample.value for sample in found if sample.labels["model"] == "two"}


async def test_callers_get_what_one_engine_says_from_both(live, client):
    expected = [await client.explain(image, model="one") for image in IMAGES]
    for _ in range(20):
        found = await asyncio.gather(*(client.explain(image, model="two") for image in IMAGES))
        for one, other in zip(expected, found, strict=True):
            (right,), (explanation,) = one.explanations, other.explanations
            np.testing.assert_allclose(explanation.heatmap.values, right.heatmap.values, atol=1e-6)
            assert explanation.class_id == right.class_id
        if len(await samples(live, "device_busy_seconds_total")) == 2:
            break
    assert sorted(await samples(live, "device_busy_seconds_total")) == list(NAMES)
    model = await model_of(client)
    assert model.devices == tuple(DeviceInfo(name, in_service=True) for name in NAMES)
    assert not model.is_degraded


async def test_answers_of_a_stream_are_in_the_order_of_its_frames(client):
    expected = [(await client.explain(image, model="one")).explanations[0].class_id for image in IMAGES]
    async with client.stream(model="two") as stream:
        items = [item async for item in stream.map(IMAGES * 4)]
    assert [item.frame_id for item in items] == sorted(item.frame_id for item in items)
    assert [item.result.explanations[0].class_id for item in items] == expected * 4


async def test_an_engine_that_fails_is_taken_out_and_no_caller_notices(live, client, caplog, monkeypatch):
    caplog.set_level("INFO")
    engine, _ = live.fleet.get("two").queue.engines
    expected = [await client.explain(image, model="one") for image in IMAGES]
    with monkeypatch.context() as patch:

        def fail(*_arguments: object, **_options: object) -> None:
            raise RuntimeError("the device is lost")

        patch.setattr(engine, "explain", fail)
        patch.setattr(engine, "steps", fail)
        for _ in range(20):
            found = await asyncio.gather(*(client.explain(image, model="two") for image in IMAGES))
            for one, other in zip(expected, found, strict=True):
                assert other.explanations[0].class_id == one.explanations[0].class_id
            if (model := await model_of(client)).is_degraded:
                break
        assert model.is_degraded
        assert model.devices == (
            DeviceInfo("cpu#0", in_service=False, message="its runs fail"),
            DeviceInfo("cpu#1", in_service=True),
        )
        assert (model.state, model.state_message) == ("ready", "")
        assert await client.health() is Health.SERVING
        assert await samples(live, "device_in_service") == {"cpu#0": 0.0, "cpu#1": 1.0}
        assert "model two is degraded: cpu#0 is taken out, as its runs fail" in caplog.text
        # Methods of many runs go on as well.
        assert (await client.explain(IMAGES[0], model="two", method="score-cam")).explanations
    await until(lambda: all(not device.fault for device in live.fleet.get("two").queue.devices))
    assert not (await model_of(client)).is_degraded
    assert "model two: cpu#0 works again" in caplog.text
