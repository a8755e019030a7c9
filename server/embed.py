"""Write the graphs of the embedded model, which servers run without PyTorch; or with --check, whether they are stale.

The forward pass comes from torch's exporter with random weights, and the backward passes from the differentiator of
ONNX graphs. No weight is written: the graphs name them, and servers read them from their package. `make embedded`.
"""

import ast
import copy
import dataclasses
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer

from heatlens_server.backends.onnx.embedded.network import FOLDER, FORWARD, NETWORK, backward_file, tail_file
from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image, find_scores, has_linear_head, layer_of
from heatlens_server.backends.onnx.gradient.values import know
from heatlens_server.backends.onnx.source.split import split, tail_of
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.config import EMBEDDED_MODEL, ModelConfig

_OPSET = 20
_SCOPES = "pkg.torch.onnx.name_scopes"


def embed() -> dict[str, bytes]:
    """The embedded model's files by name."""
    model = load_model(ModelConfig(name=EMBEDDED_MODEL, source=f"embedded:{EMBEDDED_MODEL}"))
    state = model.module.state_dict()
    graph = _exported(model)
    image = find_image(graph)
    shape = image.shape(*model.preprocess.input_px)
    _fix_reshapes(graph, know(graph, image.value, shape).shapes)
    known = know(graph, image.value, shape)
    scores = find_scores(graph, known)
    values = {name: _output_of(graph, name) for name in model.layers}
    layers = [layer_of(graph, known, image, values[name], model.grid(name)) for name in model.layers]
    if None in layers:
        raise SystemExit("a layer does not lie on the image")
    files, counts, kept = {}, [], ()
    for count in range(1, len(layers) + 1):
        passes = split(graph, known, image.value, [scores.value], [*values.values()][:count])
        files[backward_file(count)] = _without_weights(passes.backward.graph, state)
        tail = tail_of(graph, known, image.value, [scores.value], layers[count - 1].value)
        if tail.kept:
            raise SystemExit("something bypasses a layer")
        files[tail_file(count)] = _without_weights(tail.graph.graph, state)
        counts.append(len(passes.kept))
        if passes.kept[: len(kept)] != kept:
            raise SystemExit("what is kept for a layer is not kept for the next")
        kept = passes.kept
        # The widest one has all nodes that any of the others has.
        files[FORWARD] = _without_weights(passes.forward.graph, state, outputs=[scores.value.name])
    content = {
        "image": passes.image,
        "scores": scores.value.name,
        "seed": passes.seeds[scores.value.name],
        # Each layer's are the first of those of the next.
        "kept": kept,
        "layers": [
            {
                "name": name,
                "output": layer.value.name,
                "gradient": passes.gradients[layer.value.name],
                "kept_count": count,
                "channels": layer.channels,
                "height": layer.height,
                "width": layer.width,
            }
            for name, layer, count in zip(model.layers, layers, counts, strict=True)
        ],
        "has_linear_head": has_linear_head(known, layers[0], scores),
        "preprocess": dataclasses.asdict(model.preprocess),
        "torch_methods": _methods(model),
        "weights": list(state),
        "labels": model.labels,
    }
    files[NETWORK] = (json.dumps(content, indent=1) + "\n").encode()
    return files


def _exported(model: LoadedModel) -> ir.Model:
    """The forward pass as ONNX: its initialisers are called as in the state_dict, and none of them is changed."""
    # Random weights: if one got into a graph, maps would be wrong, which tests see.
    torch.manual_seed(0)
    module = copy.deepcopy(model.module)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    image = torch.zeros(2, model.preprocess.channels, *model.preprocess.input_px)
    with warnings.catch_warnings():
        # Of torch's own code.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (image,),
            dynamo=True,
            # The optimiser would fold weights into others.
            optimize=False,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            input_names=["image"],
            output_names=["logits"],
            opset_version=_OPSET,
            verbose=False,
        )
    optimizer.fold_constants(program.model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "forward.onnx"
        program.save(path, external_data=True)
        graph = read_file(path)
        for value in graph.graph.initializers.values():
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    for node in graph.graph:
        # The exporter gives convolutions without a bias one of zeros.
        if node.op_type == "Conv" and not node.inputs[2].const_value.numpy().any():
            node.resize_inputs(2)
    common.RemoveUnusedNodesPass()(graph)
    return graph


def _fix_reshapes(graph: ir.Model, shapes: Mapping[ir.Value, Sequence[int]]) -> None:
    """Write the shapes that are computed from the batch as constants."""
    for node in graph.graph:
        if node.op_type == "Reshape" and node.inputs[1].producer() is not None:
            shape = ir.Value(name=f"shape of {node.outputs[0].name}")
            shape.const_value = ir.tensor(list(shapes[node.outputs[0]]), dtype=ir.DataType.INT64, name=shape.name)
            graph.graph.register_initializer(shape)
            node.replace_input_with(1, shape)
    common.RemoveUnusedNodesPass()(graph)


def _output_of(graph: ir.Model, module: str) -> ir.Value:
    """The last value that is computed in a module of the network."""
    nodes = [node for node in graph.graph if module in ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))]
    return nodes[-1].outputs[0]


def _without_weights(graph: bytes, state: Mapping[str, Any], *, outputs: list[str] | None = None) -> bytes:
    """A graph whose initialisers of the state_dict are given when it is opened; without words for people."""
    proto = onnx.ModelProto.FromString(graph)
    for tensor in proto.graph.initializer:
        if tensor.name in state:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value="weights")
        elif len(tensor.raw_data) > 1024 or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise SystemExit(f"{tensor.name} is large and no weight of the network")
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    if outputs is not None:
        kept = [output for output in proto.graph.output if output.name in outputs]
        del proto.graph.output[:]
        proto.graph.output.extend(kept)
    return proto.SerializeToString(deterministic=True)


def _methods(model: LoadedModel) -> list[str]:
    """What the torch engine has for the network."""
    engine = TorchEngine(model, device="cpu")
    methods = [str(method) for method in engine.info.methods]
    engine.close()
    return methods


def main() -> None:
    """Write the files, or compare them."""
    files = embed()
    if "--check" in sys.argv:
        found = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
        stale = sorted(name for name in {*found, *files} if found.get(name) != files.get(name))
        if stale:
            raise SystemExit(f"stale: {', '.join(stale)}; run make embedded")
    else:
        FOLDER.mkdir(exist_ok=True)
        for name, content in files.items():
            (FOLDER / name).write_bytes(content)


if __name__ == "__main__":
    main()
