"""Recording a forward pass: what is found in it, and which networks are refused."""

import dataclasses

import pytest
import torch
from torch import nn
from torch._ops import OpOverload

import export_networks
from export_networks import make
from heatlens_server.backends.torch.export.capture import MARK, capture
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import InputKind
from loaded_models import hook_count


def record(model, layers=("middle",), **changes):
    options = {"input_kind": InputKind.FLOAT, "precision": "fp32", "classes": None, **changes}
    return capture(model, list(layers), **options)


def test_layers_are_marked_in_place():
    model = make(export_networks.Staged)
    captured = record(model, ["last", "first", "middle"])
    assert {layer: node.args[1] for layer, node in captured.marks.items()} == {
        n: n for n in ("last", "first", "middle")
    }
    shapes = {layer: tuple(node.meta["val"].shape[1:]) for layer, node in captured.marks.items()}
    assert shapes == {"first": (6, 16, 16), "middle": (6, 16, 16), "last": (12, 4, 4)}
    assert captured.logits.meta["val"].shape[1] == export_networks.CLASSES
    assert hook_count(model.module) == 0


def test_the_batch_is_any_size_and_all_else_is_fixed():
    captured = record(make(export_networks.Staged))
    assert isinstance(captured.batch, torch.SymInt)
    assert captured.image.meta["val"].shape[1:] == (3, export_networks.PX, export_networks.PX)
    assert isinstance(captured.class_index.meta["val"].shape[1], torch.SymInt)
    assert record(make(export_networks.Staged), classes=2).class_index.meta["val"].shape[1] == 2


def test_parameters_are_the_model_s_own_and_no_node_writes_to_its_input():
    model = make(export_networks.Staged)
    captured = record(model)
    own = {parameter.data_ptr() for parameter in model.module.parameters()}
    held = {constant.data_ptr() for constant in captured.constants.values()}
    assert own <= held
    operators = [node.target for node in captured.nodes if isinstance(node.target, OpOverload)]
    assert MARK in operators
    assert not any(map(export_networks.writes, operators))


def test_high_level_operators_stay_whole():
    captured = record(make(export_networks.Tokens, "patch"), ["patch"])
    names = {str(node.target) for node in captured.nodes}
    assert {"aten.linear.default", "aten.layer_norm.default", "aten.scaled_dot_product_attention.default"} <= names


def test_pixels_are_normalised_in_the_graph_and_half_precision_is_a_copy():
    model = make(export_networks.Staged)
    captured = record(model, input_kind=InputKind.UINT8, precision="fp16")
    assert captured.image.meta["val"].dtype is torch.uint8
    assert captured.logits.meta["val"].dtype is torch.float16
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "layer", "message"),
    [
        (export_networks.Baked, "middle", "the network cannot be recorded for every batch size"),
        (export_networks.Deciding, "middle", "the network cannot be recorded for every batch size"),
        (export_networks.Counting, "middle", "the network changes its own buffers in a forward pass"),
        (export_networks.Repeating, "middle", "layer 'middle' runs more than once in a forward pass"),
        (export_networks.Staged, "head.1", "layer 'head.1': output: must have 4 dimensions"),
        (export_networks.Staged, "unused", "layer 'unused' does not run in a forward pass"),
    ],
)
def test_what_cannot_be_recorded_is_refused_with_the_reason(kind, layer, message):
    model = make(kind)
    model.module.unused = nn.Conv2d(3, 3, 1)
    with pytest.raises(ExportError, match=message):
        record(model, [layer])
    assert hook_count(model.module) == 0


class InTuple(export_networks.Staged):
    """Returns its logits among other things."""

    def forward(self, x):
        return x, super().forward(x)


@pytest.mark.parametrize(("kind", "part"), [(export_networks.InDictionary, "logits"), (InTuple, 1)])
def test_logits_are_found_in_what_other_libraries_return(kind, part):
    model = dataclasses.replace(make(kind), reading=OutputReading(part))
    assert record(model).logits.meta["val"].shape[1] == export_networks.CLASSES
    with pytest.raises(ExportError, match="the network must return a tensor, not"):
        record(make(kind))
