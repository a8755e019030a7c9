"""From a model's configuration to an engine that has explained an image.

No torch is imported until a model has to be loaded: a cached export needs none.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from heatlens_server.backends.onnx.embedded.network import EmbeddedNetwork, embedded_network
from heatlens_server.backends.onnx.export_cache import ExportCache
from heatlens_server.backends.onnx.manifest import Manifest, read_manifest
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.providers import CUDA, cuda_device_count, load_runtime
from heatlens_server.backends.onnx.stored import read_network
from heatlens_server.config import EXPORT_PREFIX, ONNX_PREFIX, ModelConfig
from heatlens_server.core.engine import SteppingEngine
from heatlens_server.core.errors import ExportError, ModelLoadError
from heatlens_server.core.extras import brought_by, is_installed
from heatlens_server.core.graph_spec import Format
from heatlens_server.core.methods import Method, name_of
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.built_model import BuiltModel
from heatlens_server.fleet.export import Export, Report, importing_torch, labels_of, load_network
from heatlens_server.fleet.export_process import Make, export_in_process, get_or_export, is_missing
from heatlens_server.fleet.fallback_engine import ExportEngine, about_missing, with_torch_fallback
from heatlens_server.fleet.instances import on_all_devices
from heatlens_server.fleet.torch_record import read_record
from heatlens_server.fleet.warm_up import (
    about_family,
    check_answers,
    check_method,
    default_method,
    family_method,
    warm_up,
)

if TYPE_CHECKING:
    from heatlens_server.backends.torch.sources.loaded_model import LoadedModel

_log = logging.getLogger(__name__)

_UNKNOWN_CLASSES = (
    "Nothing tells how many classes the detector has: any class id may be asked for, and boxes have no names; labels "
    "overrides that."
)

_ONE_BY_ONE = (
    "the network mixes the images of a batch, so that they change each other's scores: images run one by one, as with "
    "batching.max_batch_size = 1"
)

_ONE_BY_ONE_FILE = (
    "The file takes one image at a time, or mixes the images of a batch: images run one by one, as with "
    "batching.max_batch_size = 1."
)

_BACKGROUND_NICENESS = 10
"""Of processes that export models while torch answers."""

_ENGINES = {Format.ONNX: "onnxruntime", Format.TORCHSCRIPT: "torchscript"}
_FORMATS = {engine: file_format for file_format, engine in _ENGINES.items()}


class _Unfit(Exception):
    """Why "auto" does not take onnxruntime for a model. The message names no path of this machine."""


def build(
    config: ModelConfig,
    *,
    cache_dir: Path | None,
    report: Report | None = None,
    make: Make | None = None,
    at_once: bool = False,
) -> BuiltModel:
    """Load a model, make its engines and warm each up with a batch of one and, on a GPU, a full one.

    Args:
        config: the model.
        cache_dir: where exports are kept; None for nowhere.
        report: told each phase of an export, which takes a while; None to log them, and what is assumed.
        make: makes exports; None for a process that does.
        at_once: make no export that a model can do without: torch runs it, and `next_engine` says what is to follow.

    Raises:
        ModelLoadError: with a message that may be shown to clients.
    """
    tell = report or (lambda line: _log.info("model %s: %s", config.name, line))
    build_one = functools.partial(_build, cache_dir=cache_dir, tell=tell, make=make, at_once=at_once)
    built = on_all_devices(config, build_one)
    # Who takes the phases shows these too.
    for assumption in built.assumptions if report is None else ():
        _log.warning("model %s: %s", config.name, assumption)
    return built


def build_export(config: ModelConfig, *, cache_dir: Path | None) -> BuiltModel:
    """Export a model whose `next_engine` is onnxruntime, in a process of low priority, and open its graphs.

    Raises:
        ModelLoadError: it cannot be exported, or its graphs cannot be run; torch goes on.
    """
    return on_all_devices(config, functools.partial(_build_export, ExportCache(cache_dir)))


def _build_export(cache: ExportCache, config: ModelConfig) -> BuiltModel:
    load = functools.cache(functools.partial(load_network, config))
    tell = functools.partial(_log.info, "model %s: %s", config.name)
    make = functools.partial(export_in_process, niceness=_BACKGROUND_NICENESS)
    try:
        export = get_or_export(config, Format.ONNX, load=load, cache=cache, retry=False, report=tell, make=make)
        serve = functools.partial(_build_cached, config, _checked(config, export))
        return _try_onnxruntime(config, serve, _device_for_onnxruntime(config))
    except (_Unfit, ExportError) as error:
        raise ModelLoadError(str(error)) from error


def _build(
    config: ModelConfig, *, cache_dir: Path | None, tell: Report, make: Make | None, at_once: bool
) -> BuiltModel:
    if config.source.startswith(EXPORT_PREFIX):
        return _build_from_folder(config)
    if config.source.startswith(ONNX_PREFIX):
        return _build_from_file(config)
    load = functools.cache(functools.partial(load_network, config))
    if _takes_torch(config):
        return _build_torch(config, load())
    embedded = embedded_network(config)
    cache = ExportCache(cache_dir)
    cache.sweep()

    def graphs(file_format: Format, *, retry: bool) -> Callable[..., BuiltModel]:
        if embedded is not None:
            return functools.partial(_build_embedded, config, embedded)
        export = get_or_export(config, file_format, load=load, cache=cache, retry=retry, report=tell, make=make)
        return functools.partial(_build_cached, config, _checked(config, export))

    if config.engine != "auto":
        try:
            serve = graphs(_FORMATS[config.engine], retry=True)
        except ExportError as error:
            raise ModelLoadError(f"the model cannot be exported for {config.engine}: {error}") from error
        return serve(device=config.devices[0])
    next_engine = ""
    try:
        device = _device_for_onnxruntime(config)
        if at_once and embedded is None and is_missing(config, Format.ONNX, cache, load):
            next_engine = _ENGINES[Format.ONNX]
        else:
            return _try_onnxruntime(config, graphs(Format.ONNX, retry=False), device)
    except (_Unfit, ExportError) as error:
        if not is_installed("torch"):
            raise ModelLoadError(f"onnxruntime does not run the model, and torch is not installed: {error}") from error
        _log.warning("model %s is run by torch, not by onnxruntime: %s", config.name, error)
    built = _build_torch(config, load())
    # Only models of some tasks are exported.
    return replace(built, next_engine=next_engine if built.engine.info.task.traits.exportable else "")


def _checked(config: ModelConfig, export: Export) -> Export:
    """Say what verification left out of a model's export.

    Raises:
        ExportError: the default method by the default layer.
    """
    method = family_method(config, export.manifest.graphs[0].grid)
    default = (export.manifest.layers[0], method.as_preset.method)
    for entry in export.manifest.left_out:
        if (entry.layer, entry.method) == default:
            raise ExportError(entry.reason)
    for entry in export.manifest.left_out:
        _log.warning(
            "model %s: the export lacks %s by %s, which %s: %s",
            config.name,
            entry.method,
            entry.layer,
            "torch runs beside it" if config.companion else "is not offered",
            entry.reason,
        )
    return export


def _takes_torch(config: ModelConfig) -> bool:
    """Whether torch alone runs a model, as far as the configuration tells."""
    return config.engine == "torch" or not (config.task == "auto" or Task(config.task).traits.exportable)


def _device_for_onnxruntime(config: ModelConfig) -> str:
    """Where "auto" runs a model with onnxruntime.

    Raises:
        _Unfit: onnxruntime is not installed as it should be, or torch is better at it.
    """
    if config.precision == "bf16":
        raise _Unfit("it does not run bf16")
    try:
        runtime = load_runtime()
    except ModelLoadError as error:
        raise _Unfit(str(error)) from error
    # The driver is asked only if need be: that alone takes memory on a GPU.
    device = config.devices[0]
    has_gpu = device != "cpu" and (device != "auto" or cuda_device_count() > 0)
    if has_gpu and CUDA in runtime.get_available_providers():
        return "cuda:0" if device == "auto" else device
    if has_gpu and (device != "auto" or _torch_has_gpu()):
        raise _Unfit(f"this onnxruntime has no {CUDA}: install onnxruntime-gpu in its place")
    if config.precision == "fp16":
        raise _Unfit("fp16 makes it slower on a CPU, not faster")
    return "cpu"


def _torch_has_gpu() -> bool:
    if not is_installed("torch"):
        return False
    with importing_torch():
        import torch  # noqa: PLC0415 - takes seconds, and matters only where onnxruntime cannot use a GPU that is there

    return torch.cuda.is_available()


def _try_onnxruntime(config: ModelConfig, serve: Callable[..., BuiltModel], device: str) -> BuiltModel:
    """Raises _Unfit if onnxruntime cannot run a model's graphs after all."""
    try:
        return serve(device=device)
    except ModelLoadError as error:
        movable = config.device == "auto" and config.precision == "fp32"
        if movable and device != "cpu" and not _torch_has_gpu():
            _log.warning("model %s runs on the CPU although there is a GPU: %s", config.name, error)
            return _try_onnxruntime(config, serve, "cpu")
        raise _Unfit(str(error)) from error
    # onnxruntime has an exception class for each of its status codes, and paths in their messages.
    except Exception as error:
        _log.exception("model %s: onnxruntime cannot run its export", config.name)
        raise _Unfit(f"it cannot run the export ({type(error).__name__})") from error


