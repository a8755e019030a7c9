"""Making a model's export, once for all processes that share a cache. Torch is imported when a model is loaded."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from heatlens_server.backends.onnx.export_cache import ExportCache
from heatlens_server.backends.onnx.manifest import Manifest
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ExportError
from heatlens_server.core.extras import brought_by, importing
from heatlens_server.core.graph_spec import Format
from heatlens_server.core.labels import read_labels
from heatlens_server.core.methods import CLOSED_FORMS
from heatlens_server.fleet.cache_key import export_key, is_settled
from heatlens_server.fleet.torch_record import TorchRecord, record_of
from heatlens_server.fleet.warm_up import check_method, warm_up

if TYPE_CHECKING:
    from heatlens_server.backends.torch.sources.loaded_model import LoadedModel

_log = logging.getLogger(__name__)

Report = Callable[[str], None]
"""Takes one line about the phase that begins."""


@contextlib.contextmanager
def importing_torch() -> Iterator[None]:
    """To be put around every import, in the code of a function, of something that imports torch.

    Raises:
        ModelLoadError: torch, or what comes with it, is not installed.
    """
    with importing, brought_by("torch"):
        yield


@dataclass(frozen=True, slots=True)
class Export:
    """An export that can be served.

    Attributes:
        folder: it is in.
        manifest: of it.
        was_cached: whether it was there already.
    """

    folder: Path
    manifest: Manifest
    was_cached: bool = True


class TransientError(ExportError):
    """A failure that says nothing about the next start."""


class NotWrittenError(TransientError):
    """An export could not be written where it was to be kept."""


def load_network(config: ModelConfig) -> "LoadedModel":
    """Load a model with the labels and the version of its source, whatever the configuration says.

    Raises:
        ModelLoadError: it cannot be loaded, torch is not installed, or the configured labels do not fit.
    """
    with importing_torch():
        from heatlens_server.backends.torch.sources.load import load_model  # noqa: PLC0415 - imports torch

    model = load_model(config.model_copy(update={"labels": None, "version": ""}))
    # Told before an export takes its time.
    labels_of(config, model.labels, model.class_count)
    return model


def labels_of(config: ModelConfig, own: tuple[str, ...], class_count: int) -> tuple[str, ...]:
    """The configured labels, or else the model's own.

    Raises:
        ModelLoadError: the labels file cannot be read, or does not fit.
    """
    return own if config.labels is None else read_labels(config.labels, class_count)


def make_export(config: ModelConfig, file_format: Format, *, cache: ExportCache, retry: bool, report: Report) -> str:
    """Put a model's export into the cache, if no other process did so meanwhile. One at a time in a process.

    Args:
        config: the model.
        file_format: ONNX or TORCHSCRIPT.
        cache: where the export is kept; can be written to.
        retry: try again what failed at an earlier start.
        report: told each phase.

    Returns:
        Its key.

    Raises:
        ExportError: the model cannot be exported, or its export is wrong.
        ModelLoadError: the model cannot be loaded or explained at all.
    """
    model = None if is_settled(config) else load_network(config)
    key = export_key(config, file_format, model)
    with cache.making(key, report):
        if cache.find(key) is not None:
            return key
        if not retry:
            check_failure(cache, key)
        try:
            _export(config, file_format, key, model or load_network(config), cache=cache, report=report)
        except TransientError:
            raise
        except ExportError as error:
            cache.remember_failure(key, str(error))
            raise
        cache.forget_failure(key)
    return key


def check_failure(cache: ExportCache, key: str) -> None:
    """Raise ExportError if an earlier start could not make this export."""
    reason = cache.failure(key)
    if reason is not None:
        raise ExportError(f"{reason} (found at an earlier start, and kept in {key}.failed of the cache)")


def _export(
    config: ModelConfig, file_format: Format, key: str, model: "LoadedModel", *, cache: ExportCache, report: Report
) -> None:
    from heatlens_server.backends.torch.export.folder import (  # noqa: PLC0415 - imports torch
        export_bundle,
        without_left_out,
    )
    from heatlens_server.backends.torch.export.network import export_network  # noqa: PLC0415 - imports torch
    from heatlens_server.backends.torch.export.verify import verify  # noqa: PLC0415 - imports torch

    if not model.task.traits.exportable:
        raise ExportError(f"exports are of classifiers, and this model is for {model.task}")
    record = _record(config, model)
    report(f"exporting for {file_format}, which is done once: later starts take it from the cache")
    try:
        with cache.writing(key) as unfinished:
            methods = [method for method in record.methods if method in CLOSED_FORMS]
            write = export_network if file_format is Format.ONNX else export_bundle
            manifest = write(
                model,
                methods=methods,
                precision=config.precision,
                source=config.source,
                folder=unfinished.folder,
                report=report,
            )
            parity = verify(model, unfinished.folder, manifest, report=report)
            manifest = without_left_out(manifest, parity, unfinished.folder)
            unfinished.keep(replace(manifest, files={**manifest.files, **record.write(unfinished.folder)}))
    except ExportError as error:
        if isinstance(error.__cause__, OSError):
            raise NotWrittenError(str(error)) from error
        if isinstance(error.__cause__, MemoryError):
            raise TransientError(str(error)) from error
        raise
    except OSError as error:
        # The disk's fault, not the model's: not remembered.
        raise NotWrittenError(f"the export could not be written ({error.strerror or type(error).__name__})") from error
    # Exporters are large, and the network is foreign code.
    except Exception as error:
        _log.exception("model %s: the export failed unexpectedly", config.name)
        raise TransientError(f"an unexpected {type(error).__name__}, see the log") from error


def _record(config: ModelConfig, model: "LoadedModel") -> TorchRecord:
    """What the torch engine has for a model. A model that it cannot explain is not exported either.

    Raises:
        ExportError: the network has no gradients, or mixes the images of a batch.
        ModelLoadError: it cannot explain the model, or not with the configured method.
    """
    import torch  # noqa: PLC0415

    from heatlens_server.backends.torch.engine import TorchEngine  # noqa: PLC0415 - imports torch

    reference = TorchEngine(model, device="cpu")
    try:
        if reference.info.refusals:
            raise ExportError(f"exports hold gradients, and {next(iter(reference.info.refusals.values()))}")
        if reference.info.runs_one_by_one:
            raise ExportError("the network mixes the images of a batch, and exports run batches")
        check_method(reference, config.method)
        warm_up(reference, config, config.method)
        return record_of(reference)
    finally:
        reference.close()
        # As it was: the engine lays out weights as suits it.
        model.module.to(memory_format=torch.contiguous_format)
