"""Attention without fused kernels: the attention matrix becomes a tensor of the graph."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from heatlens_server.backends.torch.network.hooks import Substitutes

PassOn = Callable[[Tensor], Tensor]
"""Given an attention matrix (..., queries, keys), whose rows sum to 1; what it returns takes its place."""

_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def open_attention(pass_on: PassOn = lambda matrix: matrix) -> Substitutes:
    """What computes attention with products and a softmax instead of a fused kernel; it can be differentiated twice.

    Understood are `F.scaled_dot_product_attention`, `nn.MultiheadAttention`, and attention written out: a softmax of
    anything of three or more dimensions is taken for it.

    Args:
        pass_on: called with every attention matrix.
    """
    return {
        F.scaled_dot_product_attention: partial(_attend, pass_on),
        F.multi_head_attention_forward: partial(_attend_with_heads, pass_on),
        F.softmax: partial(_softmax, pass_on, F.softmax),
        torch.softmax: partial(_softmax, pass_on, torch.softmax),
        Tensor.softmax: partial(_softmax, pass_on, Tensor.softmax),
    }


def _softmax(pass_on: PassOn, softmax: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    result = softmax(*args, **kwargs)
    return pass_on(result) if result.ndim >= 3 else result


def _attend(  # noqa: PLR0917 - torch's own signature
    pass_on: PassOn,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - nothing is dropped in eval mode
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, as its documentation writes it out."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    # The queries are scaled, not the products: those may be too large for float16.
    products = (query * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
    if attn_mask is not None:
        masked = attn_mask.dtype is torch.bool
        products = products.masked_fill(~attn_mask, -math.inf) if masked else products + attn_mask
    return pass_on(products.softmax(-1)) @ value


def _attend_with_heads(pass_on: PassOn, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    """`F.multi_head_attention_forward`: torch's own for the matrix, then its products with the values once more."""
    given = _MULTI_HEAD.bind(*args, **kwargs)
    given.apply_defaults()
    asked = given.arguments
    needed, averaged = asked["need_weights"], asked["average_attn_weights"]
    asked["need_weights"], asked["average_attn_weights"] = True, False
    output, weights = F.multi_head_attention_forward(*given.args, **given.kwargs)
    matrix = cast("Tensor", weights)
    value: Tensor = asked["value"]
    # Not with added or given keys, nor without a batch.
    if value.ndim == 3 and matrix.shape[-1] == value.shape[0] and asked["static_v"] is None:
        width: int = asked["embed_dim_to_check"]
        weight = asked["v_proj_weight"] if asked["use_separate_proj_weight"] else asked["in_proj_weight"][-width:]
        bias = None if asked["in_proj_bias"] is None else asked["in_proj_bias"][-width:]
        # (keys, N, width) to (N, heads, keys, width / heads), and back.
        values = torch.unflatten(F.linear(value, weight, bias), 2, (asked["num_heads"], -1)).permute(1, 2, 0, 3)
        matrix = pass_on(matrix)
        joined = (matrix @ values).permute(2, 0, 1, 3).flatten(2)
        output = F.linear(joined, asked["out_proj_weight"], asked["out_proj_bias"])
    if not needed:
        return output, None
    return output, matrix.mean(dim=1) if averaged else matrix
