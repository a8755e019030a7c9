"""Writes taken out of a graph by hand: right for in-place modules, and left to torch where a view looks on."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import export_networks
from heatlens_server.backends.torch.export.functional import functional

aten = torch.ops.aten


class InPlaceChain(nn.Module):
    """A convolution's output overwritten twice, and read again afterwards."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        y = self.norm(self.conv(x))
        z = torch.relu_(y)
        z += 1.0
        return self.drop(y * z).to(torch.float32)


class WriteSeenThroughView(nn.Module):
    """The write changes what an earlier view shows."""

    def forward(self, x):
        y = x * 2.0
        view = y.flatten(1)
        torch.relu_(y)
        return view.sum(1) + y.mean((1, 2, 3))


class WriteThroughSlice(nn.Module):
    def forward(self, x):
        y = x * 2.0
        y[:, 0] = 5.0
        return y


class WriteToInput(nn.Module):
    def forward(self, x):
        return torch.relu(x.clone()).add_(x)


class UnknownView(nn.Module):
    """A view by a name that formats do not know."""

    def forward(self, x):
        return x.movedim(1, -1).mean((1, 2))


def exported(module):
    image = torch.zeros(2, 3, 5, 5)
    with torch.no_grad():
        return torch.export.export(module.eval(), (image,), dynamic_shapes=({0: Dim("batch")},), strict=False)


@pytest.mark.parametrize("make", [InPlaceChain, WriteSeenThroughView, WriteThroughSlice, WriteToInput, UnknownView])
def test_results_stay_and_no_operator_writes(make):
    torch.manual_seed(0)
    module = make()
    image = torch.randn(3, 3, 5, 5)
    with torch.no_grad():
        expected = module.eval()(image.clone())
        program = functional(exported(module))
        torch.testing.assert_close(program.module()(image.clone()), expected)
    for node in program.graph.nodes:
        assert not (export_networks.writes(node.target)), node


def test_simple_writes_take_no_second_trace(monkeypatch):
    program = exported(InPlaceChain())
    monkeypatch.setattr(type(program), "run_decompositions", None)
    targets = {node.target for node in functional(program).graph.nodes}
    assert aten.relu.default in targets
    assert aten._native_batch_norm_legit_no_training.default in targets
    assert not targets & {aten.dropout.default, aten.to.dtype, aten.batch_norm.default}


@pytest.mark.parametrize("make", [WriteSeenThroughView, WriteThroughSlice, UnknownView])
def test_whatever_is_not_simple_is_left_to_torch(monkeypatch, make):
    program = exported(make())
    asked = []
    monkeypatch.setattr(type(program), "run_decompositions", lambda self, table: asked.append(table) or self)
    functional(program)
    assert asked == [{}]
