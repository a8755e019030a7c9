"""`heatlens-server export`: from options as they are typed to an export, and what is said about it."""

import contextlib
import difflib
import functools
import io
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from heatlens_server.backends.onnx.delivery import check_folder
from heatlens_server.backends.onnx.manifest import Manifest
from heatlens_server.backends.onnx.triton import CONFIG_FILE, version_folder, write_config
from heatlens_server.config import EXPORT_PREFIX, ONNX_PREFIX, ModelConfig, load_config
from heatlens_server.core.errors import ConfigError, ExportError, ModelLoadError
from heatlens_server.core.extras import brought_by
from heatlens_server.core.graph_spec import MANIFEST_FILE, Format, GraphSpec, InputKind, Output
from heatlens_server.core.methods import CLOSED_FORMS, PRESETS, Method, Score
from heatlens_server.core.tasks import Activation, Task

if TYPE_CHECKING:
    from heatlens_server.backends.torch.sources.loaded_model import LoadedModel

_E = TypeVar("_E", bound=StrEnum)

_ANY = "any"
_ALL = "all"
_PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The command's options, checked as far as they can be without the model.

    Attributes:
        file_format: what the graph is written as.
        layer: the target layer; empty for the model's first.
        method: of the map; None for the model's own.
        score: what is differentiated; None for the method's own.
        classes: K; None for any.
        precision: "fp32" or "fp16".
        outputs: in the graph's order.
        gradients_named: whether `gradients` is among them by name, and not because all are.
        input: what `image` holds.
        verify: whether to verify.
        folder: where to; None for `triton`.
        triton: the Triton model repository to write to; None for `folder`.
    """

    file_format: Format
    layer: str
    method: Method | None
    score: Score | None
    classes: int | None
    precision: str
    outputs: tuple[Output, ...]
    gradients_named: bool
    input: InputKind
    verify: bool
    folder: Path | None
    triton: Path | None

    def folder_of(self, model: str) -> Path:
        """Where the export of a model goes.

        Raises:
            ConfigError: something else is there.
        """
        try:
            folder = cast("Path", self.folder) if self.triton is None else version_folder(self.triton, model)
            check_folder(folder)
        except ExportError as error:
            raise ConfigError(f"{'--output' if self.triton is None else '--triton'}: {error}") from error
        return folder


def parse_options(
    *,
    file_format: str,
    layer: str,
    method: str,
    target_score: str = "",
    classes: str,
    precision: str,
    outputs: str,
    input_kind: str,
    verify: bool,
    folder: Path | None = None,
    triton: Path | None = None,
) -> ExportOptions:
    """Check options as typed.

    Raises:
        ConfigError: one is wrong; the message names it and what it may be.
    """
    if classes != _ANY and not (classes.isascii() and classes.isdigit() and int(classes) > 0):
        raise ConfigError(f'--classes: must be a number from 1 on, or "{_ANY}", not {classes!r}')
    if precision not in _PRECISIONS:
        raise ConfigError(f"--precision: must be {' or '.join(_PRECISIONS)}, not {precision!r}")
    names = [name.strip() for name in outputs.split(",") if name.strip()]
    wanted = {_member("--outputs", Output, name, also=[_ALL]) for name in names if name != _ALL}
    if not names:
        raise ConfigError(f"--outputs: names none of {', '.join(Output)}")
    if (folder is None) == (triton is None):
        raise ConfigError("--output: give it or --triton, one of the two")
    if triton is not None and file_format != Format.ONNX:
        raise ConfigError(f"--format: what Triton's onnxruntime backend runs is onnx, not {file_format!r}")
    return ExportOptions(
        file_format=_member("--format", Format, file_format),
        layer=layer,
        method=_member("--method", Method, method) if method else None,
        score=_member("--target-score", Score, target_score) if target_score else None,
        classes=None if classes == _ANY else int(classes),
        precision=precision,
        outputs=tuple(output for output in Output if _ALL in names or output in wanted),
        gradients_named=Output.GRADIENTS in wanted,
        input=_member("--input", InputKind, input_kind),
        verify=verify,
        folder=folder,
        triton=triton,
    )


def find_model(model: str, config: Path | None, weights: str) -> ModelConfig:
    """Find the configuration of the model to export.

    Args:
        model: a name in the configuration, or a source such as "torchvision:resnet50".
        config: the configuration file; None for the default configuration.
        weights: of a source; empty for its default.

    Raises:
        ConfigError: there is no such model, or an option is wrong.
    """
    if ":" in model:
        if config is not None:
            raise ConfigError(f"--config: goes with a model's name, not with a source such as {model}")
        name = model.rpartition(":")[2].rpartition("/")[2].removesuffix(".onnx")
        try:
            found = load_config(None, {"models": [{"name": name, "source": model, "weights": weights or "default"}]})
        except ConfigError as error:
            message = str(error).replace("models[0].weights", "--weights").replace("models[0].source", "MODEL")
            raise ConfigError(message) from error
        (chosen,) = found.models
    else:
        if weights:
            raise ConfigError("--weights: goes with a source such as torchvision:resnet50; a configuration has its own")
        models = {chosen.key: chosen for chosen in load_config(config).models}
        # A name stands for its first version.
        for chosen in list(models.values()):
            models.setdefault(chosen.name, chosen)
        if model not in models:
            raise ConfigError(
                f"MODEL: there is no model {model!r}, only {', '.join(models)}{_did_you_mean(model, models)}"
            )
        chosen = models[model]
    if chosen.source.startswith(EXPORT_PREFIX):
        raise ConfigError(f"MODEL: {model} is an export already")
    return chosen


def run_export(config: ModelConfig, options: ExportOptions, *, tell: Callable[[str], None]) -> Manifest:
    """Load a model and export it.

    Args:
        config: the model.
        options: how.
        tell: takes one line of progress.

    Raises:
        ConfigError: an option does not fit the model; the message names it.
        ExportError: the export failed; nothing is left behind.
        ModelLoadError: the model cannot be loaded, or torch is not installed.
    """
    started = time.monotonic()
    method, score = _resolved(options.method or config.method, options.score)

    def report(line: str) -> None:
        tell(f"{time.monotonic() - started:6.1f} s  {line}")

    folder = options.folder_of(config.name)
    layers = (options.layer,) if options.layer else config.layers
    export = _export_file if config.source.startswith(ONNX_PREFIX) else _export_network
    try:
        config = config.model_copy(update={"layers": layers})
        manifest = export(config, options, folder, method=method, score=score, report=report)
    except ModelLoadError as error:
        if options.layer and str(error).startswith("layers:"):
            raise ConfigError(f"--layer:{str(error).removeprefix('layers:')}") from error
        raise
    if options.triton is not None:
        write_config(
            folder,
            manifest,
            max_batch_size=config.batching.max_batch_size,
            devices=config.devices,
            # What is measured is our engine.
            instances=1 if config.instances == "auto" else config.instances,
        )
    return manifest


def _export_network(
    config: ModelConfig,
    options: ExportOptions,
    folder: Path,
    *,
    method: Method,
    score: Score,
    report: Callable[[str], None],
) -> Manifest:
    """Export a network of torch's."""
    # Only now: they import torch, which takes seconds, and a wrong option should be told at once.
    with brought_by("torch"):
        from heatlens_server.backends.torch.export.delivery import export_model  # noqa: PLC0415
        from heatlens_server.backends.torch.sources.load import load_model  # noqa: PLC0415

    # torch's exporters write whole graphs to it.
    with contextlib.redirect_stderr(io.StringIO()):
        report(f"loading {config.name}")
        model = load_model(config)
        _check_classes(options, model.name, model.class_count)
        _check_method(method, model)
        return export_model(
            model,
            _spec(options, method, score, model.layers[0], model.task),
            file_format=options.file_format,
            source=config.source,
            folder=folder,
            verify=options.verify,
            report=report,
        )


