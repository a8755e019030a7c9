"""Programs for torch's ONNX exporter: the graphs that they are made of, as torch would trace them."""

import collections
import contextlib

import onnx
import pytest
import torch

import export_networks
from export_networks import make, normalised, pixels
from heatlens_server.backends.torch.export import onnx_file
from heatlens_server.backends.torch.export.differentiate import differentiate
from heatlens_server.backends.torch.export.program import to_program
from heatlens_server.backends.torch.export.torch_files import to_pt2
from heatlens_server.core.graph_spec import CLASS_INDEX, IMAGE, GraphSpec, Output


def onnx_graph(program, path):
    translated = onnx_file.to_onnx(program, input_names=(IMAGE, CLASS_INDEX), output_names=list(Output))
    onnx_file.save(translated, path)
    return onnx.load(path).graph


@pytest.mark.parametrize("kind", [export_networks.Staged, export_networks.Tokens])
@pytest.mark.parametrize("changes", [{"classes": None}, {"classes": 3}, {"classes": 1, "precision": "fp16"}])
def test_a_file_has_the_operators_that_it_would_have_if_torch_traced_the_graph_again(tmp_path, kind, changes):
    model = make(kind, "patch" if kind is export_networks.Tokens else "middle")
    spec = GraphSpec(model.layers[0], **changes)
    graph_module = differentiate(model, spec)
    graphs = [
        onnx_graph(to_program(graph_module), tmp_path / "once.onnx"),
        onnx_graph(to_pt2(graph_module, model, input_kind=spec.input, classes=spec.classes), tmp_path / "again.onnx"),
    ]
    once, again = (collections.Counter(node.op_type for node in graph.node) for graph in graphs)
    assert once == again


def test_casts_are_those_that_torch_finds_by_running_the_graph(tmp_path, monkeypatch):
    graph_module = differentiate(make(export_networks.Staged), GraphSpec("middle", classes=3, precision="fp16"))
    onnx_graph(to_program(graph_module), tmp_path / "recalled.onnx")
    monkeypatch.setattr(onnx_file, "_promotion_by_recorded_values", contextlib.nullcontext)
    onnx_graph(to_program(graph_module), tmp_path / "run.onnx")
    assert (tmp_path / "recalled.onnx").read_bytes() == (tmp_path / "run.onnx").read_bytes()


def test_the_graph_is_left_as_it_was_and_its_tensors_are_shared():
    graph_module = differentiate(make(export_networks.Staged), GraphSpec("middle", classes=None))
    before = str(graph_module.graph)
    program = to_program(graph_module)
    assert str(graph_module.graph) == before
    tensors = dict(graph_module.named_buffers())
    assert all(program.state_dict[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())
    sizes = [
        node.meta["val"].node.expr for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)
    ]
    assert len(set(sizes)) == len(sizes) > 0
    found = graph_module(torch.from_numpy(normalised(pixels(3))), torch.tensor([[1, 2]] * 3))
    assert found[0].shape == (3, export_networks.CLASSES)
