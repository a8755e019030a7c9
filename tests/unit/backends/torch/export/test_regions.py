"""Regions that torch keeps as graphs of their own, and attention over many dimensions, become what formats know."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._ops import HigherOrderOperator

from export_networks import CLASSES, PX
from heatlens_server.backends.torch.export.functional import functional
from heatlens_server.backends.torch.export.verify import verify
from heatlens_server.core.graph_spec import Format, GraphSpec
from loaded_models import loaded, user_export

aten = torch.ops.aten


class Regions(nn.Module):
    """A block with autocast off, and a gradient mode in it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.conv(x)
        with torch.autocast("cpu", enabled=False):
            weights = torch.softmax(x * self.scale, 1)
            with torch.set_grad_enabled(False):
                shift = self.scale * 2.0
            x = x * weights + shift
        return self.head(torch.tanh(x).mean((2, 3)))


class Casting(nn.Module):
    """Autocast that does cast."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, stride=4)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = torch.relu(x @ self.head.weight.T)
        return x.float()


class Windows(nn.Module):
    """Attention in windows: (N, heads, windows, tokens, channels)."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(tokens).reshape(-1, 4, 16, 3, 2, 4).permute(3, 0, 4, 1, 2, 5).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.head(attended.permute(0, 2, 3, 1, 4).reshape(-1, 64, 8).mean(1))


def made(kind):
    torch.manual_seed(5)
    return kind()


def exported(module):
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        return torch.export.export(
            module.eval(), (torch.zeros(2, 3, PX, PX),), dynamic_shapes=({0: batch},), strict=False
        )


def kinds_of(program):
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("kind", [Regions, Windows])
def test_results_stay(kind):
    module = made(kind)
    image = torch.rand(3, 3, PX, PX)
    program = functional(exported(module))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), module(image))


def test_no_region_is_left():
    program = exported(made(Regions))
    assert any(isinstance(kind, HigherOrderOperator) for kind in kinds_of(program))
    assert not any(isinstance(kind, HigherOrderOperator) for kind in kinds_of(functional(program)))


def test_autocast_that_casts_is_not_taken_out():
    module = made(Casting)
    image = torch.rand(3, 3, PX, PX)
    with torch.no_grad():
        expected = module(image)
        np.testing.assert_array_equal(functional(exported(module)).module()(image).numpy(), expected.numpy())


def test_attention_has_four_dimensions():
    program = functional(exported(made(Windows)))
    (attention,) = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert [operand.meta["val"].ndim for operand in attention.args[:3]] == [4, 4, 4]


@pytest.mark.parametrize(("kind", "layer"), [(Regions, "conv"), (Windows, "patch")])
@pytest.mark.parametrize("format_", [Format.ONNX, Format.TORCHSCRIPT])
def test_exported_and_verified(kind, layer, format_):
    model = loaded(made(kind), [layer], class_count=CLASSES, px=PX)
    folder, manifest = user_export(model, format_, GraphSpec(layer))
    assert verify(model, folder, manifest, report=lambda _: None)["informative_maps"] > 0