def _export_file(
    config: ModelConfig,
    options: ExportOptions,
    folder: Path,
    *,
    method: Method,
    score: Score,
    report: Callable[[str], None],
) -> Manifest:
    """Export the explaining file of an ONNX file."""
    with brought_by("onnx"):
        from heatlens_server.backends.onnx.source.export import export_file, parity_of  # noqa: PLC0415 - imports onnx
        from heatlens_server.backends.onnx.source.load import load_file  # noqa: PLC0415 - imports onnx

    if options.file_format is not Format.ONNX:
        raise ConfigError(f"--format: an ONNX file becomes another ONNX file, not {options.file_format}")
    if options.precision != "fp32":
        raise ConfigError(f"--precision: files are computed in fp32, not {options.precision}")
    report(f"reading {config.name}")
    loaded = load_file(Path(config.source.removeprefix(ONNX_PREFIX)), config)
    about = loaded.info
    _check_classes(options, config.name, about.class_count)
    if (reason := about.refusals.get(method)) is not None:
        raise ConfigError(f"--method: {method} is not supported: {reason}")
    if method is Method.CAM and not about.has_linear_head:
        raise ConfigError(
            f"--method: cam needs logits that are one linear layer over the pooled target layer, which those of "
            f"{config.name} by {about.layers[0].name} are not"
        )
    spec = _spec(options, method, score, about.layers[0].name, about.task)
    return export_file(
        loaded,
        spec,
        name=config.name,
        source=config.source,
        folder=folder,
        judge=functools.partial(parity_of, loaded, spec, report) if options.verify else None,
        report=report,
    )


