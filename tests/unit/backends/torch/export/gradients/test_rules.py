"""Each gradient rule and substitute against PyTorch's own autograd, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heatlens_server.backends.torch.export.gradients.convolution import convolution_backward
from heatlens_server.backends.torch.export.gradients.table import SUBSTITUTES, TABLE

aten = torch.ops.aten
EXACT = {"atol": 1e-11, "rtol": 1e-11}


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, seed: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    return torch.autograd.grad(function(leaf), [leaf], seed)[0]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        ((9,), (3,), (2,), (1,), (1,)),
        ((10,), (4,), (3,), (0,), (2,)),
        ((7, 10), (3, 2), (2, 3), (1, 0), (1, 2)),
        ((8, 8), (1, 1), (2, 2), (0, 0), (1, 1)),
        ((11, 6), (5, 3), (1, 4), (2, 1), (2, 1)),
        ((14, 14), (7, 7), (4, 4), (3, 3), (1, 1)),
        ((5, 6, 7), (3, 2, 3), (2, 1, 2), (1, 0, 1), (1, 1, 1)),
    ],
)
def test_convolution(groups: int, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> None:
    rank = len(size)
    x, weight = normal(2, 4, *size), normal(6, 4 // groups, *kernel)
    options = (stride, padding, dilation, False, [0] * rank, groups)
    out = aten.convolution(x, weight, None, *options)
    seed = torch.randn_like(out)
    want = gradient(lambda x: aten.convolution(x, weight, None, *options), x, seed)
    got, *rest = convolution_backward(seed, x, weight, None, *options, [True, False, False])
    torch.testing.assert_close(got, want, **EXACT)
    assert rest == [None, None]


@pytest.mark.parametrize("output_padding", [0, 1, 2])
@pytest.mark.parametrize(("groups", "rank"), [(1, 1), (2, 2), (1, 3)])
def test_transposed_convolution(output_padding: int, groups: int, rank: int) -> None:
    x, weight = normal(2, 4, *[5, 4, 3][:rank]), normal(4, 6 // groups, *[3] * rank)
    # As autograd records it where one number stands for all dimensions.
    options = ([3] * rank, [1] * rank, [2] * rank, True, [output_padding] * rank, groups)
    seed = torch.randn_like(aten.convolution(x, weight, None, *options))
    want = gradient(lambda x: aten.convolution(x, weight, None, *options), x, seed)
    got = convolution_backward(seed, x, weight, None, *options, [True, False, False])[0]
    torch.testing.assert_close(got, want, **EXACT)


def test_weights_that_depend_on_the_activations_are_refused() -> None:
    x, weight, seed = normal(1, 2, 4, 4), normal(2, 2, 1, 1), normal(1, 2, 4, 4)
    options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    with pytest.raises(NotImplementedError, match="weights depend"):
        convolution_backward(seed, x, weight, None, *options, [True, True, False])
    assert convolution_backward(seed, x, weight, None, *options, [False] * 3) == (None, None, None)


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("divisor", [None, 5])
@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)), ((3, 3), (1, 1), (1, 1)), ((2, 4), (3, 2), (1, 2)),
     ((3,), (), (1,)), ((9, 11), (), (0, 0)), ((4, 4), (4, 4), (0, 0))],
)  # fmt: skip
def test_average_pooling(
    kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> None:
    x = normal(2, 3, 9, 11)
    options = (kernel, stride, padding, ceil_mode, count_include_pad, divisor)
    seed = torch.randn_like(aten.avg_pool2d(x, *options))
    want = aten.avg_pool2d_backward(seed, x, *options)
    torch.testing.assert_close(TABLE[aten.avg_pool2d_backward.default](seed, x, *options), want, **EXACT)
    torch.testing.assert_close(TABLE[aten.avg_pool2d_backward.default](seed[0], x[0], *options), want[0], **EXACT)


def test_average_pooling_of_volumes() -> None:
    x, options = normal(2, 3, 5, 6, 7), ((3, 2, 3), (2, 2, 1), (1, 0, 1), True, False, None)
    seed = torch.randn_like(aten.avg_pool3d(x, *options))
    want = aten.avg_pool3d_backward(seed, x, *options)
    torch.testing.assert_close(TABLE[aten.avg_pool3d_backward.default](seed, x, *options), want, **EXACT)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 7), (9, 11), (12, 5), (1, 11), (3, 11), (18, 22)])
def test_adaptive_average_pooling(size: tuple[int, int]) -> None:
    x = normal(2, 3, 9, 11)
    seed = normal(2, 3, *size)
    want = gradient(lambda x: F.adaptive_avg_pool2d(x, size), x, seed)
    torch.testing.assert_close(TABLE[aten._adaptive_avg_pool2d_backward.default](seed, x), want, **EXACT)
    ours = SUBSTITUTES[aten.adaptive_avg_pool2d.default]
    torch.testing.assert_close(ours(x, size), F.adaptive_avg_pool2d(x, size), **EXACT)
    torch.testing.assert_close(gradient(lambda x: ours(x, size), x, seed), want, **EXACT)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 4), (4, 6, 5)])
def test_adaptive_average_pooling_of_volumes(size: tuple[int, int, int]) -> None:
    x, seed = normal(2, 3, 4, 6, 5), normal(2, 3, *size)
    want = gradient(lambda x: F.adaptive_avg_pool3d(x, size), x, seed)
    torch.testing.assert_close(TABLE[aten._adaptive_avg_pool3d_backward.default](seed, x), want, **EXACT)
    ours = SUBSTITUTES[aten.adaptive_avg_pool3d.default]
    torch.testing.assert_close(gradient(lambda x: ours(x, size), x, seed), want, **EXACT)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((2, 2), (2, 2), (0, 0), (1, 1)), ((3, 3), (1, 1), (1, 1), (1, 1)), ((3,), (2,), (1,), (1,)),
     ((3, 2), (2, 1), (1, 0), (2, 3)), ((9, 11), (), (0, 0), (1, 1))],
)  # fmt: skip
def test_max_pooling(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, batched: bool) -> None:
    # Few distinct values: windows overlap on ties.
    x = torch.randint(0, 3, (2, 3, 9, 11)).double()
    x = x if batched else x[0]
    options = (kernel, stride, padding, dilation, ceil_mode)
    out, indices = aten.max_pool2d_with_indices(x, *options)
    seed = torch.randn_like(out)
    want = aten.max_pool2d_with_indices_backward(seed, x, *options, indices)
    got = TABLE[aten.max_pool2d_with_indices_backward.default](seed, x, *options, indices)
    torch.testing.assert_close(got, want, **EXACT)


def test_max_pooling_sums_half_precision_in_single() -> None:
    x = torch.zeros(1, 1, 64, 64, dtype=torch.float16)
    x[0, 0, 32, 32] = 1
    options = ((63, 63), (1, 1), (31, 31), (1, 1), False)
    out, indices = aten.max_pool2d_with_indices(x.float(), *options)
    got = TABLE[aten.max_pool2d_with_indices_backward.default](torch.ones_like(out).half(), x, *options, indices)
    # 2048 + 1 is 2048 in float16.
    assert got.dtype == torch.float16
    assert got[0, 0, 32, 32] == 63 * 63 - 1  # to even


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (3, 11), (4, 7)])
def test_adaptive_max_pooling(size: tuple[int, int]) -> None:
    x, seed = torch.randint(0, 3, (2, 3, 9, 11)).double(), normal(2, 3, *size)
    want = gradient(lambda x: F.adaptive_max_pool2d(x, size), x, seed)
    out, indices = SUBSTITUTES[aten.adaptive_max_pool2d.default](x, size)
    assert torch.equal(out, F.adaptive_max_pool2d(x, size))
    torch.testing.assert_close(TABLE[aten.adaptive_max_pool2d_backward.default](seed, x, indices), want, **EXACT)


@pytest.mark.parametrize("pads", [(1, 2, 3, 0), (0, 4, 2, 2), (-1, 2, 3, -2)])
@pytest.mark.parametrize("mode", ["replication", "reflection"])
def test_padding(mode: str, pads: tuple[int, ...]) -> None:
    x = normal(2, 3, 6, 7)
    forward, backward = getattr(aten, f"{mode}_pad2d"), getattr(aten, f"{mode}_pad2d_backward")
    seed = torch.randn_like(forward(x, pads))
    torch.testing.assert_close(TABLE[backward.default](seed, x, pads), backward(seed, x, pads), **EXACT)


@pytest.mark.parametrize("mode", ["replication", "reflection"])
def test_padding_of_lines(mode: str) -> None:
    x = normal(2, 3, 6)
    forward, backward = getattr(aten, f"{mode}_pad1d"), getattr(aten, f"{mode}_pad1d_backward")
    seed = torch.randn_like(forward(x, (2, 3)))
    torch.testing.assert_close(TABLE[backward.default](seed, x, (2, 3)), backward(seed, x, (2, 3)), **EXACT)


@pytest.mark.parametrize(
    ("start", "end", "step"), [(0, 3, 1), (2, 2**63 - 1, 1), (-4, -1, 1), (1, 7, 3), (0, 7, 2), (1, 7, 2), (-9, 99, 5)]
)
@pytest.mark.parametrize("dim", [0, 2, -1])
def test_slicing(start: int, end: int, step: int, dim: int) -> None:
    x = normal(7, 7, 7)
    seed = torch.randn_like(aten.slice(x, dim, start, end, step))
    want = aten.slice_backward(seed, x.shape, dim, start, end, step)
    assert torch.equal(TABLE[aten.slice_backward.default](seed, list(x.shape), dim, start, end, step), want)


@pytest.mark.parametrize(("dim", "index"), [(0, 0), (1, -1), (-1, 2)])
def test_selecting(dim: int, index: int) -> None:
    x = normal(3, 4, 5)
    seed = torch.randn_like(x.select(dim, index))
    want = aten.select_backward(seed, x.shape, dim, index)
    assert torch.equal(TABLE[aten.select_backward.default](seed, list(x.shape), dim, index), want)


@pytest.mark.parametrize(("size", "step"), [(3, 1), (2, 2), (4, 2), (2, 3)])
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_unfolding(dim: int, size: int, step: int) -> None:
    x = normal(2, 9, 8, 10)
    seed = torch.randn_like(x.unfold(dim, size, step))
    want = gradient(lambda x: x.unfold(dim, size, step), x, seed)
    got = TABLE[aten.unfold_backward.default](seed, list(x.shape), dim, size, step)
    torch.testing.assert_close(got, want, **EXACT)


def test_hardtanh_has_no_gradient_at_its_bounds() -> None:
    x = torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0])
    rule = TABLE[aten.hardtanh_backward.default]
    assert rule(torch.ones(5), x, 0.0, 6.0).tolist() == [0, 0, 1, 0, 0]


INTERPOLATIONS = {
    "nearest": (aten.upsample_nearest2d, ()),
    "nearest_exact": (aten._upsample_nearest_exact2d, ()),
    "bilinear": (aten.upsample_bilinear2d, (False,)),
    "bilinear_aligned": (aten.upsample_bilinear2d, (True,)),
    "bicubic": (aten.upsample_bicubic2d, (False,)),
    "bicubic_aligned": (aten.upsample_bicubic2d, (True,)),
    "bilinear_antialiased": (aten._upsample_bilinear2d_aa, (False,)),
    "bicubic_antialiased": (aten._upsample_bicubic2d_aa, (False,)),
}


@pytest.mark.parametrize("name", list(INTERPOLATIONS))
@pytest.mark.parametrize(
    ("size", "factors"),
    [((14, 27), None), ((4, 5), None), ((7, 9), None), ((21, 18), None), ((1, 30), None),
     (None, (2.0, 3.0)), (None, (1.7, 0.6)), (None, (1.05, 1.0))],
)  # fmt: skip
def test_interpolation(name: str, size: Any, factors: Any) -> None:
    operator, flags = INTERPOLATIONS[name]
    x = normal(2, 3, 7, 9)
    want = operator.vec(x, size, *flags, factors)
    ours = SUBSTITUTES[operator.vec]
    torch.testing.assert_close(ours(x, size, *flags, factors), want, **EXACT)
    seed = torch.randn_like(want)
    # Not PyTorch's gradient: of bicubic and antialiased operators it ignores a scale if the size stays the same.
    units = operator.vec(torch.eye(63, dtype=torch.float64).reshape(63, 1, 7, 9), size, *flags, factors)
    expected = torch.einsum("nchw,ihw->nci", seed, units[:, 0]).reshape(x.shape)
    torch.testing.assert_close(gradient(lambda x: ours(x, size, *flags, factors), x, seed), expected, **EXACT)
    out = SUBSTITUTES[operator.default](x, want.shape[2:], *flags, *(factors or ()))
    torch.testing.assert_close(out, want, **EXACT)


@pytest.mark.parametrize(
    ("operator", "flags", "shape"),
    [
        (aten.upsample_linear1d, (False,), (2, 3, 7)),
        (aten.upsample_nearest1d, (), (2, 3, 7)),
        (aten._upsample_nearest_exact1d, (), (2, 3, 7)),
        (aten.upsample_trilinear3d, (True,), (2, 3, 4, 5, 6)),
        (aten.upsample_nearest3d, (), (2, 3, 4, 5, 6)),
        (aten._upsample_nearest_exact3d, (), (2, 3, 4, 5, 6)),
    ],
)
def test_interpolation_of_lines_and_volumes(operator: Any, flags: Any, shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    options = (None, *flags, [1.5] * (len(shape) - 2))
    want = operator.vec(x, *options)
    ours = SUBSTITUTES[operator.vec]
    torch.testing.assert_close(ours(x, *options), want, **EXACT)
    seed = torch.randn_like(want)
    expected = gradient(lambda x: operator.vec(x, *options), x, seed)
    torch.testing.assert_close(gradient(lambda x: ours(x, *options), x, seed), expected, **EXACT)
