"""Writing an export: the graphs and the manifest of a folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from heatlens_server.backends.onnx.manifest import (
    GraphFile,
    Manifest,
    TensorInfo,
    installed_versions,
    sha256_of,
)
from heatlens_server.backends.torch.export.capture import capture
from heatlens_server.backends.torch.export.differentiate import differentiate, differentiate_layer
from heatlens_server.backends.torch.export.torch_files import save_torchscript, to_pt2, to_torchscript
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.core.graph_spec import CLASS_INDEX, IMAGE, Format, GraphSpec, InputKind, Output, meanings
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import PreprocessSpec

SUFFIXES = {Format.TORCHSCRIPT: ".ts", Format.PT2: ".pt2"}

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
        file_format: TORCHSCRIPT or PT2.
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
    return manifest_of(
        model,
        spec,
        file_format=file_format,
        source=source,
        folder=folder,
        graphs=graphs,
        tensors=tensors_of(graph_module, spec, model.preprocess),
    )


def export_bundle(
    model: LoadedModel,
    *,
    methods: Sequence[Method],
    precision: str,
    source: str,
    folder: Path,
    report: Report,
) -> Manifest:
    """Write a TorchScript graph for every layer of a model, for an engine to use: uint8 to activations and gradients.

    Some methods are for the default layer only (`MethodTraits.default_layer_only`).

    Args:
        model: left as it was.
        methods: the default one first; those that are no closed forms are left out.
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
    outputs = tuple(Output)[:4]
    methods = [method for method in methods if method.traits.exportable]
    spec = GraphSpec(model.layers[0], methods[0], classes, precision, InputKind.UINT8, outputs)
    graphs: list[GraphFile] = []
    for position, layer in enumerate(reversed(model.layers)):
        report(f"differentiating {model.name} by {layer}")
        of_layer = replace(spec, layer=layer)
        # The last one made is the default layer's, whose tensors the manifest describes.
        graph_module = differentiate_layer(captured, of_layer)
        file = f"layer-{len(model.layers) - 1 - position}{SUFFIXES[Format.TORCHSCRIPT]}"
        _write(graph_module, model, of_layer, file_format=Format.TORCHSCRIPT, path=folder / file, report=report)
        held = [method for method in methods if layer == spec.layer or not method.traits.default_layer_only]
        graphs = [GraphFile(file, layer, method, outputs, model.grid(layer)) for method in held] + graphs
    return manifest_of(
        model,
        spec,
        file_format=Format.TORCHSCRIPT,
        source=source,
        folder=folder,
        graphs=graphs,
        tensors=tensors_of(graph_module, spec, model.preprocess),
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
    torch.export.save(to_pt2(graph_module, model, input_kind=spec.input, classes=spec.classes), path)


def tensors_of(
    graph_module: GraphModule, spec: GraphSpec, preprocess: PreprocessSpec
) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    """What goes in and comes out of a graph."""
    image, class_index = (node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder"))
    names = {str(image.shape[0]): "batch", str(class_index.shape[1]): "classes"}

    def info(name: str, value: Tensor) -> TensorInfo:
        shape = tuple(size if isinstance(size, int) else names.get(str(size), str(size)) for size in value.shape)
        return TensorInfo(name, str(value.dtype).removeprefix("torch."), shape, said[name])

    said = meanings(spec, preprocess)
    (output,) = graph_module.graph.find_nodes(op="output")
    outputs = zip(spec.outputs, output.args[0], strict=True)
    return (
        tuple(info(name, value) for name, value in zip((IMAGE, CLASS_INDEX), (image, class_index), strict=True)),
        tuple(info(name, node.meta["val"]) for name, node in outputs),
    )


def manifest_of(
    model: LoadedModel,
    spec: GraphSpec,
    *,
    file_format: Format,
    source: str,
    folder: Path,
    graphs: Sequence[GraphFile],
    tensors: tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]],
) -> Manifest:
    """What is written into a folder about the graphs in it."""
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
        opset=None,
        versions=installed_versions(),
        parity={},
        task=model.task,
        assumptions=model.assumptions,
    )