def _spec(options: ExportOptions, method: Method, score: Score, layer: str, task: Task) -> GraphSpec:
    # A backward pass for a map that needs none has to be asked for by name.
    gradients = options.gradients_named or not method.traits.class_free
    return GraphSpec(
        layer=layer,
        method=method,
        classes=options.classes,
        precision=options.precision,
        input=options.input,
        outputs=tuple(output for output in options.outputs if output is not Output.GRADIENTS or gradients),
        score=score,
        sigmoid=task.traits.activation is Activation.SIGMOID,
    )


def _check_classes(options: ExportOptions, name: str, class_count: int) -> None:
    if options.classes is not None and options.classes > class_count:
        raise ConfigError(f"--classes: {name} has {class_count} classes, which is the most")
    if options.classes is None and class_count == 1:
        raise ConfigError(f'--classes: {name} has 1 class, so "{_ANY}" is no choice')


def describe(manifest: Manifest, folder: Path, *, triton: bool = False) -> list[str]:
    """Say in a few lines what an export is, where it is, and how right.

    Args:
        manifest: of the export.
        folder: that it is in.
        triton: whether that is a version's in a Triton model repository.
    """
    graph = manifest.graphs[0]
    classes = "any number of classes" if manifest.classes is None else f"classes: {manifest.classes}"
    score = "" if graph.score is Score.LOGIT else f" of the {graph.score}"
    lines = [f"{manifest.model} by {graph.layer}, {graph.method}{score}, {manifest.precision}, {classes}"]
    files = [folder / name for name in (*manifest.files, MANIFEST_FILE)]
    lines += [f"{path}  {path.stat().st_size / 1e6:.2f} MB" for path in files]
    lines += [str(folder.parent / CONFIG_FILE)] * triton
    parity = manifest.parity
    if not parity:
        return [*lines, "not verified"]
    if "photos" in parity:
        reference = f"float64 on {len(parity['photos'])} photos"
    else:
        judged = ", and gradients against differences in float64," if "gradients" in parity["figures"] else ""
        reference = f"the file's own passes{judged} on noise"
    lines.append(
        f"verified against {reference} at batch sizes "
        f"{', '.join(map(str, parity['batch_sizes']))}; maps that could be compared: "
        f"{parity['informative_maps']} of {parity['compared_maps']}"
    )
    return lines + [
        f"  {name:<12} error {figure['error']:.1e}, "
        + (f"torch's {figure['torch_error']:.1e}, " if "torch_error" in figure else "")
        + f"bound {figure['bound']:.1e}"
        for name, figure in parity["figures"].items()
    ]


def _resolved(method: Method, score: Score | None) -> tuple[Method, Score]:
    """The closed form and the score that a method stands for.

    Raises:
        ConfigError: no graph of one layer can hold it, or the score is not for it.
    """
    preset = method.traits.preset
    if preset is not None:
        if preset.all_layers:
            raise ConfigError(
                f"--method: {method} is made of several layers' maps, and a graph has one: export "
                f"{preset.method} by each layer"
            )
        if score not in {None, preset.score}:
            raise ConfigError(f"--target-score: {method} explains the {preset.score}, not the {score}")
        return preset.method, preset.score
    if not method.traits.exportable:
        known = ", ".join([*CLOSED_FORMS, *(name for name in PRESETS if not name.as_preset.all_layers)])
        raise ConfigError(
            f"--method: {method} is no function of a layer's activations and gradients, as what a graph holds must be: "
            f"{known}"
        )
    if score is not None and score not in method.traits.exportable_scores:
        raise ConfigError(f"--target-score: {method} differentiates nothing, so it has no {score}")
    return method, score or Score.LOGIT


def _check_method(method: Method, model: "LoadedModel") -> None:
    from heatlens_server.backends.torch.export.delivery import methods_of  # noqa: PLC0415 - imports torch

    # The others apply to every layer.
    if method is Method.CAM and method not in (methods := methods_of(model)):
        raise ConfigError(
            f"--method: cam needs logits that are one linear layer over the pooled target layer, which those of "
            f"{model.name} by {model.layers[0]} are not; it has {', '.join(methods)}"
        )


def _member(option: str, choices: type[_E], value: str, also: Sequence[str] = ()) -> _E:
    try:
        return choices(value)
    except ValueError:
        names = [*choices, *also]
        raise ConfigError(f"{option}: {value!r} is none of {', '.join(names)}{_did_you_mean(value, names)}") from None


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else ""
