"""What a configuration that is read again changes of a fleet: real queues and threads, engines behind gates."""

import asyncio
import threading

import pytest
import pytest_asyncio

from fleets import Rig
from heatlens_server.config import AdminConfig, Config, ModelConfig, ServerConfig
from heatlens_server.core.errors import ConfigError, ModelLoadError
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