def _build_torch(config: ModelConfig, model: "LoadedModel") -> BuiltModel:
    with importing_torch():
        from heatlens_server.backends.torch.engine import TorchEngine  # noqa: PLC0415 - imports torch

    engine = TorchEngine(model, device=config.devices[0], precision=config.precision)
    method, assumptions = default_method(config, engine.info, model.grid(model.layers[0]))
    if engine.info.runs_one_by_one:
        assumptions = (*assumptions, _ONE_BY_ONE)
    return _finish(
        config,
        engine,
        preprocess=model.preprocess,
        version=model.version,
        labels=model.labels,
        method=method,
        assumptions=(*model.assumptions, *assumptions),
    )


def _build_from_folder(config: ModelConfig) -> BuiltModel:
    """Serve an export that people made: everything about it is in its manifest."""
    folder = Path(config.source.removeprefix(EXPORT_PREFIX))
    try:
        manifest = read_manifest(folder)
    except ExportError as error:
        raise ModelLoadError(f"the export cannot be served: {error}") from error
    engine = _ENGINES.get(manifest.format)
    if engine is None:
        raise ModelLoadError(f"no engine serves {manifest.format} exports: export the model as onnx or torchscript")
    if config.engine not in {"auto", engine}:
        raise ModelLoadError(f"engine {config.engine!r} does not run {manifest.format} exports: set {engine!r}")
    if "precision" in config.model_fields_set and config.precision != manifest.precision:
        raise ModelLoadError(f"the export runs in {manifest.precision}, not {config.precision}")
    if config.provider != "auto" and engine != "onnxruntime":
        raise ModelLoadError(f"provider is for onnx exports, and this one is {manifest.format}")
    if manifest.task is not None and config.task not in {"auto", manifest.task}:
        raise ModelLoadError(f"task: the export is of a model for {manifest.task}, not {config.task}")
    if manifest.task is None and config.task == "auto":
        _log.warning("model %s: the export does not say its task: taken as classification; set task", config.name)
    unknown = [layer for layer in config.layers if layer not in manifest.layers]
    if unknown:
        raise ModelLoadError(f"the export has no layer {unknown[0]!r}, only {', '.join(manifest.layers)}")
    layers = config.layers or manifest.layers
    manifest = replace(
        manifest, graphs=tuple(graph for layer in layers for graph in manifest.graphs if graph.layer == layer)
    )
    graph = manifest.graphs[0]
    method = config.method if "method" in config.model_fields_set else name_of(graph.method, graph.score)
    try:
        return _build_exported(config, Export(folder, manifest), device=config.devices[0], method=method)
    except ModelLoadError:
        raise
    # Runtimes raise all sorts, with paths in their messages.
    except Exception as error:
        _log.exception("model %s: its export does not run", config.name)
        raise ModelLoadError(f"the export does not run as its manifest says ({type(error).__name__})") from error


