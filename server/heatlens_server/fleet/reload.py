"""From a fleet to what its configuration says by now: models are loaded, replaced and unloaded, one after the other."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from heatlens_server.config import EXPORT_PREFIX, ONNX_PREFIX, WEIGHT_FILE_SUFFIXES, Config, ModelConfig
from heatlens_server.core.errors import (
    ConfigError,
    HeatlensError,
    ModelChangeRefused,
    ModelFailed,
    ModelLoadError,
    ModelNotFound,
    VersionNotFound,
)
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.served_model import ModelState, ModelStatus
from heatlens_server.fleet.versions import refuse_several

_log = logging.getLogger(__name__)

T = TypeVar("T")

_SHOWN = 80
"""How much of a caller's text is repeated, in characters."""

Files = tuple[tuple[str, int, int], ...]
"""Of each file its path, its size in bytes and when it was written, in nanoseconds."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What a configuration changes.

    Attributes:
        load: models that there are not, or that have failed.
        replace: models whose section or files are others, each with the key of the one in whose place it comes.
        unload: models that the configuration lacks.
    """

    load: tuple[ModelConfig, ...]
    replace: tuple[tuple[ModelConfig, str], ...]
    unload: tuple[ModelConfig, ...]


class Reloader:
    """Keeps a fleet as its configuration is. Belongs to the event loop."""

    def __init__(self, fleet: Fleet, config: Config, read: Callable[[], Config]) -> None:
        """Remember what is served.

        Args:
            fleet: whose models were loaded from `config`.
            config: in force.
            read: reads it again; raises ConfigError.
        """
        self._fleet = fleet
        self._config = config
        self._read = read
        self._files = {model.key: files_of(model) for model in config.models}
        self._one_at_a_time = asyncio.Lock()
        self._going_on: set[asyncio.Task[Any]] = set()

    async def reload(self) -> None:
        """Read the configuration, and load, replace and unload models; what goes wrong with one harms no other.

        A configuration that is wrong changes nothing. Never raises: the log says what was done.
        """
        async with self._one_at_a_time:
            try:
                config = await asyncio.to_thread(self._read)
            except ConfigError as error:
                _log.error("the configuration is not reloaded, and nothing changes: %s", error)
                return
            self._warn_of_other_sections(config)
            files = {model.key: files_of(model) for model in config.models}
            changes = self._changes(config.models, files)
            if not {model.key for model in config.models} & {status.key for status in self._fleet}:
                _log.warning("the configuration has none of the models that were served")
            for model in changes.unload:
                await self._do("unload", model.key, self._fleet.unload(model.name, model.version))
            for model, key in changes.replace:
                if not await self._do("replace", key, self._fleet.replace(model, key=key)):
                    # The next reload tries again.
                    files[model.key] = self._files.get(key, ())
            loads = [self._fleet.load(model) for model in changes.load]
            self._config, self._files = config, files
            self._fleet.default = config.server.default_model
            self._fleet.arrange(config.models)
            await asyncio.gather(*loads)
            _log.info(
                "the configuration is reloaded: %d models loaded, %d replaced, %d unloaded, %d as before",
                len(changes.load),
                len(changes.replace),
                len(changes.unload),
                len(config.models) - len(changes.load) - len(changes.replace),
            )

    # One model at a time, for administrators. A change, and its turn, goes on when its caller leaves.

    async def load(self, name: str, version: str = "") -> ModelStatus:
        """Load a model that is not loaded, or has failed; what it is once it is ready.

        Args:
            name: of the model.
            version: of the model; empty for the only one.

        Raises:
            ModelNotFound: the configuration has no such model.
            ModelChangeRefused: the configuration is wrong, the model is loaded already, or there are several versions.
            ModelFailed: it cannot be loaded.
            ModelUnloaded: it was unloaded meanwhile.
        """

        async def change(model: ModelConfig, _configured: Config) -> None:
            if any(one.key == model.key and one.state is ModelState.IDLE for one in self._fleet):
                await self._fleet.idle.awake(model.name, model.version)
            else:
                await self._fleet.load(model)

        return await self._to_the_end(self._change_one(name, version, change))

    async def replace(self, name: str, version: str = "") -> ModelStatus:
        """Load a model again beside the one that serves; what it is once it serves. Arguments, errors: as `load`."""

        async def change(model: ModelConfig, configured: Config) -> None:
            await self._fleet.replace(model, key=self._old_of(model, configured))

        return await self._to_the_end(self._change_one(name, version, change))

    def _old_of(self, model: ModelConfig, configured: Config) -> str:
        """The key of what a model replaces: itself, or the version that the configuration does not have any more.

        Raises:
            ModelChangeRefused: the versions that are loaded are to stay.
        """
        served = [status.key for status in self._fleet if status.name == model.name]
        going = set(served) - {one.key for one in configured.models}
        if model.key in served or not served:
            return model.key if served else ""
        if len(going) != 1:
            raise ModelChangeRefused(f"{model.key!r} is not loaded: load it", metadata={"model": model.name})
        return going.pop()

    async def unload(self, name: str, version: str = "") -> None:
        """Take a model out. Raises ModelNotFound, and ModelChangeRefused if there are several versions."""

        async def change() -> None:
            async with self._one_at_a_time:
                await self._fleet.unload(name, version)

        await self._to_the_end(change())

    async def _to_the_end(self, change: Coroutine[None, None, T]) -> T:
        """Await a change; if that is cancelled, the change goes on."""
        task = asyncio.create_task(change)
        self._going_on.add(task)
        task.add_done_callback(self._going_on.discard)
        return await asyncio.shield(task)

    async def _change_one(
        self, name: str, version: str, change: Callable[[ModelConfig, Config], Coroutine[None, None, None]]
    ) -> ModelStatus:
        async with self._one_at_a_time:
            try:
                config = await asyncio.to_thread(self._read)
            except ConfigError as error:
                # Its message may name paths.
                _log.error("the model %s is not loaded, as the configuration is wrong: %s", name[:_SHOWN], error)
                message = "the configuration is wrong: the log says how"
                raise ModelChangeRefused(message, reason="CONFIG_INVALID") from error
            model = self._meant(config, name, version)
            files = files_of(model)
            try:
                await change(model, config)
            except ConfigError as error:
                raise ModelChangeRefused(str(error), metadata={"model": name}) from error
            except ModelLoadError as error:
                raise ModelFailed(name, str(error)) from error
            self._files[model.key] = files
            self._fleet.arrange(config.models, routed={name})
            self._fleet.get(name, model.version)
            return next(status for status in self._fleet if status.key == model.key)

    def _meant(self, config: Config, name: str, version: str) -> ModelConfig:
        """The configured model that an administrator means. Raises: as `load`."""
        models = [model for model in config.models if model.name == name]
        if not models:
            raise ModelNotFound(name, [model.name for model in config.models])
        if not version and len(models) > 1:
            refuse_several(name, [model.version for model in models])
        # What the configuration gives no version has the one that it is served with.
        served = {status.key: status.version for status in self._fleet}
        versions = {model.version or served.get(model.key, ""): model for model in models}
        if version and version not in versions:
            raise VersionNotFound(name, version, list(versions))
        return versions[version] if version else models[0]

    def _changes(self, models: Iterable[ModelConfig], files: dict[str, Files]) -> Changes:
        served = {status.key: status for status in self._fleet}
        kept = {model.key: served.pop(model.key) for model in models if model.key in served}
        load, replace = [], []
        for model in models:
            status = kept.get(model.key)
            # A version comes in the place of one that goes, whose calls and streams have somewhere to go.
            goes = next((one for one in served.values() if one.name == model.name and one.can_answer), None)
            if status is None and goes is not None:
                replace.append((model, served.pop(goes.key).key))
            elif status is None or status.state is ModelState.FAILED:
                load.append(model)
            elif status.config.routed_as(model) != model or files[model.key] != self._files.get(model.key, ()):
                replace.append((model, model.key))
        return Changes(tuple(load), tuple(replace), tuple(status.config for status in served.values()))

    @staticmethod
    async def _do(what: str, name: str, change: Awaitable[None]) -> bool:
        try:
            await change
        except (HeatlensError, ConfigError, ModelLoadError) as error:
            _log.error("reload: cannot %s the model %s: %s", what, name, error)
            return False
        return True

    def _warn_of_other_sections(self, config: Config) -> None:
        for section in sorted(Config.model_fields.keys() - {"models"}):
            before, now = (getattr(one, section).model_dump() for one in (self._config, config))
            keys = [f"{section}.{key}" for key in now if now[key] != before[key] and key != "default_model"]
            if keys:
                _log.warning("%s changed, which takes a restart", ", ".join(keys))


def files_of(model: ModelConfig) -> Files:
    """The files that a model is made of, as far as its configuration names them."""
    return tuple(
        (str(path), found.st_size, found.st_mtime_ns)
        for path in _paths(model)
        for found in [path.stat() if path.exists() else None]
        if found is not None
    )


def _paths(model: ModelConfig) -> Iterator[Path]:
    if model.weights.endswith(WEIGHT_FILE_SUFFIXES):
        yield Path(model.weights)
    if model.labels is not None:
        yield model.labels
    if model.source.startswith(ONNX_PREFIX):
        yield Path(model.source.removeprefix(ONNX_PREFIX))
    if model.source.startswith(EXPORT_PREFIX):
        yield from sorted(Path(model.source.removeprefix(EXPORT_PREFIX)).glob("*"))
