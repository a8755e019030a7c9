"""Grouped convolutions that can be differentiated twice for the price of two convolutions.

Torch's own second derivative goes over the groups one by one, for the gradient of the weights also where nobody asks
for it (`_convolution_double_backward` of ATen's Convolution.cpp): for a depthwise layer of 96 channels that takes 27
times as long as the first, and it cannot be interrupted.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor
from torch.nn.grad import conv2d_input

from heatlens_server.backends.torch.network.hooks import Substitutes

_Options = tuple[Any, Any, Any, int]  # stride, padding, dilation and groups, as F.conv2d takes them


def grouped_convolutions() -> Substitutes:
    """What takes the place of `F.conv2d`, of several groups and with fixed weights."""
    return {F.conv2d: _conv2d}


def _conv2d(  # noqa: PLR0917 - torch's own signature
    input: Tensor,  # noqa: A002 - torch's own name
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,  # noqa: ANN401 - a number or two
    padding: Any = 0,  # noqa: ANN401 - also "same" and "valid"
    dilation: Any = 1,  # noqa: ANN401
    groups: int = 1,
) -> Tensor:
    fixed = not weight.requires_grad and (bias is None or not bias.requires_grad)
    if groups == 1 or isinstance(padding, str) or not fixed or input.ndim != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    result: Tensor = _Convolution.apply(input, weight, bias, (stride, padding, dilation, groups))
    return result


class _Convolution(torch.autograd.Function):
    """A convolution, which is linear in its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, options
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (weight,) = ctx.saved_tensors
        return _Transposed.apply(gradient, weight, ctx.shape, ctx.options), None, None, None


class _Transposed(torch.autograd.Function):
    """The gradient of a convolution's input, which is linear in that of its output; its own gradient is the former."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, shape: torch.Size, options: _Options) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(weight)
        ctx.options = options
        result: Tensor = conv2d_input(shape, weight, y, *options)  # type: ignore[no-untyped-call]
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (weight,) = ctx.saved_tensors
        return _Convolution.apply(gradient, weight, None, ctx.options), None, None, None
