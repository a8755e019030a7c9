"""Scaled dot-product attention in its plain form: two products and a softmax.

The fused kernels' gradients exist in no export format; the plain form's do.
"""

import math

import torch
from torch import Tensor

from heatlens_server.backends.torch.export.gradients.products import matmul

aten = torch.ops.aten


def scaled_dot_product_attention(  # noqa: PLR0917 - the operator's signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend: softmax(query key^T * scale + mask) value (Vaswani et al., "Attention is all you need", 2017, eq. 1).

    Args:
        query: (..., H, l, e).
        key: (..., H, s, e); (..., G, s, e) with G dividing H if `enable_gqa`: H / G heads share one.
        value: (..., H, s, v); (..., G, s, v) if `enable_gqa`.
        attn_mask: broadcasts to (..., H, l, s): boolean, True where a key takes part, or floats that are added. A
            query with no key to attend to gives 0.
        dropout_p: must be 0; a served model has no dropout.
        is_causal: whether query i sees the keys 0 to i only.
        scale: of the products; None for 1 / sqrt(e).
        enable_gqa: grouped queries, see `key`.

    Returns:
        (..., H, l, v), the dtype of `query`. The softmax of half precision is computed in float32.

    Raises:
        NotImplementedError: dropout_p is not 0.
    """
    if dropout_p:
        raise NotImplementedError(f"scaled_dot_product_attention: dropout_p must be 0 to be exported, not {dropout_p}")
    # Scaling the smaller operand before the product keeps half precision from overflowing.
    query = query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    scores = _grouped(query, key.transpose(-2, -1)) if enable_gqa else matmul(query, key.transpose(-2, -1))
    weights = _softmax(scores, _mask(scores, attn_mask, is_causal=is_causal), may_be_empty=attn_mask is not None)
    return _grouped(weights, value) if enable_gqa else matmul(weights, value)


def _grouped(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (..., H, l, k) with (..., G, k, m), each right matrix serving H / G neighbours: (..., H, l, m)."""
    heads, rows, inner = left.shape[-3:]
    groups = right.shape[-3]
    # The heads of a group are one tall matrix: nothing is repeated.
    stacked = left.reshape(*left.shape[:-3], groups, heads // groups * rows, inner)
    return matmul(stacked, right).reshape(*left.shape[:-1], right.shape[-1])


def _mask(scores: Tensor, attn_mask: Tensor | None, *, is_causal: bool) -> Tensor | None:
    if is_causal:
        return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return attn_mask


def _softmax(scores: Tensor, mask: Tensor | None, *, may_be_empty: bool) -> Tensor:
    dtype = scores.dtype
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else scores.dtype
    if not may_be_empty:
        return torch.softmax(scores, -1, dtype=wide).to(dtype)
    # The softmax of nothing but -inf is nan, and so would be its gradient: such rows are taken out before and after.
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1, dtype=wide).to(dtype)
    return weights.masked_fill(empty, 0.0)
