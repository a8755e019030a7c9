"""The explaining file of an ONNX file, for people and their own onnxruntime: written, compared, described."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from heatlens_server.backends.onnx.delivery import delivered
from heatlens_server.backends.onnx.gradient.tape import NotDifferentiable
from heatlens_server.backends.onnx.manifest import (
    GraphFile,
    Manifest,
    TensorInfo,
    installed_versions,
    read_manifest,
    sha256_of,
)
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.packed import Array
from heatlens_server.backends.onnx.providers import ON_CPU, load_runtime, open_session, session_options
from heatlens_server.backends.onnx.source.explain import explaining_model
from heatlens_server.backends.onnx.source.load import LoadedFile
from heatlens_server.backends.onnx.source.store import stored
from heatlens_server.backends.onnx.source.verify import MOST_GRADIENT_ERROR, is_wrong, judge_layer
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import CLASS_INDEX, IMAGE, Format, GraphSpec, InputKind, Output, meanings
from heatlens_server.core.methods import RANKED
from heatlens_server.core.targets import TopK

_MOST_INLINE_BYTES = 1 << 30
"""Larger networks keep their weights in a file beside the graph: protobuf takes 2 GB."""

_QUANTISERS = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
_BATCH_SIZES = (1, 3)
_BOUND = 1e-4
"""Of a map in [0, 1], and of logits relative to the largest."""

Report = Callable[[str], None]


def export_file(
    loaded: LoadedFile,
    spec: GraphSpec,
    *,
    name: str,
    source: str,
    folder: Path,
    judge: Callable[[Path, Manifest], Mapping[str, Any]] | None,
    report: Report,
) -> Manifest:
    """Write the explaining file of a file into a folder.

    Args:
        loaded: a classifier.
        spec: which graph.
        name: of the model.
        source: as in the configuration.
        folder: new, empty, or an earlier export, which is replaced once this one is done.
        judge: runs what is in a folder and compares it; returns `Manifest.parity`, or raises ExportError. None for not
            to.
        report: told each phase.

    Returns:
        The manifest, as written.

    Raises:
        ExportError: the file cannot be exported like this, or the export is wrong. The folder is as it was.
    """
    if not loaded.info.task.traits.exportable:
        raise ExportError(f"exports are of classifiers, and this model is for {loaded.info.task}")
    if not loaded.info.takes_batches and spec.classes != 1:
        raise ExportError("the file takes one image at a time, and so one class: export it with --classes 1")
    if not loaded.info.takes_batches:
        report("the file takes one image at a time, or mixes the images of a batch: the graph takes one image")
    with delivered(folder) as staging:
        report(f"differentiating {name} by {spec.layer}")
        try:
            model = explaining_model(loaded, spec)
        except NotDifferentiable as error:
            raise ExportError(str(error)) from error
        path = staging / f"{name}.onnx"
        report(f"writing {path.name}")
        size_bytes = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        ir.save(model, path, external_data=f"{name}.weights" if size_bytes > _MOST_INLINE_BYTES else None)
        try:
            onnx.checker.check_model(path)
        except onnx.checker.ValidationError as error:
            raise ExportError(f"the graph is no valid ONNX: {error}") from error
        stored(loaded).write(staging, beside=path)
        layer = next(layer for layer in loaded.info.layers if layer.name == spec.layer)
        graph = GraphFile(path.name, spec.layer, spec.method, spec.outputs, layer.grid, spec.score)
        manifest = manifest_of(loaded, spec, name=name, source=source, graphs=[graph], folder=staging, model=model)
        manifest.write(staging)
        if judge is not None:
            # What is judged is what a reader of the folder gets.
            manifest = read_manifest(staging)
            manifest = replace(manifest, parity=judge(staging, manifest))
            manifest.write(staging)
    return manifest


def manifest_of(
    loaded: LoadedFile,
    spec: GraphSpec,
    *,
    name: str,
    source: str,
    graphs: Sequence[GraphFile],
    folder: Path,
    model: ir.Model | None = None,
) -> Manifest:
    """What is written into a folder about the graphs in it; its parity is empty.

    Args:
        loaded: what was exported.
        spec: of the first graph.
        name: of the model.
        source: as in the configuration.
        graphs: the default one first.
        folder: holds all other files.
        model: the explaining graph, if there is one.
    """
    said = meanings(spec, loaded.info.preprocess)
    return Manifest(
        format=Format.ONNX,
        model=name,
        source=source,
        weights_version=loaded.version,
        class_count=loaded.info.class_count,
        labels=loaded.labels,
        preprocess=loaded.info.preprocess,
        input=spec.input,
        precision=spec.precision,
        classes=spec.classes,
        graphs=tuple(graphs),
        inputs=() if model is None else tuple(_tensor(value, said) for value in model.graph.inputs),
        outputs=() if model is None else tuple(_tensor(value, said) for value in model.graph.outputs),
        files={one.name: sha256_of(one) for one in sorted(folder.iterdir())},
        opset=loaded.model.graph.opset_imports.get(""),
        versions=installed_versions(),
        parity={},
        task=loaded.info.task,
        assumptions=loaded.assumptions,
    )


def _tensor(value: ir.Value, said: Mapping[str, str]) -> TensorInfo:
    dtype, shape = value.dtype, value.shape
    lengths = () if shape is None else tuple(n if isinstance(n, int) else str(n.value) for n in shape)
    return TensorInfo(
        str(value.name), "float32" if dtype is None else str(dtype.numpy()), lengths, said[str(value.name)]
    )


def parity_of(
    loaded: LoadedFile, spec: GraphSpec, report: Report, folder: Path, manifest: Manifest
) -> Mapping[str, Any]:
    """Compare the exported file of an ONNX file with the network's own passes, on noise.

    Raises:
        ExportError: it differs.
    """
    report("comparing it with the forward and the backward pass, and the gradient with differences in float64")
    path = folder / manifest.graphs[0].file
    # onnxruntime fuses quantisers with operators between them, which rounds otherwise in each graph.
    optimised = not any(node.op_type in _QUANTISERS for node in loaded.model.graph)
    runtime = load_runtime()
    options = session_options(runtime, threads=None)
    if not optimised:
        report("without onnxruntime's optimisations, with which quantised graphs round otherwise")
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session, _ = open_session(runtime, path, options, ON_CPU)
    engine = NetworkEngine(loaded, device="cpu", optimised=optimised)
    height_px, width_px = loaded.info.preprocess.input_px
    count = spec.classes or min(2, loaded.info.class_count)
    map_spec = MapSpec(spec.method, (spec.layer,), upsample=False, score=spec.score)
    errors = {"logits": 0.0, "cam": 0.0}
    informative = compared = 0
    batch_sizes = _BATCH_SIZES if loaded.info.takes_batches else (1,)
    for batch_size in batch_sizes:
        shape = (batch_size, height_px, width_px, loaded.info.preprocess.channels)
        images = np.random.default_rng(batch_size).integers(0, 256, shape, dtype=np.uint8)
        expected = engine.explain(images, [TopK(count)] * batch_size, map_spec)
        found = _run(session, engine, spec, images, count)
        for n, result in enumerate(expected):
            scale = float(np.abs(result.logits).max()) or 1.0
            errors["logits"] = max(errors["logits"], _error(found.get(Output.LOGITS), n, result.logits) / scale)
            errors["cam"] = max(errors["cam"], _error(found.get(Output.CAM), n, result.maps))
            informative += int(result.maps.any(axis=(1, 2)).sum())
            compared += count
    engine.close()
    verdict = judge_layer(loaded, spec.layer)
    if verdict is not None and is_wrong(verdict):
        raise ExportError(
            f"the gradient by {spec.layer} is off from differences in float64 by {verdict.gradient_error:.1e} of its "
            "length"
        )
    if not max(errors.values()) <= _BOUND:
        raise ExportError(f"the file differs from the network: {errors}, at most {_BOUND}")
    figures = {name: {"error": error, "bound": _BOUND} for name, error in errors.items()}
    if verdict is not None:
        figures["gradients"] = {"error": verdict.gradient_error, "bound": MOST_GRADIENT_ERROR}
    return {"batch_sizes": batch_sizes, "informative_maps": informative, "compared_maps": compared, "figures": figures}


def _run(session: Any, engine: NetworkEngine, spec: GraphSpec, images: Array, count: int) -> Mapping[Output, Array]:  # noqa: ANN401
    given = images.transpose(0, 3, 1, 2) if spec.input is InputKind.UINT8 else engine.planes(images)
    feeds = {IMAGE: np.ascontiguousarray(given), CLASS_INDEX: np.full((len(images), count), RANKED, np.int64)}
    names: Sequence[str] = [str(output) for output in spec.outputs]
    return dict(zip(spec.outputs, session.run(names, feeds), strict=True))


def _error(found: Array | None, n: int, expected: Array) -> float:
    return 0.0 if found is None else float(np.abs(found[n] - expected).max(initial=0.0))
