"""Forward operators that are replaced before autograd records them: their gradients are no operators of formats."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from heatlens_server.backends.torch.export.gradients.attention import scaled_dot_product_attention
from heatlens_server.backends.torch.export.gradients.products import linear, matmul, reshape

aten = torch.ops.aten


def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:  # noqa: ARG001 - the operator's signature
    """Overwrite all of a tensor: what functional graphs make of `target.copy_(source)`.

    Args:
        target: only its shape and dtype are used.
        source: broadcasts to the target's shape.
        non_blocking: not used.

    Returns:
        The source in the target's shape and dtype, differentiable by the source.
    """
    return source.to(target.dtype).expand_as(target)


def adaptive_avg_pool(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Average over windows, two- or three-dimensional: where each channel is one window, as a mean.

    PyTorch lays that mean out by its input's strides, with an operator that autograd records the traced strides of.

    Args:
        values: (..., C, h, w) or (..., C, d, h, w).
        sizes: of the result's last dimensions.
    """
    if all(size == 1 for size in sizes):
        return values.mean(tuple(range(-len(sizes), 0)), keepdim=True)
    pool = F.adaptive_avg_pool2d if len(sizes) == 2 else F.adaptive_avg_pool3d
    return pool(values, list(sizes))


SUBSTITUTES: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType(
    {
        # A recorded view presumes the strides of the trace.
        aten.view.default: reshape,
        aten._unsafe_view.default: reshape,  # noqa: SLF001 - an operator all the same
        aten.adaptive_avg_pool2d.default: adaptive_avg_pool,
        aten.adaptive_avg_pool3d.default: adaptive_avg_pool,
        aten.copy.default: copy,
        aten.linear.default: linear,
        # Its gradient asks for the larger of two sizes, which TorchScript has no operator for.
        aten.matmul.default: matmul,
        # Which kernel it takes depends on the device that it is traced on.
        aten.scaled_dot_product_attention.default: scaled_dot_product_attention,
    }
)
"""By operator, a function of the same arguments."""
