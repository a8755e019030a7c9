"""The services on a Ray cluster of two local nodes, to which clients speak as to a plain server."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

import heatlens
from heatlens import AsyncClient, Client, Retry
from heatlens._wire.status import REPLICA_DIED, error_of
from messages import distinct
from server_process import SUPPORT, start_server_process, wait_settled
from server_toml import model_toml, server_toml

pytestmark = pytest.mark.timeout(400)

IMAGES = distinct(6)
TOKEN = "a-token"
CALLERS = 4


def toml(version: str) -> str:
    model = model_toml("mlp", "tiny_mlp", max_batch_size=4) + f'\nversion = "{version}"'
    return server_toml(model, token=TOKEN, log_format="json")


@dataclass
class RayCluster:
    """The program of tests/support/ray_cluster.py."""

    process: "subprocess.Popen[str]"
    config: Path
    address: str

    def tell(self, word: str) -> list[str]:
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.wait()

    def wait(self) -> list[str]:
        lines = list(iter(self.process.stdout.readline, "done\n"))
        assert "" not in lines, "the cluster has ended"
        return lines


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[RayCluster]:
    folder = tmp_path_factory.mktemp("ray")
    config = folder / "server.toml"
    config.write_text(toml("1"))
    port = 50900 + os.getpid() % 90
    # Ray's sockets have long names below this, and a socket's name 107 bytes at most.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"SLOW_FOLDER": str(folder), "SLOW_S": "0.05"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, SUPPORT / "ray_cluster.py", config, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    made = RayCluster(process, config, f"127.0.0.1:{port}")
    try:
        made.wait()
        yield made
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(60)
        finally:
            process.kill()


@pytest.fixture
def client(cluster) -> Iterator[Client]:
    # Both nodes' proxies share this machine's port: while one ends, connections to it are refused for a moment.
    patient = Retry(max_attempts=5, initial_backoff_s=0.5, max_backoff_s=8.0)
    with Client(cluster.address, token=TOKEN, timeout=60.0, retry=patient) as made:
        yield made


@contextmanager
def load(client: Client, answers: Counter) -> Iterator[None]:
    """Callers in threads, for as long as the block runs, and a stream that goes on where one breaks."""
    over = threading.Event()

    def call(number: int) -> None:
        while not over.is_set():
            answers[client.explain(IMAGES[number]).model_version] += 1

    def watch() -> None:
        def film() -> Iterator[np.ndarray]:
            while not over.is_set():
                yield IMAGES[0]

        with client.stream(resume=True, max_in_flight=2) as stream:
            for item in stream.map(film()):
                assert item.result is not None, item.error
                answers["frames"] += 1

    with ThreadPoolExecutor(CALLERS + 1) as pool:
        work = [pool.submit(call, number) for number in range(CALLERS)] + [pool.submit(watch)]
        try:
            before = answers.total()
            goes_on(answers, before)
            yield
            goes_on(answers, answers.total())
        finally:
            over.set()
        for one in work:
            one.result(60)


def goes_on(answers: Counter, before: int, *, seconds: float = 100.0) -> None:
    """Wait for some more answers."""
    deadline = time.monotonic() + seconds
    while answers.total() < before + 40:
        assert time.monotonic() < deadline, answers
        time.sleep(0.02)


def test_answers_are_those_of_a_plain_server(client, tmp_path):
    plain = start_server_process(tmp_path, toml("1"))
    try:
        wait_settled(plain.address, token=TOKEN)
        with Client(plain.address, token=TOKEN) as other:
            for image in IMAGES:
                here, there = (one.explain(image, top_k=2, method="layer-cam") for one in (client, other))
                assert here.model_version == there.model_version == "1"
                for one, two in zip(here.explanations, there.explanations, strict=True):
                    assert (one.class_id, one.logit) == (two.class_id, pytest.approx(two.logit, abs=1e-5))
                    assert np.abs(one.heatmap.values - two.heatmap.values).max() < 1e-5
            with client.stream() as stream:
                frames = list(stream.map(IMAGES))
            assert [item.frame_id for item in frames] == list(range(len(IMAGES)))
            values = [item.result.explanations[0].heatmap.values for item in frames]
            expected = [other.explain(image).explanations[0].heatmap.values for image in IMAGES]
            assert all(np.abs(one - two).max() < 1e-5 for one, two in zip(values, expected, strict=True))
            assert [model.name for model in client.models()] == [model.name for model in other.models()]
            assert client.server_info() == other.server_info()
    finally:
        plain.process.kill()
        plain.process.wait()


def test_errors_keep_their_type_reason_fields_and_request_id(cluster, client):
    with pytest.raises(heatlens.InvalidArgumentError) as caught:
        client.explain(b"no image")
    assert caught.value.reason == "IMAGE_UNDECODABLE"
    assert caught.value.field_violations[0].field == "image"
    assert len(caught.value.request_id) == 32
    with pytest.raises(heatlens.NotFoundError) as caught:
        client.explain(IMAGES[0], model="none")
    assert caught.value.reason == "MODEL_NOT_FOUND"
    with Client(cluster.address) as anonymous, pytest.raises(heatlens.UnauthenticatedError):
        anonymous.explain(IMAGES[0])
    with client.stream() as stream:
        good, bad = stream.map([IMAGES[0], b"no image"])
    assert good.result is not None
    assert bad.error.reason == "IMAGE_UNDECODABLE"
    with pytest.raises(heatlens.NotFoundError), client.stream(model="none"):
        pytest.fail("there is no such model")


async def test_callers_that_leave_are_noticed(cluster):
    async with AsyncClient(cluster.address, token=TOKEN) as client:
        for _ in range(20):
            leaving = asyncio.create_task(client.explain(IMAGES[0]))
            await asyncio.sleep(0.002)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
        with pytest.raises(heatlens.DeadlineExceededError):
            await client.explain(IMAGES[0], timeout=0.001)
        assert (await client.explain(IMAGES[0])).explanations


def test_an_update_under_load_fails_no_call(cluster, client):
    answers: Counter = Counter()
    with load(client, answers):
        cluster.config.write_text(toml("2"))
        cluster.tell("serve {}")
        deadline = time.monotonic() + 60
        while not answers["2"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert answers["1"] > 0
    assert {client.explain(image).model_version for image in IMAGES} == {"2"}


def test_a_replica_that_is_killed_loses_only_what_it_ran_and_that_is_tried_again(cluster, client):
    answers: Counter = Counter()
    with load(client, answers):
        cluster.tell("kill")


def test_a_node_that_is_taken_away(cluster, client):
    answers: Counter = Counter()
    with load(client, answers):
        cluster.tell("remove")


def wait_until(is_so: Callable[[], bool], *, seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_serve_deploy_of_the_example_and_calls_that_go_to_where_their_model_is(cluster, client):
    models = [model_toml(name, "telling", max_batch_size=4) for name in "ab"]
    budget = "[server]\nmemory_budget_bytes = { cpu = 200000 }\n"  # the weights of one, not of both
    cluster.config.write_text(server_toml(*models, token=TOKEN).replace("[server]\n", budget))
    file = cluster.config.with_name("serve.yaml")
    text = (Path(__file__).parents[2] / "deploy/ray/serve.yaml").read_text()
    scale = "replicas: 2\n      models_per_replica: 1\n      num_cpus: 0.5\n"
    text = text[: text.index("replicas:")] + scale
    text = text.replace("/etc/heatlens/server.toml", str(cluster.config))
    file.write_text(text.replace("50051", cluster.address.rpartition(":")[2]))
    cluster.tell(f"deploy {file}")
    wait_until(lambda: [model.name for model in client.models()] == ["a", "b"])

    with Client(cluster.address, token=TOKEN, timeout=60.0, model_key="multiplexed_model_id") as routed:

        def processes() -> tuple[int, int]:
            """Where a call of the one model and a stream of the other are answered."""
            called = routed.explain(IMAGES[0], model="a", top_predictions=1)
            with routed.stream(model="b", top_predictions=1) as stream:
                (frame,) = stream.map(IMAGES[:1])
            first, second = (result.predictions[0].logit for result in (called, frame.result))
            return round(first), round(second)

        def stay_apart() -> bool:
            found = {processes() for _ in range(10)}
            return len(found) == 1 and len(set(found.pop())) == 2

        wait_until(stay_apart)
    # Whichever replica says so.
    wait_until(lambda: all({one.state for one in client.models()} == {"idle", "ready"} for _ in range(6)))


def test_replicas_follow_the_length_of_their_queues(cluster, client):
    cluster.config.write_text(server_toml(model_toml("slow", "slow", max_batch_size=1), token=TOKEN))
    (cluster.config.parent / "armed").touch()
    scale = {"replicas": 1, "max_replicas": 2, "target_queue_length": 4, "target_ongoing_requests": 50}
    cluster.tell(f"serve {json.dumps(scale | {'look_back_period_s': 2, 'upscale_delay_s': 0, 'downscale_delay_s': 1})}")

    def replicas() -> int:
        return int(cluster.tell("count")[0])

    wait_until(lambda: replicas() == 1)
    with client.stream(max_in_flight=16) as stream:  # one call, for which there would be one replica
        grown = threading.Event()

        def film() -> Iterator[np.ndarray]:
            while not grown.is_set():
                yield IMAGES[0]

        with ThreadPoolExecutor(1) as pool:
            frames = pool.submit(lambda: Counter(item.error is None for item in stream.map(film())))
            try:
                wait_until(lambda: replicas() == 2)
            finally:
                grown.set()
            assert set(frames.result(60)) == {True}
    wait_until(lambda: replicas() == 1)


def test_what_ray_says_of_a_dead_replica_is_told_without_where_it_ran():
    class Failure(grpc.RpcError, grpc.Call):
        """What Ray's proxy answers."""

        def code(self):
            return grpc.StatusCode.INTERNAL

        def details(self):
            return "The actor died unexpectedly before finishing this task.\n\tip: 10.0.0.1"

        def trailing_metadata(self):
            return ()

        initial_metadata = add_callback = cancel = is_active = time_remaining = None

    error = error_of(Failure(), "id")
    assert isinstance(error, heatlens.UnavailableError)
    assert (error.reason, error.request_id) == (REPLICA_DIED, "id")
    assert "10.0.0.1" not in str(error)


