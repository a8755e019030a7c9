"""The dashboard and the alert rules in deploy/: each metric, label and value that they name is in a scrape."""

import asyncio
import json
import re
from collections import defaultdict
from pathlib import Path

import grpc.aio
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2
from in_process_server import PATIENCE_S, until
from messages import distinct, pixels
from raw_stream import RawStream
from scrapes import METRICS, scrape_text
from server_toml import model_toml, server_toml

DEPLOY = Path(__file__).parents[2] / "deploy"
IMAGE = distinct(1)[0]

FROM_PROMETHEUS = {"instance", "job", "le"}
"""Labels that a scrape gets from Prometheus, and those of buckets."""

_METRIC = re.compile(r"\b(?:heatlens|process)_\w+")
_SELECTOR = re.compile(r"((?:heatlens|process)_\w+)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)(=~|!=|=)"([^"]*)"')


def dashboard() -> dict:
    return json.loads((DEPLOY / "grafana-dashboard.json").read_text())


def expressions() -> list[str]:
    panels = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    return [*panels, *(rule["expr"] for rule in group["rules"])]


@pytest.fixture
async def series(start_server) -> dict[str, list[dict[str, str]]]:
    """The labels of every series of a server that has done all kinds of work, by the series' name."""
    server = await start_server(
        server_toml(
            model_toml("tiny", engine=None, layers=("body", "stem")) + "\nwait_for_export = true",
            '[[models]]\nname = "own"\nsource = "embedded:efficientnet_lite0"\nisolation = "process"',
        )
        + METRICS
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        for method in (method_pb2.METHOD_GRAD_CAM, method_pb2.METHOD_RECIPRO_CAM):
            await stub.Explain(pb.ExplainRequest(image=pixels(IMAGE), options=pb.ExplainOptions(method=method)))
        stream = RawStream(stub)
        await stream.open()
        await stream.send(1, IMAGE)
        await stream.finish()
    await until(lambda: server._gate.in_flight == 0)
    # The device tells of a batch a moment after its answers.
    async with asyncio.timeout(PATIENCE_S):
        while "heatlens_images_failed_total{" not in (text := await scrape_text(server)):
            pass
    found = defaultdict(list)
    for family in text_string_to_metric_families(text):
        assert family.samples, family.name
        for sample in family.samples:
            found[sample.name].append(sample.labels)
    return found


async def test_what_expressions_name_is_in_a_scrape(series):
    for expression in expressions():
        names = _METRIC.findall(expression)
        assert names or expression.startswith("up{"), expression
        assert set(names) <= set(series), expression
        assert expression.count("(") == expression.count(")"), expression
        labels = {name for found in names for labels in series[found] for name in labels} | FROM_PROMETHEUS
        for grouping in re.findall(r"(?:by|on|group_left) \(([^)]*)\)", expression):
            assert set(filter(None, grouping.replace(" ", "").split(","))) <= labels, expression
        for name, selector in _SELECTOR.findall(expression):
            for label, operator, value in _MATCHER.findall(selector):
                known = {labels[label] for labels in series[name] if label in labels}
                assert known or label in FROM_PROMETHEUS, expression
                if label in {"rpc", "state"} and operator == "=":
                    assert value in known, expression


async def test_every_metric_of_ours_is_on_the_dashboard(series):
    shown = {name for expression in expressions() for name in _METRIC.findall(expression)}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in series if name.startswith("heatlens_")}
    assert bases - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == set()


def test_the_dashboard_can_be_loaded():
    loaded = dashboard()
    assert [panel["id"] for panel in loaded["panels"]] == list(range(1, len(loaded["panels"]) + 1))
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in loaded["panels"]}
    assert len(places) == len(loaded["panels"])
    variables = {variable["name"] for variable in loaded["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(loaded["panels"])))
    assert used - {"__rate_interval"} == variables


def test_alerts_say_what_is_wrong():
    (group,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert len(names) == len(set(names)) >= 10
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert re.fullmatch(r"\d+m", rule["for"])
        assert rule["annotations"]["summary"].endswith(".")