def _build_from_file(config: ModelConfig) -> BuiltModel:
    """Serve an ONNX file of anybody's."""
    with brought_by("onnx"):
        from heatlens_server.backends.onnx.source.load import load_file  # noqa: PLC0415 - imports onnx
        from heatlens_server.backends.onnx.source.verify import verified  # noqa: PLC0415 - imports onnx

    loaded = verified(load_file(Path(config.source.removeprefix(ONNX_PREFIX)), config))
    device = config.devices[0] if config.provider != "cpu" else "cpu"
    engine = NetworkEngine(loaded, device=device, provider=config.provider)
    grid = loaded.info.layers[0].grid
    method, about = default_method(config, engine.info, grid)
    about_batches = () if loaded.info.takes_batches else (_ONE_BY_ONE_FILE,)
    return _finish(
        config,
        engine,
        preprocess=loaded.info.preprocess,
        version=loaded.version,
        labels=loaded.labels,
        method=method,
        assumptions=(*loaded.assumptions, *about_batches, *about),
        layer_choices=loaded.layer_choices,
    )


def _build_embedded(config: ModelConfig, network: EmbeddedNetwork, *, device: str) -> BuiltModel:
    """Serve the embedded model by the graphs that come with the server."""
    primary = NetworkEngine(network, device=device, provider=config.provider)
    engine = with_torch_fallback(config, primary, methods=network.torch_methods, version=network.version)
    return _finish(
        config,
        engine,
        preprocess=network.info.preprocess,
        version=network.version,
        labels=network.labels,
        method=config.method,
        assumptions=about_missing(engine.info),
    )


