"""Writing an export: the graphs and the manifest of a folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule

from heatlens_server.backends.onnx.manifest import GraphFile, Manifest, TensorInfo, installed_versions, sha256_of
from heatlens_server.backends.torch.export import onnx_file
from heatlens_server.backends.torch.export.capture import capture
from heatlens_server.backends.torch.export.differentiate import differentiate, differentiate_all, differentiate_layer
from heatlens_server.backends.torch.export.program import to_program
from heatlens_server.backends.torch.export.torch_files import save_torchscript, to_pt2, to_torchscript
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.core.graph_spec import (
    CLASS_INDEX,
    IMAGE,
    MAP_OUTPUTS,
    MEANINGS,
    SERVED_OUTPUTS,
    Format,
    GraphSpec,
    InputKind,
    Output,
)
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.preprocess import ChannelOrder, PreprocessSpec

SUFFIXES = {Format.ONNX: ".onnx", Format.TORCHSCRIPT: ".ts", Format.PT2: ".pt2"}

_COLORS = {1: "gray", 3: "RGB", 4: "RGBA"}

Report = Callable[[str], None]
"""Takes one line about the phase that begins."""


def export_graph(
    model: LoadedModel,
    spec: GraphSpec,
    *,
    file_format: Format,
    source: str,
    folder: Path,
    report: Report,
) -> Manifest:
    """Write one graph of a model, for people to use.

    Args:
        model: left as it was.
        spec: which graph.
        file_format: what it is written as.
        source: where the architecture came from, for the manifest.
        folder: exists and is empty.
        report: told each phase.

    Returns:
        The manifest, not written yet: its parity is empty.

    Raises:
        ExportError: the model cannot be exported like this.
    """
    report(f"differentiating {model.name} by {spec.layer}")
    graph_module = differentiate(model, spec)
    file = f"{model.name}{SUFFIXES[file_format]}"
    _write(graph_module, model, spec, file_format=file_format, path=folder / file, report=report)
    graphs = [GraphFile(file, spec.layer, spec.method, spec.outputs, model.grid(spec.layer), spec.score)]
    return _manifest(
        model,
        spec,
        file_format=file_format,
        source=source,
        folder=folder,
        graphs=graphs,
        tensors=_tensors(graph_module, spec, model.preprocess),
    )


def export_bundle(
    model: LoadedModel,
    *,
    methods: Sequence[Method],
    file_format: Format,
    precision: str,
    source: str,
    folder: Path,
    report: Report,
) -> Manifest:
    """Write a graph for every layer of a model and method, for engines to use: uint8 in, logits and maps out.

    Some methods are for the default layer only (`MethodTraits.default_layer_only`): making more graphs takes longer
    than loading torch, which does without them.

    Args:
        model: left as it was.
        methods: the default one first; those that are no closed forms are left out.
        file_format: ONNX or TORCHSCRIPT. ONNX files share one file of weights; TorchScript has one file per layer,
            which returns activations and gradients.
        precision: "fp32" or "fp16".
        source: where the architecture came from, for the manifest.
        folder: exists and is empty.
        report: told each phase.

    Returns:
        The manifest, not written yet: its parity is empty.

    Raises:
        ExportError: the model cannot be exported like this.
    """
    # A class_index of one column cannot be traced as one of any number.
    classes = None if model.class_count > 1 else 1
    report(f"recording {model.name}")
    captured = capture(model, model.layers, input_kind=InputKind.UINT8, precision=precision, classes=classes)
    outputs = SERVED_OUTPUTS if file_format is Format.ONNX else tuple(Output)[:4]
    methods = [method for method in methods if method.traits.exportable]
    spec = GraphSpec(model.layers[0], methods[0], classes, precision, InputKind.UINT8, outputs)
    targets = [
        (layer, method)
        for layer in model.layers
        for method in methods
        if not method.traits.default_layer_only or layer == model.layers[0]
    ]
    graphs: list[GraphFile] = []
    if file_format is Format.ONNX:
        report(f"differentiating {model.name} by {', '.join(model.layers)}")
        graph_module = differentiate_all(captured, targets)
        graphs = _cut_onnx(graph_module, model, targets, folder=folder, report=report)
    else:
        for position, layer in enumerate(reversed(model.layers)):
            report(f"differentiating {model.name} by {layer}")
            of_layer = replace(spec, layer=layer)
            # The last one made is the default layer's, whose tensors the manifest describes.
            graph_module = differentiate_layer(captured, of_layer)
            file = f"layer-{len(model.layers) - 1 - position}{SUFFIXES[file_format]}"
            _write(graph_module, model, of_layer, file_format=file_format, path=folder / file, report=report)
            grid = model.grid(layer)
            graphs = [GraphFile(file, layer, method, outputs, grid) for of, method in targets if of == layer] + graphs
    return _manifest(
        model,
        spec,
        file_format=file_format,
        source=source,
        folder=folder,
        graphs=graphs,
        tensors=_tensors(graph_module, spec, model.preprocess),
    )


def without_left_out(manifest: Manifest, parity: Mapping[str, Any], folder: Path) -> Manifest:
    """Remove from an export the graphs that verification left out, and the files that no other graph is in.

    Args:
        manifest: of the export.
        parity: what `verify` returned about it.
        folder: it is in.

    Returns:
        The manifest of what is left, with the parity.
    """
    left_out = {(entry["layer"], entry["method"]) for entry in parity["left_out"]}
    graphs = tuple(graph for graph in manifest.graphs if (graph.layer, graph.method) not in left_out)
    unused = {graph.file for graph in manifest.graphs} - {graph.file for graph in graphs}
    for name in unused:
        (folder / name).unlink()
    files = {name: digest for name, digest in manifest.files.items() if name not in unused}
    return replace(manifest, graphs=graphs, files=files, parity=parity)


def _write(
    graph_module: GraphModule,
    model: LoadedModel,
    spec: GraphSpec,
    *,
    file_format: Format,
    path: Path,
    report: Report,
) -> None:
    report(f"writing {path.name}")
    if file_format is Format.TORCHSCRIPT:
        save_torchscript(to_torchscript(graph_module), path)
        return
    if file_format is Format.PT2:
        torch.export.save(to_pt2(graph_module, model, input_kind=spec.input, classes=spec.classes), path)
        return
    translated = onnx_file.to_onnx(
        to_program(graph_module), input_names=(IMAGE, CLASS_INDEX), output_names=spec.outputs
    )
    onnx_file.save(translated, path)


def _cut_onnx(
    graph_module: GraphModule,
    model: LoadedModel,
    targets: Sequence[tuple[str, Method]],
    *,
    folder: Path,
    report: Report,
) -> list[GraphFile]:
    """Translate the graph of all targets once, which takes a while, and cut it into one file per target."""
    report("translating to ONNX")
    names = [f"{output}:{layer}:{method}" for layer, method in targets for output in MAP_OUTPUTS]
    translated = onnx_file.to_onnx(
        to_program(graph_module),
        input_names=(IMAGE, CLASS_INDEX),
        output_names=(Output.LOGITS, Output.CLASS_ID, *names),
    )
    whole = folder / "all.onnx"
    onnx_file.save(translated, whole, separate_weights=True)
    graphs, wanted = [], {}
    for layer, method in targets:
        file = f"layer-{model.layers.index(layer)}.{method}{SUFFIXES[Format.ONNX]}"
        graphs.append(GraphFile(file, layer, method, SERVED_OUTPUTS, model.grid(layer)))
        wanted[folder / file] = {
            Output.LOGITS: Output.LOGITS,
            Output.CLASS_ID: Output.CLASS_ID,
            **{f"{output}:{layer}:{method}": output for output in MAP_OUTPUTS},
        }
    onnx_file.cut(whole, wanted)
    whole.unlink()
    for path in wanted:
        onnx_file.check(path)
    return graphs


def _tensors(
    graph_module: GraphModule, spec: GraphSpec, preprocess: PreprocessSpec
) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """What goes in and comes out of a graph."""
    image, class_index = (node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder"))
    names = {str(image.shape[0]): "batch"}
    if isinstance(class_index.shape[1], SymInt):
        names[str(class_index.shape[1])] = "classes"

    def info(name: str, value: Tensor, meaning: str) -> TensorInfo:
        shape = tuple(size if isinstance(size, int) else names.get(str(size), str(size)) for size in value.shape)
        return TensorInfo(name, str(value.dtype).removeprefix("torch."), shape, meaning)

    colors = _COLORS.get(preprocess.channels, f"{preprocess.channels} channels")
    if preprocess.channel_order is ChannelOrder.BGR:
        colors = colors.replace("RGB", "BGR")
    scaled = "value / 255" if preprocess.scale == 1.0 else f"value / 255 * {preprocess.scale:g}"
    pixels = f"{colors} pixels" if spec.input is InputKind.UINT8 else f"{colors}, ({scaled} - mean) / std"
    wanted = "class ids; -1 at position k is the k-th most probable class, -2 none"
    (output,) = graph_module.graph.find_nodes(op="output")
    outputs = zip(spec.outputs, output.args[0], strict=False)
    return (
        (info(IMAGE, image, pixels), info(CLASS_INDEX, class_index, wanted)),
        tuple(info(name, node.meta["val"], _meaning(name, spec.score)) for name, node in outputs),
    )


def _meaning(output: Output, score: Score) -> str:
    meaning = MEANINGS[output]
    return meaning if score is Score.LOGIT else meaning.replace("class's logit", f"class's {score}")


def _manifest(
    model: LoadedModel,
    spec: GraphSpec,
    *,
    file_format: Format,
    source: str,
    folder: Path,
    graphs: Sequence[GraphFile],
    tensors: tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]],
) -> Manifest:
    return Manifest(
        format=file_format,
        model=model.name,
        source=source,
        weights_version=weights_version(model.module),
        class_count=model.class_count,
        labels=model.labels,
        preprocess=model.preprocess,
        input=spec.input,
        precision=spec.precision,
        classes=spec.classes,
        graphs=tuple(graphs),
        inputs=tensors[0],
        outputs=tensors[1],
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        opset=onnx_file.OPSET if file_format is Format.ONNX else None,
        versions=installed_versions(),
        parity={},
        task=model.task,
        assumptions=model.assumptions,
    )
