"""Forward operators that are replaced before autograd records them: what it would record holds for the trace alone."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

# ruff: noqa: SLF001 - operators with an underscore are operators all the same

aten = torch.ops.aten


def reshape(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Give (...) another shape, with a copy where the strides ask for one."""
    return values.reshape(tuple(sizes))


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
    pooled: Tensor = (aten._adaptive_avg_pool2d if len(sizes) == 2 else aten._adaptive_avg_pool3d)(values, sizes)
    return pooled


def attention(  # noqa: PLR0917 - the operator's signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,  # noqa: ANN401 - the operator's, by name
) -> Tensor:
    """Attend by products and a softmax, PyTorch's own: of the fused kernels, which one depends on the device."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        # The operator converts masks before it chooses a kernel; this one adds what it is given.
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    operands = (query, key, value, attn_mask, dropout_p, is_causal)
    attended: Tensor = aten._scaled_dot_product_attention_math(*operands, None, **options)[0]
    return attended


SUBSTITUTES: Mapping[OpOverload, Callable[..., Any]] = MappingProxyType(
    {
        # A recorded view presumes the strides of the trace.
        aten.view.default: reshape,
        aten._unsafe_view.default: reshape,
        aten.adaptive_avg_pool2d.default: adaptive_avg_pool,
        aten.adaptive_avg_pool3d.default: adaptive_avg_pool,
        aten.copy.default: copy,
        aten.scaled_dot_product_attention.default: attention,
    }
)
"""By operator, a function of the same arguments."""
