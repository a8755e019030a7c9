"""Putting a graph together: what becomes a constant, and what a graph is made of."""

from collections import Counter

import torch
from torch import Tensor, nn

import export_networks
from export_networks import make, normalised, pixels
from heatlens_server.backends.torch.export.assembly import Assembly
from heatlens_server.backends.torch.export.capture import capture
from heatlens_server.backends.torch.export.differentiate import differentiate
from heatlens_server.core.graph_spec import GraphSpec, InputKind


def graph_of(kind, layer, **changes):
    model = make(kind, layer)
    return model, differentiate(model, GraphSpec(layer, **changes))


def targets(graph_module):
    return Counter(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")


def test_weights_are_in_the_graph_once_and_are_the_model_s_own():
    model, graph_module = graph_of(export_networks.Staged, "middle")
    held = [buffer.data_ptr() for buffer in graph_module.buffers()]
    assert len(held) == len(set(held))
    assert {parameter.data_ptr() for parameter in model.module.parameters()} <= set(held)


class Standardised(export_networks.Staged):
    """Computes with its parameters before it uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(6, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = nn.functional.conv2d(x, (self.raw - self.raw.mean()) / self.raw.std())
        x = nn.functional.avg_pool2d(self.middle(x), 4)
        return self.head(self.last(torch.cat([self.left(x), self.right(x)], 1)))


def test_what_depends_on_parameters_alone_is_computed_now():
    model, graph_module = graph_of(Standardised, "last")
    assert not any("std" in name for name in targets(graph_module))
    image = torch.from_numpy(normalised(pixels(2)))
    found, _ = graph_module(image, torch.full((2, 1), -1))[:2]
    torch.testing.assert_close(found, model.module(image), atol=1e-5, rtol=1e-4)


def test_no_node_depends_on_the_strides_that_were_traced():
    _, graph_module = graph_of(export_networks.Staged, "last", classes=None)
    assert "aten.reshape.default" in targets(graph_module)
    assert not {"aten.view.default", "aten._unsafe_view.default"} & set(targets(graph_module))


def test_nothing_is_left_of_the_tracer():
    _, graph_module = graph_of(export_networks.Staged, "first")
    names = " ".join(targets(graph_module))
    assert "heatlens" not in names
    assert "assert" not in names


def test_only_what_leads_to_an_output_is_kept():
    captured = capture(make(export_networks.Staged), ["last"], input_kind=InputKind.FLOAT, precision="fp32", classes=1)
    assembly = Assembly(captured)
    first = next(node for node in captured.nodes if "hardswish" in node.name)
    assembly.node(captured.logits)
    finished = assembly.finish([assembly.node(first)])
    assert not any("linear" in name for name in targets(finished))
    image = torch.zeros(3, 3, export_networks.PX, export_networks.PX)
    assert finished(image, torch.zeros(3, 1, dtype=torch.int64))[0].shape[0] == 3