def _build_cached(config: ModelConfig, export: Export, *, device: str) -> BuiltModel:
    """Serve an export that was made of the configured model."""
    grid = export.manifest.graphs[0].grid
    built = _build_exported(config, export, device=device, method=family_method(config, grid))
    return replace(
        built, assumptions=(*built.assumptions, *about_family(config, grid)), export_was_cached=export.was_cached
    )


def _build_exported(config: ModelConfig, export: Export, *, device: str, method: Method) -> BuiltModel:
    manifest = export.manifest
    if config.task != "auto":
        manifest = replace(manifest, task=Task(config.task))
    default, base = manifest.layers[0], method.as_preset.method
    # The engine opens the first graph now, and the others when they are asked for.
    graphs = sorted(manifest.graphs, key=lambda graph: (graph.layer != default, graph.method is not base))
    is_cached = not config.source.startswith(EXPORT_PREFIX)
    ordered = replace(manifest, graphs=tuple(graphs))
    primary = _open(export.folder, ordered, device=device, provider=config.provider, is_owned=is_cached)
    # An exported folder holds no network.
    record = read_record(export.folder, manifest) if is_cached else None
    engine = with_torch_fallback(
        config,
        primary,
        methods=record.methods if record else (),
        version=manifest.weights_version,
        layers=tuple(dict.fromkeys(entry.layer for entry in manifest.left_out)),
    )
    return _finish(
        config,
        engine,
        preprocess=manifest.preprocess,
        version=manifest.weights_version,
        labels=manifest.labels,
        method=method,
        assumptions=(*manifest.assumptions, *about_missing(engine.info)),
    )


def _open(folder: Path, manifest: Manifest, *, device: str, provider: str, is_owned: bool) -> ExportEngine:
    if manifest.is_network:
        return NetworkEngine(read_network(folder, manifest, is_owned=is_owned), device=device, provider=provider)
    if manifest.format is Format.ONNX:
        raise ModelLoadError(
            "the export was made by a version of heatlens that stored no passes: export the model again"
        )
    with importing_torch():
        from heatlens_server.backends.torch.torchscript_engine import TorchScriptEngine  # noqa: PLC0415 - imports torch

    return TorchScriptEngine(folder, manifest, device=device)


def _finish(
    config: ModelConfig,
    engine: SteppingEngine,
    *,
    preprocess: PreprocessSpec,
    version: str,
    labels: tuple[str, ...],
    method: Method,
    assumptions: tuple[str, ...],
    layer_choices: tuple[str, ...] = (),
) -> BuiltModel:
    """Check an engine and warm it up; lay the configuration over what is known about its model."""
    try:
        labels = labels_of(config, labels, engine.info.class_count)
        if not (engine.info.class_count or labels):
            assumptions = (*assumptions, _UNKNOWN_CLASSES)
        check_method(engine, method)
        if config.source.startswith(EXPORT_PREFIX):
            check_answers(engine, method)
        warm_up(engine, config, method)
    except BaseException:
        engine.close()
        raise
    return BuiltModel(
        engine,
        preprocess,
        config.version or version,
        labels,
        method,
        assumptions,
        layer_choices,
        weights_version=version,
    )
