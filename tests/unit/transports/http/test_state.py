"""What a scrape reads of a server: one series for each model, whatever the number of its versions."""

from types import SimpleNamespace

from heatlens_server.config import ModelConfig
from heatlens_server.fleet.served_model import ModelState, ModelStatus
from heatlens_server.transports.http.state import StateCollector


def test_versions_of_a_model_are_counted():
    states = {"1": ModelState.READY, "2": ModelState.READY, "3": ModelState.FAILED}
    fleet = [
        ModelStatus(ModelConfig(name="m", source="embedded:efficientnet_lite0", version=version), state)
        for version, state in states.items()
    ]
    held = SimpleNamespace(held_bytes=0)
    gate = SimpleNamespace(in_flight=0, admission=SimpleNamespace(requests=held, answers=held))
    streams = SimpleNamespace(counters=SimpleNamespace(streams=SimpleNamespace(open=0)))
    found = {metric.name: metric for metric in StateCollector(fleet, streams, gate).collect()}
    samples = {tuple(one.labels.values()): one.value for one in found["heatlens_model_state"].samples}
    assert samples[("m", "ready")] == 2
    assert samples[("m", "failed")] == 1
    assert len(found["heatlens_model_state"].samples) == len(ModelState)
