"""Attention and products in their plain form against PyTorch's."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from heatlens_server.backends.torch.export.gradients.attention import scaled_dot_product_attention
from heatlens_server.backends.torch.export.gradients.products import linear, matmul, reshape

EXACT = {"atol": 1e-11, "rtol": 1e-11}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def results(function: Any, tensors: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves, **options)
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return out, *torch.autograd.grad(out, leaves, seed)


def compare(ours: Any, theirs: Any, tensors: tuple[Tensor, ...], **options: Any) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        want = results(theirs, tensors, **options)
    for got, expected in zip(results(ours, tensors, **options), want, strict=True):
        assert not expected.isnan().any()
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def masks() -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    boolean = torch.rand(5, 7, generator=generator) > 0.4
    empty = boolean.clone()
    empty[2] = False
    infinite = torch.randn(2, 1, 5, 7, generator=generator, dtype=torch.float64)
    infinite[0, 0, 1] = -math.inf
    infinite[1, 0, 2, 3] = -math.inf
    return {
        "none": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": boolean},
        "boolean_row_empty": {"attn_mask": empty},
        "float": {"attn_mask": torch.randn(1, 4, 5, 7, generator=generator, dtype=torch.float64)},
        "float_row_infinite": {"attn_mask": infinite},
    }


@pytest.mark.parametrize("mask", list(masks()))
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention(mask: str, scale: float | None, grouped: bool) -> None:
    heads = 2 if grouped else 4
    tensors = (normal(2, 4, 5, 6), normal(2, heads, 7, 6), normal(2, heads, 7, 3))
    options = masks()[mask] | {"scale": scale, "enable_gqa": grouped}
    compare(scaled_dot_product_attention, F.scaled_dot_product_attention, tensors, **options)


def test_attention_without_heads_and_with_strided_operands() -> None:
    tensors = (normal(2, 6, 5).transpose(1, 2), normal(2, 7, 6), normal(2, 7, 3))
    compare(scaled_dot_product_attention, F.scaled_dot_product_attention, tensors)


def test_dropout_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="dropout_p"):
        scaled_dot_product_attention(normal(1, 2, 2), normal(1, 2, 2), normal(1, 2, 2), dropout_p=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_where_the_scaled_product_does_not(dtype: torch.dtype) -> None:
    # Products of 64 * 48 * 48 = 147456 before the scale: infinite in float16, 18432 after it.
    query, key, value = (48 + torch.randn(1, 2, 5, 64, dtype=torch.float32) for _ in range(3))
    got = scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype))
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert ((got.float() >= 44) & (got.float() <= 52)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_softmax_of_half_precision_is_as_good_as_torchs(dtype: torch.dtype) -> None:
    tensors = [torch.randn(2, 2, 50, 16) for _ in range(3)]
    want = F.scaled_dot_product_attention(*tensors)
    halves = [tensor.to(dtype) for tensor in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        theirs = (F.scaled_dot_product_attention(*halves).float() - want).abs().max()
    ours = (scaled_dot_product_attention(*halves).float() - want).abs().max()
    assert ours < 3 * theirs


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 4), (4, 5)), ((2, 3, 4), (4, 5)), ((2, 3, 6, 4), (4, 5)), ((2, 3, 4), (2, 4, 5)),
     ((2, 6, 3, 4), (2, 6, 4, 5)), ((2, 6, 3, 4), (6, 4, 5)), ((2, 6, 3, 4), (1, 6, 4, 5)),
     ((4,), (4, 5)), ((2, 3, 4), (4,)), ((4,), (4,))],
)  # fmt: skip
def test_matmul(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    compare(matmul, torch.matmul, (normal(*left), normal(*right)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 5, 4)])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    tensors = (normal(*shape), normal(6, 4), *([normal(6)] if bias else []))
    compare(linear, F.linear, tensors)
    strided = (tensors[0].transpose(0, -1).contiguous().transpose(0, -1), *tensors[1:])
    compare(linear, F.linear, strided)


def test_reshape_copies_where_a_view_cannot() -> None:
    x = normal(2, 3, 4).transpose(1, 2)
    assert torch.equal(reshape(x, [2, 12]), x.reshape(2, 12))
    assert reshape(normal(1, 1), []).shape == ()
