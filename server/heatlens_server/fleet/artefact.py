"""A model's export, from the cache or made now. Torch is imported when a model has to be loaded, and not before."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from heatlens_server.backends.onnx.export_cache import ArtefactCache
from heatlens_server.backends.onnx.manifest import Manifest
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import Engine
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format
from heatlens_server.core.labels import read_labels
from heatlens_server.core.methods import Method
from heatlens_server.fleet.cache_key import artefact_key, is_settled
from heatlens_server.fleet.likeness import is_alike
from heatlens_server.fleet.stderr import stderr_to_log
from heatlens_server.fleet.torch_import import importing_torch
from heatlens_server.fleet.torch_methods import keep_abilities
from heatlens_server.fleet.warm_up import check_method, warm_up

if TYPE_CHECKING:
    from heatlens_server.backends.torch.sources.loaded_model import LoadedModel

_log = logging.getLogger(__name__)

Report = Callable[[str], None]
"""Takes one line about the phase that begins."""

# Tracing and torch's exporters keep state that belongs to the process.
_exporting = threading.Lock()


@dataclass(frozen=True, slots=True)
class Artefact:
    """An export that can be served.

    Attributes:
        folder: it is in.
        manifest: of it.
    """

    folder: Path
    manifest: Manifest


class PassingError(ExportError):
    """A failure that says nothing about the next start."""


class LazyModel:
    """A model that is loaded when it is first needed. For one thread."""

    def __init__(self, config: ModelConfig) -> None:
        """Load nothing yet.

        Args:
            config: the model.
        """
        self._config = config
        self._model: LoadedModel | None = None

    def get(self) -> "LoadedModel":
        """Return the model, with the labels and the version of its source, whatever the configuration says.

        Raises:
            ModelLoadError: it cannot be loaded, or the configured labels do not fit.
        """
        if self._model is None:
            with importing_torch:
                from heatlens_server.backends.torch.sources.load import load_model  # noqa: PLC0415 - imports torch

            self._model = load_model(self._config.model_copy(update={"labels": None, "version": ""}))
            # Told before an export takes its time.
            labels_of(self._config, self._model.labels, self._model.class_count)
        return self._model


def labels_of(config: ModelConfig, own: tuple[str, ...], class_count: int) -> tuple[str, ...]:
    """The configured labels, or else the model's own.

    Raises:
        ModelLoadError: the labels file cannot be read, or does not fit.
    """
    return own if config.labels is None else read_labels(config.labels, class_count)


def obtain(
    config: ModelConfig,
    file_format: Format,
    *,
    lazy: LazyModel,
    cache: ArtefactCache,
    retry: bool,
    report: Report,
) -> Artefact:
    """Return a model's export: the cached one if it is whole and still right, else a new one.

    Args:
        config: the model.
        file_format: ONNX or TORCHSCRIPT.
        lazy: the same model, loaded if need be.
        cache: where exports are kept.
        retry: try again what failed at an earlier start.
        report: told each phase of an export.

    Raises:
        ExportError: the model cannot be exported, or its export is wrong.
        ModelLoadError: the model cannot be loaded or explained at all.
    """
    model = None if is_settled(config) else lazy.get()
    key = artefact_key(config, file_format, model)
    found = find(cache, key, model)
    if found is not None:
        return found
    with cache.making(key, report):
        # Somebody else may have made it meanwhile.
        found = find(cache, key, model)
        if found is not None:
            return found
        reason = None if retry else cache.failure(key)
        if reason is not None:
            raise ExportError(f"{reason} (found at an earlier start, and kept in {key}.failed of the cache)")
        try:
            artefact = _make(config, file_format, key, lazy=lazy, cache=cache, report=report)
        except PassingError:
            raise
        except ExportError as error:
            cache.remember_failure(key, str(error))
            raise
        cache.forget_failure(key)
        return artefact


def find(cache: ArtefactCache, key: str, model: "LoadedModel | None") -> Artefact | None:
    """Return a cached export; None if there is none that is whole and still says what the model says.

    Args:
        cache: where exports are kept.
        key: of the export.
        model: that the export must agree with; None if the key says all.
    """
    found = cache.find(key)
    if found is None:
        return None
    artefact = Artefact(*found)
    if model is None or _is_of(artefact, model):
        return artefact
    _log.warning("the cached export %s is not of the model %s as it is now: it is removed", key, model.name)
    cache.remove(key)
    return None


def _make(
    config: ModelConfig,
    file_format: Format,
    key: str,
    *,
    lazy: LazyModel,
    cache: ArtefactCache,
    report: Report,
) -> Artefact:
    with importing_torch:
        from heatlens_server.backends.torch.export.folder import export_bundle  # noqa: PLC0415 - imports torch
        from heatlens_server.backends.torch.export.verify import verify  # noqa: PLC0415 - imports torch

    model = lazy.get()
    if not model.task.traits.exportable:
        raise ExportError(f"exports are of classifiers, and this model is for {model.task}")
    methods = _explainable(config, model)
    report(f"exporting for {file_format}, which is done once: later starts take it from the cache")
    try:
        with _exporting, stderr_to_log() as aside, cache.writing(key) as unfinished:

            def tell(line: str) -> None:
                aside(lambda: report(line))

            manifest = export_bundle(
                model,
                methods=[method for method in methods if method.traits.exportable],
                file_format=file_format,
                precision=config.precision,
                source=config.source,
                folder=unfinished.folder,
                report=tell,
            )
            parity = verify(model, unfinished.folder, manifest, report=tell)
            files = {**manifest.files, **keep_abilities(unfinished.folder, methods)}
            return Artefact(*unfinished.keep(replace(manifest, parity=parity, files=files)))
    except ExportError as error:
        if isinstance(error.__cause__, (MemoryError, OSError)):
            raise PassingError(str(error)) from error
        raise
    except OSError as error:
        # The disk's fault, not the model's: not remembered.
        raise PassingError(f"the export could not be written ({error.strerror or type(error).__name__})") from error
    # Exporters are large, and the network is somebody else's code.
    except Exception as error:
        _log.exception("model %s: the export failed unexpectedly", config.name)
        raise PassingError(f"an unexpected {type(error).__name__}, see the log") from error


def _explainable(config: ModelConfig, model: "LoadedModel") -> tuple[Method, ...]:
    """Which methods the reference engine has for a model. A model that it cannot explain is not exported either.

    Raises:
        ModelLoadError: it cannot explain the model, or not with the configured method.
    """
    with importing_torch:
        from heatlens_server.backends.torch.engine import TorchEngine  # noqa: PLC0415 - imports torch

    reference = TorchEngine(model, device="cpu")
    try:
        check_method(reference, config.method)
        warm_up(reference, config, config.method)
        return reference.info.methods
    finally:
        _release(reference, model)


def _is_of(artefact: Artefact, model: "LoadedModel") -> bool:
    """Whether an export explains noise as a network does."""
    with importing_torch:
        from heatlens_server.backends.torch.engine import TorchEngine  # noqa: PLC0415 - imports torch

    reference = TorchEngine(model, device="cpu")
    try:
        exported = _open_on_cpu(artefact)
        try:
            return is_alike(reference, exported, artefact.manifest.precision)
        finally:
            exported.close()
    # What cannot be run is as wrong as what runs wrongly.
    except Exception:
        _log.exception("model %s: its cached export cannot be compared with it", model.name)
        return False
    finally:
        _release(reference, model)


def _open_on_cpu(artefact: Artefact) -> Engine:
    if artefact.manifest.format is Format.ONNX:
        from heatlens_server.backends.onnx.engine import OnnxRuntimeEngine  # noqa: PLC0415

        return OnnxRuntimeEngine(artefact.folder, artefact.manifest, device="cpu")
    with importing_torch:
        from heatlens_server.backends.torch.torchscript_engine import TorchScriptEngine  # noqa: PLC0415 - imports torch

    return TorchScriptEngine(artefact.folder, artefact.manifest, device="cpu")


def _release(engine: Engine, model: "LoadedModel") -> None:
    """Take the engine's hooks off a model, and lay out its weights as they were."""
    import torch  # noqa: PLC0415

    engine.close()
    model.module.to(memory_format=torch.contiguous_format)
