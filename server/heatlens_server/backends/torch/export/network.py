"""A network's forward pass, recorded and translated to ONNX: the differentiator of ONNX graphs takes it from there."""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.file import in_known_form
from heatlens_server.backends.onnx.manifest import GraphFile, Manifest
from heatlens_server.backends.onnx.source.export import manifest_of
from heatlens_server.backends.onnx.source.exported import exported_file
from heatlens_server.backends.onnx.source.load import LoadedFile
from heatlens_server.backends.onnx.source.store import stored
from heatlens_server.backends.onnx.stored import FORWARD_FILE
from heatlens_server.backends.torch.export import onnx_file
from heatlens_server.backends.torch.export.capture import record
from heatlens_server.backends.torch.export.folder import Report
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.core.errors import ExportError, ModelLoadError
from heatlens_server.core.graph_spec import IMAGE, GraphSpec, InputKind, Output
from heatlens_server.core.methods import Method

_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}

_OUTPUTS = tuple(Output)[:4]
"""What an engine knows about an image when it has run the passes."""


def as_file(model: LoadedModel, *, precision: str, has_linear_head: bool, report: Report) -> LoadedFile:
    """A model as if its forward pass came from an ONNX file; its layers keep their names.

    Args:
        model: left as it was.
        precision: "fp32" or "fp16".
        has_linear_head: whether its default layer has CAM.
        report: told each phase.

    Raises:
        ExportError: the model cannot be recorded, or not be translated.
    """
    report(f"recording {model.name}")
    program = record(model)
    report("translating to ONNX")
    names = [str(Output.LOGITS), *(f"layer: {layer}" for layer in model.layers)]
    translated = onnx_file.to_onnx(program, input_names=(IMAGE,), output_names=names)
    try:
        found = in_known_form(translated.model, _DTYPES[precision])
        scores, *outputs = (_computed(value) for value in found.graph.outputs)
        return exported_file(
            found,
            scores=scores,
            tensors=dict(zip(model.layers, outputs, strict=True)),
            grids={layer: model.grid(layer) for layer in model.layers},
            task=model.task,
            labels=model.labels,
            version=weights_version(model.module),
            preprocess=model.preprocess,
            has_linear_head=has_linear_head,
            assumptions=model.assumptions,
        )
    except ModelLoadError as error:
        raise ExportError(f"the graph cannot be read: {error}") from error


def _computed(output: ir.Value) -> ir.Value:
    """What an output is a copy of: a graph cannot return one value by two names."""
    while (node := output.producer()) is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        output = node.inputs[0]
    return output


def export_network(
    model: LoadedModel, *, methods: Sequence[Method], precision: str, source: str, folder: Path, report: Report
) -> Manifest:
    """Write the passes of a model for each of its layers, for `backends.onnx.network_engine`.

    Args:
        model: left as it was.
        methods: the default one first; those that are no closed forms are left out. CAM is for the default layer.
        precision: "fp32" or "fp16".
        source: where the architecture came from, for the manifest.
        folder: exists and is empty.
        report: told each phase.

    Returns:
        The manifest, not written yet: its parity is empty.

    Raises:
        ExportError: the model cannot be exported like this.
    """
    loaded = as_file(model, precision=precision, has_linear_head=Method.CAM in methods, report=report)
    report(f"differentiating {model.name} by {', '.join(model.layers)}")
    network = stored(loaded)
    default = model.layers[0]
    if reason := network.refusal(default):
        raise ExportError(f"what follows the target layer cannot be differentiated: {reason}")
    network.write(folder)
    graphs = [
        GraphFile(FORWARD_FILE, layer, method, _OUTPUTS, model.grid(layer))
        for layer in model.layers
        for method in methods
        if method.traits.exportable and not (method.traits.default_layer_only and layer != default)
    ]
    spec = GraphSpec(default, graphs[0].method, None, precision, InputKind.FLOAT, _OUTPUTS)
    return manifest_of(loaded, spec, name=model.name, source=source, graphs=graphs, folder=folder)