IDLE_PROGRAM = """
import asyncio, sys
from pathlib import Path
from heatlens_server.config import load_config
from heatlens_server.ray_serve import Replica
async def main():
    replica = Replica(load_config(Path(sys.argv[1])))
    await replica.check_health()
    while [model.state.value for model in replica._server.fleet] != ["idle"]:
        await asyncio.sleep(0.05)
    await replica.check_health()
    await replica.__del__()
    replica._server = None
    print("healthy while idle")
asyncio.run(main())
"""


def test_a_replica_whose_models_are_idle_is_healthy(tmp_path):
    (tmp_path / "server.toml").write_text(
        '[metrics]\nlisten = "127.0.0.1:1"\n'
        '[[models]]\nname = "a"\nsource = "embedded:efficientnet_lite0"\nidle_unload_s = 1'
    )
    command = [sys.executable, "-c", IDLE_PROGRAM, tmp_path / "server.toml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert "healthy while idle" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--replicas", "3", "--max-replicas", "2"), "--max-replicas: is less than --replicas"),
        (("--target-queue-length", "2"), "--target-queue-length: needs --max-replicas"),
    ],
)
def test_the_command_refuses_what_is_wrong(options, message):
    command = [Path(sys.executable).parent / "heatlens-server", "ray", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (2, f"heatlens-server: {message}\n")
