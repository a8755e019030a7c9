"""What a configuration that is read again changes of a fleet: real queues and threads, engines behind gates."""

import asyncio
import threading

import pytest
import pytest_asyncio

from fleets import Rig
from heatlens_server.config import AdminConfig, Config, ModelConfig, ServerConfig
from heatlens_server.core.errors import ConfigError, ModelChangeRefused, ModelLoadError, VersionNotFound
from heatlens_server.fleet.fleet import ModelState
from heatlens_server.fleet.reload import Reloader


class Operator:
    """Somebody who edits a configuration; `error` makes it wrong."""

    def __init__(self, rig: Rig, *names: str) -> None:
        self.config = configuration(*map(model, names))
        self.error: ConfigError | None = None
        self.reloader = Reloader(rig.fleet, self.config, self.read)

    def read(self) -> Config:
        if self.error is not None:
            raise self.error
        return self.config


def model(name: str, **keys: object) -> ModelConfig:
    return ModelConfig(name=name, source="embedded:efficientnet_lite0", **keys)


def configuration(*models: ModelConfig, **server: object) -> Config:
    return Config(models=models, server=ServerConfig(**server))


@pytest_asyncio.fixture(autouse=True)
async def loaded(rig: Rig) -> None:
    for name in "ab":
        await rig.fleet.load(model(name))


async def test_models_are_loaded_replaced_and_unloaded_and_the_others_left_alone(rig, caplog):
    caplog.set_level("INFO")
    operator = Operator(rig, "a", "b")
    operator.config = configuration(model("b", version="2"), model("c"), default_model="c")
    await operator.reloader.reload()
    assert rig.states() == [("b", ModelState.READY), ("c", ModelState.READY)]
    assert [status.served.generation for status in rig.fleet] == [2, 1]
    assert rig.fleet.get("b").version == "2"
    assert rig.fleet.default == "c"
    assert "reloaded: 1 models loaded, 1 replaced, 1 unloaded, 0 as before" in caplog.text
    await operator.reloader.reload()
    assert "reloaded: 0 models loaded, 0 replaced, 0 unloaded, 2 as before" in caplog.text
    assert len(rig.engines) == 4


async def test_a_wrong_configuration_changes_nothing_and_is_said(rig, caplog):
    operator = Operator(rig, "a", "b")
    operator.config, operator.error = configuration(model("c")), ConfigError("models[0].source: unknown")
    await operator.reloader.reload()
    assert rig.states() == [("a", ModelState.READY), ("b", ModelState.READY)]
    assert "nothing changes: models[0].source: unknown" in caplog.text


async def test_what_cannot_be_loaded_leaves_what_serves_harms_no_other_and_is_tried_again(rig, caplog):
    operator = Operator(rig, "a", "b")
    operator.config = configuration(model("a", version="2"), model("b", version="2"))
    rig.errors["a"] = ModelLoadError("no weights")
    await operator.reloader.reload()
    assert [(status.name, status.served.version) for status in rig.fleet] == [("a", ""), ("b", "2")]
    assert "reload: cannot replace the model a: no weights" in caplog.text
    del rig.errors["a"]
    await operator.reloader.reload()
    assert rig.fleet.get("a").version == "2"


async def test_a_model_that_has_failed_is_loaded_again(rig):
    operator = Operator(rig, "a", "b", "c")
    rig.errors["c"] = ModelLoadError("no weights")
    await rig.fleet.load(model("c"))
    del rig.errors["c"]
    await operator.reloader.reload()
    assert rig.states()[2] == ("c", ModelState.READY)


@pytest.mark.parametrize("key", ["weights", "labels"])
async def test_a_file_that_was_written_again_replaces_its_model(rig, tmp_path, key):
    file = tmp_path / "file.pth"
    file.write_text("one")
    operator = Operator(rig)
    operator.config = configuration(model("a"), model("b", **{key: str(file)}))
    await operator.reloader.reload()
    assert [status.served.generation for status in rig.fleet] == [1, 2]
    file.write_text("another")
    await operator.reloader.reload()
    assert [status.served.generation for status in rig.fleet] == [1, 3]


async def test_keys_that_take_a_restart_are_named(rig, caplog):
    operator = Operator(rig, "a", "b")
    operator.config = configuration(model("a"), model("b"), max_targets=3, default_model="b")
    await operator.reloader.reload()
    assert "server.max_targets changed, which takes a restart" in caplog.text


async def test_every_section_but_the_models_takes_a_restart(rig, caplog):
    operator = Operator(rig, "a", "b")
    operator.config = operator.config.model_copy(update={"admin": AdminConfig(enabled=True, token="t")})
    await operator.reloader.reload()
    assert "admin.enabled, admin.token changed, which takes a restart" in caplog.text


