"""What the tracer makes of operators and SUBSTITUTES: graphs of TorchScript and pt2, right at every batch size."""

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from heatlens_server.backends.torch.export.substitutes import SUBSTITUTES

aten = torch.ops.aten

TRACED, RUN = 2, 5  # batch sizes


class Net(nn.Module):
    """A function with constants: tensors, registered as buffers so that they have a dtype."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for i, shape in enumerate(shapes):
            self.register_buffer(f"c{i}", torch.randn(shape) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.buffers())


def trace(net: nn.Module, image: Tensor) -> GraphModule:
    """(x, seed) -> (net(x), gradient of the sum of net(x) * seed), for any batch size."""
    with torch.no_grad():
        dynamic = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(net, (image,), dynamic_shapes=dynamic).run_decompositions({})
    constants = {**program.state_dict, **program.constants}
    signature = program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    nodes = list(program.graph.nodes)
    x = next(node for node in nodes if node.name in signature.user_inputs).meta["val"]
    result = nodes[-1].args[0][0]

    def run(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        values = {}
        with torch.enable_grad():
            for node in nodes[:-1]:
                if node.op == "placeholder":
                    values[node] = constants[names[node.name]] if node.name in names else leaf
                else:
                    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = SUBSTITUTES.get(node.target, node.target)(*args, **kwargs)
        out = values[result]
        return out.detach(), torch.autograd.grad(out, [leaf], seed)[0]

    with x.fake_mode:
        seed = torch.empty(result.meta["val"].shape, dtype=image.dtype)
    with torch.no_grad():
        graph_module = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x, seed)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module.eval()


def autograd(net: nn.Module, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = net(leaf)
    return out.detach(), torch.autograd.grad(out, [leaf], seed)[0]


def inputs(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.randn(RUN, *shape, dtype=dtype)
    return x, torch.randn_like(net(x))


def self_attention(x: Tensor, qkv: Tensor, bias: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = F.linear(tokens, qkv, bias).reshape(*tokens.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.layer_norm(attended, (8,))[:, 0]


def masked_attention(x: Tensor, bias: Tensor) -> Tensor:
    q = x.flatten(2).reshape(x.shape[0], 2, 2, -1).transpose(-1, -2)
    biased = F.scaled_dot_product_attention(q, q, q, attn_mask=bias, scale=0.3)
    # The first query attends to no key.
    earlier = torch.ones(9, 9, dtype=torch.bool).tril(-1)
    masked = F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], attn_mask=earlier, enable_gqa=True)
    return biased + masked + F.scaled_dot_product_attention(q, q, q, is_causal=True)


def windows(x: Tensor, position: Tensor, weight: Tensor) -> Tensor:
    """Swin's attention: shifted, in windows, with a position bias; then patches merged by slices, and pooled."""
    n, c, h, w = x.shape
    x = x.roll((-1, -1), (2, 3)).permute(0, 2, 3, 1)
    cut = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n * (h // 2) * (w // 2), 4, c)
    weights = ((cut * 0.5) @ cut.transpose(-1, -2) + position).softmax(-1)
    x = (weights @ cut).reshape(n, h, w, c)
    merged = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    # Channels last: PyTorch's pooling to one value lays its result out alike.
    return F.adaptive_avg_pool2d((merged @ weight).permute(0, 3, 1, 2), 1).flatten(1)


def activations(x: Tensor) -> Tensor:
    functions = (F.relu6, F.hardswish, F.hardsigmoid, F.silu, F.elu, F.leaky_relu, F.gelu)
    return sum(function(x * 1.5) for function in functions) + F.log_softmax(x, 1)


IMAGE = (4, 9, 11)


def convolutions(x: Tensor, strided: Tensor, dilated: Tensor, transposed: Tensor) -> Tensor:
    x = F.conv2d(F.conv2d(x, strided, stride=2, padding=1, groups=2), dilated, dilation=2, padding=2)
    return F.conv_transpose2d(x, transposed, stride=2, padding=1, output_padding=1)


def lines_and_volumes(x: Tensor, line: Tensor, volume: Tensor) -> Tensor:
    x = F.conv1d(x.flatten(2), line, stride=3, padding=1)
    return F.conv3d(x.reshape(-1, 1, 5, 3, 11), volume, stride=2, padding=1)


def pools(x: Tensor) -> Tensor:
    x = F.max_pool2d(F.avg_pool2d(F.max_pool2d(x, 3, 1, 1), 2, 1, 1, False, False), 2, 2, ceil_mode=True)
    return F.avg_pool2d(F.avg_pool2d(x, 3, 1, 1, True), 2)


def adaptive_pools(x: Tensor, weight: Tensor) -> Tensor:
    x = F.adaptive_max_pool2d(F.adaptive_avg_pool2d(x, (6, 4)), (3, 2))
    return F.adaptive_avg_pool2d(x, 1).flatten(1) @ weight


def resizes(x: Tensor) -> Tensor:
    # One of each kind: repetition, an operator that ONNX has, products.
    x = F.interpolate(F.interpolate(x, scale_factor=2), size=(7, 13), mode="bicubic")
    return F.interpolate(x, scale_factor=1.3, mode="bilinear")


def pads_and_parts(x: Tensor) -> Tensor:
    x = F.pad(F.pad(F.pad(x, (1, 2, 3, 0), "replicate"), (2, 1, 1, 2), "reflect"), (1, 2, 0, 1))
    return torch.cat([x[:, :, 1::3, -1], x[:, :, 5:].amax(-1)], 2).flip(1)


def overwrites(x: Tensor, row: Tensor) -> Tensor:
    result = x * 2
    result[:, :, 2:, 1:] += row
    result[:, :2] = x[:, 2:3].sin()
    result[:, 3].copy_(x[:, 0])
    return result


def norms(x: Tensor, mean: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = F.batch_norm(x, mean, mean.abs() + 1, weight, bias)
    return F.group_norm(F.layer_norm(x, (11,)), 2, weight, bias)


torch.manual_seed(0)
NETS: dict[str, tuple[Net, tuple[int, ...]]] = {
    "convolutions": (Net(convolutions, (6, 2, 3, 3), (4, 6, 3, 3), (4, 3, 3, 3)), IMAGE),
    "lines_and_volumes": (Net(lines_and_volumes, (5, 4, 3), (2, 1, 3, 3, 3)), IMAGE),
    "pools": (Net(pools), IMAGE),
    "adaptive_pools": (Net(adaptive_pools, (4, 3)), IMAGE),
    "resizes": (Net(resizes), IMAGE),
    "pads_and_parts": (Net(pads_and_parts), IMAGE),
    "overwrites": (Net(overwrites, (10,)), IMAGE),
    "attention": (Net(self_attention, (24, 4), (24,)), (4, 3, 3)),
    "masked_attention": (Net(masked_attention, (1, 2, 9, 9)), (4, 3, 3)),
    "windows": (Net(windows, (1, 4, 4), (16, 6)), (4, 4, 6)),
    "norms": (Net(norms, (4,), (4,), (4,)), IMAGE),
    "activations": (Net(activations), IMAGE),
}
# PyTorch's own gradient of hardsigmoid has 1/6 in float32, even for float64.
TOLERANCE = dict.fromkeys(NETS, 1e-10) | {"activations": 1e-7}

names = pytest.mark.parametrize("name", list(NETS))


@names
def test_a_trace_is_right_at_another_batch_size(name: str) -> None:
    net, shape = copy.deepcopy(NETS[name])
    net.double()
    torch.manual_seed(1)
    graph_module = trace(net, torch.randn(TRACED, *shape, dtype=torch.float64))
    x, seed = inputs(net, shape, torch.float64)
    for got, want in zip(graph_module(x, seed), autograd(net, x, seed), strict=True):
        torch.testing.assert_close(got, want, atol=TOLERANCE[name], rtol=TOLERANCE[name])
    assert want.abs().max() > 1e-3


@names
def test_every_format_computes_the_same_at_another_batch_size(name: str) -> None:
    net, shape = NETS[name]
    torch.manual_seed(1)
    graph_module = trace(net, torch.randn(TRACED, *shape))
    x, seed = inputs(net, shape, torch.float32)
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(graph_module, (x, seed), dynamic_shapes=(batch, batch))
    want = autograd(net, x[:3], seed[:3])
    for run in (saved_and_loaded(program), torchscript(graph_module)):
        for got, expected in zip(run(x[:3], seed[:3]), want, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5, msg=lambda text, run=run: f"{run}: {text}")


def saved_and_loaded(program: torch.export.ExportedProgram) -> Callable[..., tuple[Tensor, ...]]:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


def torchscript(graph_module: GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """Script a graph, which is changed for it: TorchScript chooses overloads itself."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload):
            node.target = aten.size if node.target is aten.sym_size.int else node.target.overloadpacket
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "pin_memory"}
    graph_module.recompile()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        warnings.filterwarnings("ignore", "The TorchScript type system", UserWarning)
        return torch.inference_mode()(torch.jit.script(graph_module).forward)
