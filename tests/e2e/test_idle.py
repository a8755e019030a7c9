"""Models that a real server unloads when they are used little, under calls and a stream, and loads again on request."""

import threading

import numpy as np

import heatlens
import tiny_models
from heatlens import Client
from server_process import until, wait_settled
from server_toml import model_toml, server_toml

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def idle_after(toml: str, seconds: float) -> str:
    return toml.replace("[[models]]", f"[[models]]\nidle_unload_s = {seconds}")


def test_idle_models_go_and_come_back_and_no_call_fails(launch):
    resting = idle_after(model_toml("a", "tiny"), 0.2)
    running = launch(server_toml(resting, model_toml("b", "tiny_mlp")))
    wait_settled(running.address)
    with Client(running.address, retry=heatlens.Retry(max_attempts=1)) as client:

        def state(name: str) -> str:
            return next(model.state.value for model in client.models() if model.name == name)

        until(lambda: state("a") == "idle")
        (idle, ready) = client.models()
        # What was known stays known.
        assert (idle.layers, idle.class_count, idle.weights_bytes) == (("body",), 10, 0)
        assert ready.weights_bytes > 1000
        assert [client.health(), client.health("a")] == ["serving", "serving"]
        failed: list[Exception] = []

        def ask() -> None:
            try:
                assert client.explain(IMAGE, model="a").explanations
            except Exception as error:
                failed.append(error)

        callers = [threading.Thread(target=ask) for _ in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert failed == []
        until(lambda: state("a") == "idle")
        assert running.log().count("model a ready") == 2
        # A stream wakes it as well, and keeps it.
        with client.stream(model="a") as stream:
            assert len(list(stream.map([IMAGE]))) == 1
            assert state("a") == "ready"
            stream.close()
        until(lambda: state("a") == "idle")
        assert client.explain(IMAGE, model="b").explanations
    running.process.terminate()
    assert running.process.wait(60) == 0


def test_a_budget_holds_as_many_models_as_fit(launch):
    names = "abcd"
    module = tiny_models.tiny()
    size_bytes = sum(one.nbytes for one in (*module.parameters(), *module.buffers()))
    # Room for two of these.
    budget = f"[server.memory_budget_bytes]\ncpu = {int(2.5 * size_bytes)}\n"
    running = launch(server_toml(budget, *(model_toml(name, "tiny") for name in names)))
    wait_settled(running.address)
    with Client(running.address, retry=heatlens.Retry(max_attempts=1)) as client:

        def loaded() -> set[str]:
            return {model.name for model in client.models() if model.state.value == "ready"}

        until(lambda: len(loaded()) == 2)
        assert {model.weights_bytes for model in client.models()} == {0, size_bytes}
        for _ in range(3):
            for name in names:
                assert client.explain(IMAGE, model=name).model == name
                assert name in loaded()
                assert len(loaded()) <= 2
        assert loaded() == {"c", "d"}
        assert client.health() == "serving"
    running.process.terminate()
    assert running.process.wait(60) == 0