async def test_a_change_whose_caller_leaves_goes_on_and_keeps_its_turn(rig):
    operator = Operator(rig, "a", "b")
    rig.gates["a"] = threading.Event()
    leaving = asyncio.create_task(operator.reloader.replace("a"))
    await asyncio.sleep(0.05)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    other = asyncio.create_task(operator.reloader.unload("b"))
    await asyncio.sleep(0.05)
    assert [name for name, _ in rig.states()] == ["a", "b"]
    rig.gates["a"].set()
    await other
    assert [(status.name, status.served.generation) for status in rig.fleet] == [("a", 2)]


# Versions.


def versions(*texts: str, **keys: object) -> list[ModelConfig]:
    return [model("a", version=text, **keys) for text in texts]


def listed(rig: Rig) -> list[tuple[str, int]]:
    return [(status.key, status.served.generation) for status in rig.fleet]


async def test_versions_come_beside_each_other_in_the_order_of_the_configuration(rig):
    operator = Operator(rig, "a", "b")
    operator.config = configuration(*versions("1", "2"), model("b"))
    await operator.reloader.reload()
    # What had no version has given its place to one that has, and what is new came after b.
    assert listed(rig) == [("a:1", 2), ("a:2", 3), ("b", 1)]
    assert (rig.fleet.get("a").version, rig.fleet.get("a", "2").version) == ("1", "2")
    operator.config = configuration(*versions("2", "3"))
    await operator.reloader.reload()
    assert listed(rig) == [("a:2", 3), ("a:3", 4)]
    assert rig.fleet.get("a").version == "2"
    # Nobody who had version 1 was sent away: version 3 came in its place.
    assert [(model.version, error.reason) for model, error in rig.replaced] == [
        ("", "MODEL_REPLACED"),
        ("1", "MODEL_REPLACED"),
    ]


async def test_weights_and_the_default_take_no_loading(rig):
    operator = Operator(rig, "a", "b")
    operator.config = configuration(*versions("1", "2"))
    await operator.reloader.reload()
    engines = len(rig.engines)
    operator.config = configuration(model("a", version="2", default=True), model("a", version="1", weight=0.25))
    await operator.reloader.reload()
    assert len(rig.engines) == engines
    assert [key for key, _ in listed(rig)] == ["a:2", "a:1"]
    assert [rig.fleet.get("a", "", lambda at=at: at).version for at in (0.0, 0.24, 0.25)] == ["1", "1", "2"]
    # A change of another model leaves them as they are.
    operator.config = configuration(model("a", version="2", default=True), model("a", version="1"), model("b"))
    await operator.reloader.load("b")
    assert rig.fleet.get("a", "", lambda: 0.0).version == "1"


async def test_a_version_beside_another_is_unloaded_without_a_word_to_its_calls(rig):
    operator = Operator(rig, "a", "b")
    operator.config = configuration(*versions("1", "2"))
    await operator.reloader.reload()
    engine = rig.engines[-2]
    engine.gate.clear()
    calls = [asyncio.create_task(rig.ask("a")) for _ in range(5)]
    assert await asyncio.to_thread(engine.entered.wait, 20)
    with rig.fleet.use("a", "1"):
        await operator.reloader.unload("a", "1")
        assert await rig.ask("a") == engine.number + 1
        engine.gate.set()
        assert await asyncio.gather(*calls) == [engine.number] * 5
    assert [model.name for model, _ in rig.ended] == ["b"]


async def test_administrators_name_one_of_several_versions(rig):
    operator = Operator(rig, "a", "b")
    operator.config = configuration(*versions("1", "2"), model("b"))
    await operator.reloader.reload()
    for change in (operator.reloader.load, operator.reloader.replace, operator.reloader.unload):
        with pytest.raises(ModelChangeRefused, match="several versions of the model 'a', 1, 2: say which"):
            await change("a")
        with pytest.raises(VersionNotFound, match="no version '3' of the model 'a'"):
            await change("a", "3")
    assert (await operator.reloader.replace("a", "2")).served.generation == 4
    await operator.reloader.unload("a", "2")
    # Version 1 is to stay: nothing takes its place.
    with pytest.raises(ModelChangeRefused, match="'a:2' is not loaded: load it"):
        await operator.reloader.replace("a", "2")
    assert [status.version for status in rig.fleet if status.name == "a"] == ["1"]
    assert (await operator.reloader.load("a", "2")).version == "2"
    with pytest.raises(ModelChangeRefused, match="there is a model 'a:2' already"):
        await operator.reloader.load("a", "2")
