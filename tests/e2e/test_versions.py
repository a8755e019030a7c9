"""Versions of one model on a real server, which come and go while clients call it and stream to it."""

import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import heatlens
from heatlens import Client, NotFoundError, UnavailableError
from heatlens_server.fleet.versions import point_of
from server_process import until, wait_settled
from server_toml import model_toml, server_toml

WEIGHT = 0.3
IMAGES = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8) for seed in range(60)]


def version(text: str, factory: str = "tiny", *keys: str) -> str:
    return model_toml("m", factory).replace("[[models]]", "\n".join(["[[models]]", f'version = "{text}"', *keys]))


def test_versions_come_and_go_and_no_call_fails(launch, tmp_path: Path):
    running = launch(server_toml(version("1")))
    wait_settled(running.address)
    once = heatlens.Retry(max_attempts=1)
    over, failed = threading.Event(), []

    def ask() -> None:
        with Client(running.address, retry=once) as caller:
            while not over.is_set():
                for image in IMAGES:
                    try:
                        caller.explain(image, model="m")
                    except Exception as error:
                        failed.append(error)
                        return

    reloads = 0

    def reload(*models: str) -> None:
        nonlocal reloads
        reloads += 1
        (tmp_path / "server.toml").write_text(server_toml(*models))
        running.process.send_signal(signal.SIGHUP)
        until(lambda: running.log().count("the configuration is reloaded") == reloads)

    def listed() -> list[tuple[str, bool, float]]:
        return [(model.version, model.is_default_version, model.weight) for model in client.models()]

    caller = threading.Thread(target=ask)
    caller.start()
    try:
        with Client(running.address) as client:
            reload(version("1"), version("2", "tiny_mlp", f"weight = {WEIGHT}"))
            assert listed() == [("1", True, 0.0), ("2", False, WEIGHT)]
            assert client.health() == "serving"
            expected = ["2" if point_of(image.tobytes()) < WEIGHT else "1" for image in IMAGES]
            assert 0 < expected.count("2") < len(IMAGES) / 2
            # Twice, and with other options: a retry is answered by the same one.
            assert [client.explain(image).model_version for image in IMAGES] == expected
            assert [client.explain(image, method="layer-cam").model_version for image in IMAGES[:9]] == expected[:9]
            assert {client.explain(image, version="2").model_version for image in IMAGES[:9]} == {"2"}
            with pytest.raises(
                NotFoundError, match=r"no version '3' of the model 'm'; this server has: 1, 2"
            ) as raised:
                client.explain(IMAGES[0], version="3")
            assert raised.value.reason == "VERSION_NOT_FOUND"
            with client.stream(version="1") as stays, client.stream(version="1", on_replace="end") as ends:
                assert (stays.model_version, ends.model_version) == ("1", "1")
                reload(version("2", "tiny_mlp"), version("3"))
                assert listed() == [("2", True, 0.0), ("3", False, 0.0)]
                with pytest.raises(UnavailableError) as raised:
                    list(ends.map(IMAGES[:1]))
                assert raised.value.reason == "MODEL_REPLACED"
                assert [item.result.model_version for item in stays.map(IMAGES[:3])] == ["1"] * 3
            assert {client.explain(image).model_version for image in IMAGES} == {"2"}
            reload(version("3"))
            assert {client.explain(image).model_version for image in IMAGES} == {"3"}
    finally:
        over.set()
        caller.join()
    assert failed == []
    running.process.terminate()
    assert running.process.wait(60) == 0
