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

from heatlens_server.backends.onnx.embedded.network import FOLDER
from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image, find_scores
from heatlens_server.backends.onnx.gradient.values import know
from heatlens_server.backends.onnx.manifest import NETWORK_FILE
from heatlens_server.backends.onnx.source.exported import exported_file
from heatlens_server.backends.onnx.source.store import stored
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.config import EMBEDDED_MODEL, ModelConfig
from heatlens_server.core.methods import Method

_OPSET = 20
_SCOPES = "pkg.torch.onnx.name_scopes"


def embed() -> dict[str, bytes]:
    """The embedded model's files by name."""
    model = load_model(ModelConfig(name=EMBEDDED_MODEL, source=f"embedded:{EMBEDDED_MODEL}"))
    state = model.module.state_dict()
    graph = _exported(model)
    image = find_image(graph)
    shape = image.shape(*model.preprocess.input_px)
    known = know(graph, image.value, shape)
    _fix_reshapes(graph, known.shapes)
    methods = _methods(model)
    network = stored(
        exported_file(
            graph,
            scores=find_scores(graph, known).value,
            tensors={name: _output_of(graph, name) for name in model.layers},
            grids={name: model.grid(name) for name in model.layers},
            task=model.task,
            labels=model.labels,
            version="",
            preprocess=model.preprocess,
            has_linear_head=Method.CAM in methods,
        )
    )
    content = {
        **network.content,
        "preprocess": dataclasses.asdict(model.preprocess),
        "torch_methods": methods,
        "state": list(state),
        "labels": model.labels,
    }
    files = {name: _without_weights(one, state) for name, one in network.graphs.items()}
    files[NETWORK_FILE] = (json.dumps(content, indent=1) + "\n").encode()
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


def _without_weights(graph: bytes, state: Mapping[str, Any]) -> bytes:
    """A graph whose initialisers of the state_dict are all given when it is opened."""
    proto = onnx.ModelProto.FromString(graph)
    for tensor in proto.graph.initializer:
        if tensor.name in state:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value="weights")
        elif len(tensor.raw_data) > 1024 or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise SystemExit(f"{tensor.name} is large and no weight of the network")
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
