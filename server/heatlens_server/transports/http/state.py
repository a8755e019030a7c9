"""What a server is at one moment, as metrics: read from its models, streams and budgets at each scrape."""

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from heatlens_server.api.calls import CallGate
from heatlens_server.api.models import heatlens_version
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.isolated_engine import IsolatedEngine
from heatlens_server.fleet.served_model import ModelState, ModelStatus


class StateCollector(Collector):
    """Reads a server on the thread of a scrape, without waiting for the event loop."""

    def __init__(self, fleet: Fleet, streams: OpenStreams, gate: CallGate) -> None:
        """Read these."""
        self._fleet = fleet
        self._streams = streams
        self._gate = gate

    def collect(self) -> Iterable[Metric]:
        """The metrics now."""
        yield InfoMetricFamily("heatlens_build", "The server's version.", {"version": heatlens_version()})
        yield _gauge("heatlens_calls_in_flight", "Calls that are being answered.", self._gate.in_flight)
        yield _gauge("heatlens_open_streams", "Streams that are open.", self._streams.counters.streams.open)
        held = GaugeMetricFamily("heatlens_in_flight_bytes", "Bytes of requests and of answers.", labels=["kind"])
        held.add_metric(["requests"], self._gate.admission.requests.held_bytes)
        held.add_metric(["answers"], self._gate.admission.answers.held_bytes)
        yield held
        yield from _models(tuple(self._fleet))


def _models(statuses: tuple[ModelStatus, ...]) -> Iterable[Metric]:
    queued = GaugeMetricFamily("heatlens_queue_length", "Images that are decoded or wait to be run.", labels=["model"])
    state = GaugeMetricFamily(
        "heatlens_model_state", "How many versions of a model are in a state.", labels=["model", "state"]
    )
    engines = InfoMetricFamily(
        "heatlens_model",
        "What runs a model that serves.",
        labels=["model", "version", "engine", "device", "precision"],
    )
    serves = GaugeMetricFamily(
        "heatlens_device_in_service",
        "1, or 0 while the device is taken out.",
        labels=["model", "version", "device"],
    )
    memory = GaugeMetricFamily(
        "heatlens_model_process_resident_memory_bytes",
        "Of the processes of a model that has its own.",
        labels=["model", "version"],
    )
    for name in dict.fromkeys(status.name for status in statuses):
        versions = [status for status in statuses if status.name == name]
        for each in ModelState:
            state.add_metric([name, each.value], sum(status.state is each for status in versions))
        lengths = [len(status.served.queue.batcher) for status in versions if status.served is not None]
        if lengths:
            queued.add_metric([name], sum(lengths))
    for status in statuses:
        served = status.served
        if served is not None:
            info = served.capabilities
            engines.add_metric([status.name, served.version, info.engine_name, info.device, info.precision], {})
            for device in served.queue.devices:
                serves.add_metric([status.name, served.version, device.name], not device.fault)
            own = [engine.rss_bytes for engine in served.queue.engines if isinstance(engine, IsolatedEngine)]
            if own:
                memory.add_metric([status.name, served.version], sum(own))
    return queued, state, engines, serves, *([memory] if memory.samples else [])


def _gauge(name: str, about: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, about, value=value)
