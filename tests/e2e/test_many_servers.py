"""Several plain servers behind one client: one is killed and one drains under load, and nothing is lost."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import trustme

import tiny_models
from cli_process import next_line, start_cli
from dns_names import names
from heatlens import TLS, AsyncClient, Client, UnavailableError
from messages import distinct
from onnx_files import write_onnx
from server_process import ServerProcess, start_server_process, until, wait_settled
from server_toml import model_toml, server_toml
from video_files import read_film, write_clip

IMAGES = distinct(8)
CALLERS = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """As ONNX: servers that need no PyTorch start in a fraction of the time."""
    path = write_onnx(tiny_models.tiny_mlp(), tmp_path_factory.mktemp("model") / "mlp.onnx")
    preprocess = "preprocess = { resize_px = 64, crop_px = 64 }"
    return f'[[models]]\nname = "mlp"\nsource = "onnx:{path}"\nbatching = {{ max_batch_size = 4 }}\n{preprocess}'


@pytest.fixture
def servers(tmp_path, model) -> Iterator[list[ServerProcess]]:
    """Three. The model's version is a server's number."""
    started = []
    try:
        for number in range(3):
            folder = tmp_path / str(number)
            folder.mkdir()
            versioned = model.replace("[[models]]", f'[[models]]\nversion = "{number}"')
            started.append(start_server_process(folder, server_toml(versioned, log_format="json")))
        for server in started:
            wait_settled(server.address)
        yield started
    finally:
        for server in started:
            server.process.kill()
            server.process.wait()


def explained_by(server: ServerProcess) -> int:
    """How many images a server has explained, by its log."""
    return server.log().count('"method": "/heatlens.v1.ExplainService/Explain"')


def test_one_killed_and_one_drained_under_load_lose_no_answer(servers):
    over, answered, frames = threading.Event(), Counter(), []
    with Client([server.address for server in servers], timeout=60.0) as client:
        expected = [client.explain(image).explanations[0].heatmap.values for image in IMAGES]

        def call(number: int) -> None:
            while not over.is_set():
                index = answered[number] % len(IMAGES)
                values = client.explain(IMAGES[index]).explanations[0].heatmap.values
                assert np.allclose(values, expected[index], atol=1e-5)
                answered[number] += 1

        def film() -> Iterator[np.ndarray]:
            while not over.is_set():
                yield IMAGES[len(frames) % len(IMAGES)]

        def watch() -> None:
            with client.stream(resume=True, max_in_flight=4) as stream:
                for item in stream.map(film()):
                    assert item.result is not None, item.error
                    frames.append(item.frame_id)

        def goes_on() -> None:
            """All callers and the stream get further, and none of them has ended."""
            before, seen = Counter(answered), len(frames)
            until(
                lambda: (
                    any(one.done() for one in work)
                    or (all(answered[n] > before[n] + 5 for n in range(CALLERS)) and len(frames) > seen + 20)
                )
            )
            for one in work:
                assert not one.done() or one.result()

        with ThreadPoolExecutor(CALLERS + 1) as pool:
            work = [pool.submit(call, number) for number in range(CALLERS)] + [pool.submit(watch)]
            try:
                goes_on()
                assert all(explained_by(server) for server in servers)
                servers[0].process.kill()
                goes_on()
                servers[1].process.terminate()
                assert servers[1].process.wait(60) == 0
                goes_on()
            finally:
                over.set()
            for done in work:
                done.result(60)
    assert frames == list(range(len(frames)))


async def test_a_server_that_does_not_serve_gets_no_calls(servers, tmp_path):
    """It loads for ever: its model fails."""
    folder = tmp_path / "broken"
    folder.mkdir()
    broken = start_server_process(folder, server_toml(model_toml("broken"), log_format="json"))
    try:
        async with AsyncClient([broken.address, servers[0].address]) as client:
            for image in IMAGES * 3:
                await client.explain(image)
        with Client([broken.address, broken.address], timeout=5.0) as client, pytest.raises(UnavailableError):
            client.explain(IMAGES[0])
        assert not explained_by(broken)
    finally:
        broken.process.kill()
        broken.process.wait()


def test_several_servers_by_tls_are_known_by_one_name(tmp_path, model):
    authority = trustme.CA()
    certificate = authority.issue_cert("models.example")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "chain.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = f'[server.tls]\ncertificate = "{tmp_path}/chain.pem"\nprivate_key = "{tmp_path}/key.pem"'
    toml = server_toml(model, tls)
    server = start_server_process(tmp_path, toml)
    try:
        names = [server.address, server.address.replace("127.0.0.1", "127.0.0.2")]
        tls = TLS(ca_file=tmp_path / "ca.pem", server_name="models.example")
        with Client(names, tls=tls, wait_for_ready=True) as client:
            client.explain(IMAGES[0])
        with (
            Client(names, tls=TLS(ca_file=tmp_path / "ca.pem", server_name="other.example"), timeout=5.0) as client,
            pytest.raises(UnavailableError),
        ):
            client.explain(IMAGES[0])
    finally:
        server.process.kill()
        server.process.wait()


def test_a_film_goes_on_when_servers_die_and_drain(servers, tmp_path):
    """Lines that nobody reads hold the film back, so that it does not end before its servers do."""
    frames, film = 1000, tmp_path / "film.mp4"
    clip = write_clip(tmp_path / "clip.mov", frames)
    addresses = ",".join(server.address for server in servers)
    process = start_cli("video", clip, "-o", film, "--json", "-", "--server", addresses)
    try:
        lines: list[dict] = []
        for end in ("kill", "terminate"):
            ended = {line["model_version"] for line in lines}
            while not lines or lines[-1]["model_version"] in ended:
                lines.append(json.loads(next_line(process)))
            getattr(servers[int(lines[-1]["model_version"])].process, end)()
        stdout, stderr = process.communicate(timeout=100)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, stderr
    lines += [json.loads(line) for line in stdout.splitlines()]
    assert [(line["frame_id"], line["status"]) for line in lines] == [(i, "explained") for i in range(frames)]
    answered_by = [line["model_version"] for line in lines]
    changes = [one for one, before in zip(answered_by, [None, *answered_by], strict=False) if one != before]
    assert len(changes) == len(set(changes)) == 3
    assert len(read_film(film)[1]) == frames


def test_a_server_that_comes_later_behind_a_name_is_found(tmp_path, model):
    """By gRPC's resolver, which asks a DNS server of ours: once a connection breaks, for what the name is by then."""
    with names("127.0.0.1") as dns, ExitStack() as stack:

        def start(listen: str) -> ServerProcess:
            folder = tmp_path / listen
            folder.mkdir()
            server = start_server_process(folder, server_toml(model, listen=listen, log_format="json"))
            stack.callback(server.process.wait)
            stack.callback(server.process.kill)
            wait_settled(listen.replace(":0", server.address.removeprefix("127.0.0.1")))
            return server

        first = start("127.0.0.1:0")
        port = first.address.rpartition(":")[2]
        with Client(f"dns://127.0.0.1:{dns.port}/heatlens.test:{port}", wait_for_ready=True, timeout=100) as client:
            client.explain(IMAGES[0])
            second = start(f"127.0.0.2:{port}")
            dns.addresses = ("127.0.0.1", "127.0.0.2")
            client.explain(IMAGES[0])
            until(lambda: explained_by(first) == 2)
            first.process.kill()
            client.explain(IMAGES[0])
            until(lambda: explained_by(second) == 1)


def test_the_command_line_takes_several(run, servers):
    done = run("models", "--server", ",".join(server.address for server in servers))
    assert "mlp*" in done.stdout
