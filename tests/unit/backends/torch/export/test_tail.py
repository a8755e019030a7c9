"""What follows a layer, and nothing else, is differentiated."""

import pytest
import torch
from torch import Tensor, nn

import export_networks
from export_networks import make
from heatlens_server.backends.torch.export.capture import capture
from heatlens_server.backends.torch.export.tail import tail_of, trace_ranked, trace_rows, traced
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import InputKind


def record(kind, *layers, classes=None):
    return capture(make(kind), list(layers), input_kind=InputKind.FLOAT, precision="fp32", classes=classes)


def test_the_tail_is_what_depends_on_the_layer():
    captured = record(export_networks.Staged, "first", "last")
    first, last = tail_of(captured, "first"), tail_of(captured, "last")
    assert set(last.nodes) < set(first.nodes)
    assert len(first.nodes) < len(captured.nodes)
    assert not any("hardswish" in node.name for node in last.nodes)
    assert captured.logits in last.nodes


def test_a_connection_past_the_layer_is_an_input_of_the_tail():
    captured = record(export_networks.Staged, "middle", "first", "last")
    middle = tail_of(captured, "middle")
    assert any(node.meta["val"].shape[1:] == (6, 16, 16) for node in middle.needs)
    parameters = [node for node in tail_of(captured, "last").needs if node not in captured.constants]
    assert parameters == []


def test_a_layer_that_leads_nowhere_is_refused():
    with pytest.raises(ExportError, match="the model's output does not depend on layer 'middle'"):
        tail_of(record(export_networks.Dangling, "middle"), "middle")


class Detached(export_networks.Staged):
    """Its author cuts the gradient behind the first stage."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).sign()
        x = nn.functional.avg_pool2d(x.bool().float(), 4)
        return self.head(self.last(torch.cat([self.left(x), self.right(x)], 1)))


def test_a_layer_without_a_gradient_is_refused():
    captured = record(Detached, "first", classes=1)
    with pytest.raises(ExportError, match="does not depend on the target layer by a gradient"):
        trace_ranked(captured, tail_of(captured, "first"), 1)


class Meeting(export_networks.Staged):
    """Past its middle stage goes a value of which the images are the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        past = x.mean((2, 3)).T[..., None, None]
        x = (self.middle(x).transpose(0, 1) + past).transpose(0, 1)
        x = nn.functional.avg_pool2d(x, 4)
        return self.head(self.last(torch.cat([self.left(x), self.right(x)], 1)))


def test_images_that_meet_past_the_layer_are_refused():
    captured = record(Meeting, "middle")
    with pytest.raises(ExportError, match="does not have the images in its first dimension"):
        trace_rows(captured, tail_of(captured, "middle"))


def test_errors_of_operators_name_the_operator_s_complaint():
    def fail(_x):
        raise RuntimeError("no such thing\nand a second line")

    with pytest.raises(ExportError, match=r"cannot be differentiated \(RuntimeError: no such thing\)$"):
        traced(fail, (torch.zeros(2),))
