"""Torch answers as soon as a model is loaded, and onnxruntime takes over under load: the real server, nothing lost."""

import threading
import time

import numpy as np
import pytest

import heatlens
from heatlens import Client
from server_process import wait_settled

TINY = """
[server]
listen = "127.0.0.1:0"
cache_dir = "cache"

[[models]]
name = "tiny"
source = "python:tiny_models:NETWORK"
layers = ["body"]
preprocess = { resize_px = 64, crop_px = 64 }
"""
PATIENCE_S = 300


def wait_ready(client: Client) -> heatlens.ModelInfo:
    deadline = time.monotonic() + PATIENCE_S
    while client.health() != "serving":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return client.models()[0]


def test_calls_and_streams_go_on_while_onnxruntime_takes_over(launch, chelsea):
    running = launch(TINY.replace("NETWORK", "tiny"))
    answers: list[heatlens.Result | Exception] = []
    settled = threading.Event()

    def ask() -> None:
        with Client(running.address, retry=heatlens.Retry(max_attempts=1)) as caller:
            while not settled.is_set():
                try:
                    answers.append(caller.explain(chelsea))
                except Exception as error:
                    answers.append(error)
                    return

    with Client(running.address) as client:
        first = wait_ready(client)
        assert (first.engine, first.next_engine) == ("torch", "onnxruntime")
        expected = client.explain(chelsea)
        callers = [threading.Thread(target=ask) for _ in range(2)]
        for caller in callers:
            caller.start()
        try:
            with client.stream() as stream:
                stream.send(chelsea)
                assert next(iter(stream)).result is not None
                wait_settled(running.address)
                now = client.models()[0]
                after = client.explain(chelsea)
                stream.send(chelsea)
                late = next(iter(stream)).result
        finally:
            settled.set()
            for caller in callers:
                caller.join()
    assert (now.engine, now.next_engine) == ("onnxruntime", "")
    assert (now.version, now.layers, set(now.methods)) == (first.version, first.layers, set(first.methods))
    assert [answer for answer in answers if isinstance(answer, Exception)] == []
    for answer in (*answers, after, late):
        np.testing.assert_allclose(
            answer.explanations[0].heatmap.values, expected.explanations[0].heatmap.values, atol=1e-4
        )
    assert "takes over once the model is exported" in running.log()


@pytest.mark.parametrize("key", ["wait_for_export = true", 'engine = "onnxruntime"'])
def test_an_operator_can_wait_for_the_export(launch, key):
    running = launch(TINY.replace("NETWORK", "tiny").replace("layers =", f"{key}\nlayers ="))
    with Client(running.address) as client:
        found = wait_ready(client)
    assert (found.engine, found.next_engine) == ("onnxruntime", "")
