"""SIGHUP under load: the real command, whose configuration changes while clients call it."""

import signal
import threading
from pathlib import Path

import heatlens
from heatlens import Client
from server_process import until, wait_settled
from server_toml import model_toml, server_toml

BOTH = server_toml(model_toml("a", "tiny"), model_toml("b", "tiny_mlp"))
CHANGED = server_toml(
    model_toml("a", "tiny").replace("[[models]]", '[[models]]\nversion = "2"'), model_toml("c", "tiny")
)


def test_a_configuration_is_reloaded_and_no_call_fails(launch, tmp_path: Path, chelsea):
    running = launch(BOTH)
    wait_settled(running.address)
    versions: list[str | Exception] = []
    over = threading.Event()

    def ask() -> None:
        with Client(running.address, retry=heatlens.Retry(max_attempts=1)) as caller:
            while not over.is_set():
                try:
                    versions.append(caller.explain(chelsea, model="a").model_version)
                except Exception as error:
                    versions.append(error)
                    return

    def reload(toml: str, said: str) -> None:
        (tmp_path / "server.toml").write_text(toml)
        running.process.send_signal(signal.SIGHUP)
        until(lambda: said in running.log())

    caller = threading.Thread(target=ask)
    caller.start()
    try:
        with Client(running.address) as client:
            reload("[server", "nothing changes: ")
            assert [model.name for model in client.models()] == ["a", "b"]
            reload(CHANGED, "reloaded: 1 models loaded, 1 replaced, 1 unloaded, 0 as before")
            assert [(model.name, model.state.value) for model in client.models()] == [("a", "ready"), ("c", "ready")]
            assert client.explain(chelsea, model="a").model_version == "2"
            assert client.explain(chelsea, model="c").explanations
    finally:
        over.set()
        caller.join()
    assert [one for one in versions if isinstance(one, Exception)] == []
    # Once the new one has answered, the old one answers nobody.
    assert versions == sorted(versions, key=lambda version: version == "2")
    running.process.terminate()
    assert running.process.wait(60) == 0
