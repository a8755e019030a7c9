"""What a network's biases contribute to a score: each bias times the gradient with respect to what it is added to."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from heatlens_server.backends.torch.network.hooks import Substitutes
from heatlens_server.maps.precision import at_least_float32

Take = Callable[[Tensor, int], None]
"""Given the bias-gradient of one operation, in its output's shape, and that shape's channel dimension, 1 or -1.

Called within the backward pass: nothing is kept of a layer's gradients longer than it takes.
"""

_BATCH_NORM = inspect.signature(F.batch_norm)


def bias_gradients(take: Take) -> Substitutes:
    """What a network is run with so that differentiating what it returns hands out the bias-gradients on the way.

    The biases are those of convolutions, linear layers, layer and group normalisation, and constants of one number
    per channel that are added to maps (torchvision's FrozenBatchNorm2d). Batch normalisation in eval mode is
    `x * w / s + (b - m * w / s)`, so its bias is what is in brackets: an implicit bias, section 3 of FullGrad.

    In a network of these, ReLUs, pooling and sums (piecewise linear in its input), input times gradient and all
    bias-gradients add up to the score: the paper's proposition 1, completeness. Other activations and the division in
    layer and group normalisation have implicit biases too, which are not counted, as in the authors' own program.

    Args:
        take: called once per operation and backward pass, in the order of the backward pass.
    """
    by_position: dict[Callable[..., Tensor], tuple[int, int]] = {
        F.conv1d: (2, 1),
        F.conv2d: (2, 1),
        F.conv3d: (2, 1),
        F.conv_transpose2d: (2, 1),
        F.group_norm: (3, 1),
        F.linear: (2, -1),
        F.layer_norm: (3, -1),
    }
    return {
        **{
            function: partial(_with_bias, take, function, position, channel_dim)
            for function, (position, channel_dim) in by_position.items()
        },
        F.batch_norm: partial(_batch_norm, take),
        Tensor.add: partial(_add, take, Tensor.add),
        torch.add: partial(_add, take, torch.add),
    }


def _with_bias(
    take: Take,
    function: Callable[..., Tensor],
    position: int,
    channel_dim: int,
    *args: Any,  # noqa: ANN401 - of any of these functions
    **kwargs: Any,  # noqa: ANN401
) -> Tensor:
    output = function(*args, **kwargs)
    bias = args[position] if len(args) > position else kwargs.get("bias")
    if bias is not None:
        _watch(take, output, bias, channel_dim)
    return output


def _batch_norm(take: Take, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    output = F.batch_norm(*args, **kwargs)
    given = _BATCH_NORM.bind(*args, **kwargs)
    given.apply_defaults()
    norm = given.arguments
    mean, variance = norm["running_mean"], norm["running_var"]
    if not norm["training"] and mean is not None and variance is not None:
        bias = -at_least_float32(mean) * torch.rsqrt(at_least_float32(variance) + norm["eps"])
        if norm["weight"] is not None:
            bias = bias * norm["weight"]
        if norm["bias"] is not None:
            bias = bias + norm["bias"]
        _watch(take, output, bias, 1)
    return output


def _add(take: Take, add: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    output = add(*args, **kwargs)
    if len(args) == 2 and not kwargs:
        for constant, other in (args, args[::-1]):
            if (
                isinstance(constant, Tensor)
                and isinstance(other, Tensor)
                and output.ndim == 4
                and not constant.requires_grad
                and constant.shape == (1, output.shape[1], 1, 1)
                and other.shape == output.shape
            ):
                _watch(take, output, constant.flatten(), 1)
    return output


def _watch(take: Take, output: Tensor, bias: Tensor, channel_dim: int) -> None:
    # A single image without a batch, as networks may run parts on, lies on no image of this batch.
    if not output.requires_grad or output.ndim < 2 or output.shape[channel_dim] != bias.numel():
        return
    shaped = at_least_float32(bias).view(-1, *[1] * (output.ndim - 2)) if channel_dim == 1 else at_least_float32(bias)
    # Registered before anything changes the output in place: the gradient is with respect to what it is now.
    output.register_hook(lambda gradient: take(at_least_float32(gradient) * shaped, channel_dim))  # type: ignore[no-untyped-call]
