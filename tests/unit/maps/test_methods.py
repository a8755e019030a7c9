"""Smooth Grad-CAM++ against its formula in loops, and against Grad-CAM++ where there is no noise."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.maps.methods import (
    cam,
    grad_cam,
    grad_cam_plus_plus,
    hi_res_cam,
    raw_map,
    smooth_grad_cam_plus_plus,
    x_grad_cam,
)

# Eigen-Grad-CAM is judged in test_principal.py.
GRADIENT_METHODS = [m for m in CLOSED_FORMS if m.traits.needs_gradient and m is not Method.EIGEN_GRAD_CAM]

# One image, one class, two channels of 2x2. Channel sums of A: 10 and 1. Channel means of g: 0.5 and -0.5.
A = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[2.0, 0.0], [0.0, -1.0]]]], dtype=torch.float64)
G = torch.tensor([[[[[1.0, 0.0], [-1.0, 2.0]], [[1.0, -1.0], [0.0, -2.0]]]]], dtype=torch.float64)

BY_HAND = {
    # 0.5 A0 - 0.5 A1
    Method.GRAD_CAM: [[-0.5, 1.0], [1.5, 2.5]],
    # g0 A0 = [[1, 0], [-3, 8]], g1 A1 = [[2, 0], [0, 2]]
    Method.HI_RES_CAM: [[3.0, 0.0], [-3.0, 10.0]],
    # weights 6 / 10 and 4 / 1: 0.6 A0 + 4 A1
    Method.X_GRAD_CAM: [[8.6, 1.2], [1.8, -1.6]],
    # relu(g0) A0 = [[1, 0], [0, 8]], relu(g1) A1 = [[2, 0], [0, 0]]
    Method.LAYER_CAM: [[3.0, 0.0], [0.0, 8.0]],
    # relu(g0 A0) = [[1, 0], [0, 8]], relu(g1 A1) = [[2, 0], [0, 2]]
    Method.ELEMENT_WISE_GRAD_CAM: [[3.0, 0.0], [0.0, 10.0]],
    # Channel 0, g = 1: alpha = 1 / (2 + 10) = 1/12; g = 2: alpha = 4 / (8 + 80) = 1/22; w = 1/12 + 2/22 = 23/132.
    # Channel 1, g = 1: alpha = 1 / (2 + 1); w = 1/3 = 44/132. Map: 23/132 A0 + 44/132 A1.
    Method.GRAD_CAM_PLUS_PLUS: [[111 / 132, 46 / 132], [69 / 132, 48 / 132]],
}


def random_case(n=3, k=2, c=16, h=5, w=4, dtype=torch.float32, scale=1e-2):
    generator = torch.Generator().manual_seed(7)
    activations = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).relu() + 0.01
    gradients = torch.randn(n, k, c, h, w, generator=generator, dtype=torch.float64) * scale
    return activations.to(dtype), gradients.to(dtype)


def test_every_method_of_gradients_is_computed_by_hand():
    assert set(BY_HAND) == set(GRADIENT_METHODS)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_by_hand(method, dtype):
    # Every number above is exact in half precision. 1e-6: what the epsilons change.
    expected = torch.tensor([[BY_HAND[method]]], dtype=torch.float64)
    actual = raw_map(method, A.to(dtype), G.to(dtype))
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4e-6)


def test_cam_by_hand():
    # Class 0: 2 A0 - A1. Class 1: A1.
    weights = torch.tensor([[[2.0, -1.0], [0.0, 1.0]]], dtype=torch.float64)
    expected = torch.tensor([[[[0.0, 4.0], [6.0, 9.0]], [[2.0, 0.0], [0.0, -1.0]]]], dtype=torch.float64)
    torch.testing.assert_close(cam(A, weights), expected, rtol=0, atol=0)
    torch.testing.assert_close(raw_map(Method.CAM, A, weights), expected, rtol=0, atol=0)


def test_cam_is_grad_cam_times_pixels_behind_a_linear_head():
    activations, _ = random_case(dtype=torch.float64)
    head = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # logit k = W[k] @ mean_ij(A), so d logit / d A = W[k] / (h w) everywhere.
    gradients = (head / 20)[..., None, None].expand(3, 2, 16, 5, 4)
    torch.testing.assert_close(cam(activations, head), 20 * grad_cam(activations, gradients))


def test_grad_cam_plus_plus_epsilon():
    # g^2 = 1e-6, the size of epsilon: alpha = 1e-6 / (2e-6 + 1e-9 + 1e-6).
    activations = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    gradients = torch.full((1, 1, 1, 1, 1), 1e-3, dtype=torch.float64)
    expected = 1e-3 * 1e-6 / 3.001e-6
    assert grad_cam_plus_plus(activations, gradients).item() == pytest.approx(expected, rel=1e-12)


def test_x_grad_cam_epsilon():
    # weight = 1e-7 / (1e-7 + 1e-7) = 0.5
    activations = torch.full((1, 1, 1, 1), 1e-7, dtype=torch.float64)
    gradients = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    assert x_grad_cam(activations, gradients).item() == pytest.approx(0.5e-7, rel=1e-12)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_grad_cam_plus_plus_with_a_denominator_of_exactly_zero(sign):
    # g = 2^-12 and sum A = -(2 + eps 2^24) 2^12: g^2 (sum A g + 2) = -eps, without rounding.
    gradient = sign * 2.0**-12
    total = -sign * (2 + 1e-6 * 2.0**24) * 2.0**12
    assert gradient**2 * (total * gradient + 2) + 1e-6 == 0
    activations = torch.full((1, 1, 1, 1), total, dtype=torch.float64)
    gradients = torch.full((1, 1, 1, 1, 1), gradient, dtype=torch.float64)
    expected = total * gradient**3 if sign > 0 else 0.0
    assert grad_cam_plus_plus(activations, gradients).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_float32_against_float64(method):
    activations, gradients = random_case(c=2048, h=7, w=7)
    expected = raw_map(method, activations.double(), gradients.double())
    actual = raw_map(method, activations, gradients)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=3e-6 * expected.abs().max().item())


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1e-5), (torch.float16, 1e2), (torch.bfloat16, 1e-2)])
def test_half_precision_accumulates_in_float32(method, dtype, scale):
    # 1e-5: products of two gradients are below float16's smallest number; 1e2: sums are above its largest.
    activations, gradients = random_case(c=2048, h=7, w=7, dtype=dtype, scale=scale)
    actual = raw_map(method, activations, gradients)
    expected = raw_map(method, activations.double(), gradients.double())
    assert actual.dtype == torch.float32
    assert expected.abs().max() > 0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_cam_half_precision_accumulates_in_float32():
    activations, _ = random_case(c=2048, dtype=torch.bfloat16)
    weights = torch.randn(3, 2, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = cam(activations.double(), weights.double())
    actual = cam(activations, weights)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_batch_is_its_images_and_classes_one_by_one(method):
    activations, gradients = random_case(dtype=torch.float64)
    together = raw_map(method, activations, gradients)
    assert together.shape == (3, 2, 5, 4)
    for n in range(3):
        for k in range(2):
            alone = raw_map(method, activations[n : n + 1], gradients[n : n + 1, k : k + 1])
            torch.testing.assert_close(together[n : n + 1, k : k + 1], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_channels_last_gives_the_same_map(method):
    activations, gradients = random_case(k=1, dtype=torch.float64)
    last = raw_map(
        method,
        activations.contiguous(memory_format=torch.channels_last),
        gradients[:, 0].contiguous(memory_format=torch.channels_last).unsqueeze(1),
    )
    torch.testing.assert_close(last, raw_map(method, activations, gradients), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_zero_gradients_give_a_zero_map_and_inputs_stay_as_they_were(method):
    activations, gradients = random_case()
    before = activations.clone(), gradients.clone()
    raw_map(method, activations, gradients)
    torch.testing.assert_close((activations, gradients), before, rtol=0, atol=0)
    assert torch.equal(raw_map(method, activations, gradients * 0), torch.zeros(3, 2, 5, 4))
    assert torch.equal(raw_map(method, activations * 0, gradients), torch.zeros(3, 2, 5, 4))


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_nan_stays_in_its_own_map(method):
    activations, gradients = random_case()
    gradients[1, 0, 3, 2, 2] = torch.nan
    maps = raw_map(method, activations, gradients)
    assert maps[1, 0].isnan().any()
    maps[1, 0] = 0
    assert maps.isfinite().all()


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_traces_with_any_batch_size(method):
    def graph(activations, gradients):
        return raw_map(method, activations, gradients)

    traced = make_fx(graph, tracing_mode="symbolic")(*random_case(n=2, k=3))
    for n, k in [(5, 2), (1, 4)]:
        case = random_case(n=n, k=k)
        torch.testing.assert_close(traced(*case), raw_map(method, *case))


@pytest.mark.parametrize(
    ("activations_shape", "gradients_shape", "message"),
    [
        ((3, 5, 4), (1, 1, 3, 5, 4), r"activations: must be \(N, C, h, w\), not \(3, 5, 4\)"),
        ((2, 3, 5, 4), (2, 3, 5, 4), r"gradients: must be \(2, K, 3, 5, 4\) .*, not \(2, 3, 5, 4\)"),
        ((2, 3, 5, 4), (1, 1, 3, 5, 4), "gradients: must be"),
        ((2, 3, 5, 4), (2, 1, 1, 5, 4), "gradients: must be"),
    ],
)
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_wrong_shapes(method, activations_shape, gradients_shape, message):
    with pytest.raises(ValueError, match=message):
        raw_map(method, torch.zeros(activations_shape), torch.zeros(gradients_shape))


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4), (1, 1, 3)])
def test_wrong_class_weights(shape):
    with pytest.raises(ValueError, match="class_weights: must be"):
        cam(torch.zeros(2, 3, 5, 4), torch.zeros(shape))


def test_hi_res_cam_sums_to_the_logit_of_a_linear_network():
    # The property the paper is about: for logit = sum W A + b the map adds up to logit - b.
    activations, weights = random_case(k=1, dtype=torch.float64)
    logit = (weights[:, 0] * activations).sum(dim=(1, 2, 3))
    torch.testing.assert_close(hi_res_cam(activations, weights).sum(dim=(1, 2, 3)), logit)


SHAPE = (2, 3, 4, 5, 6)  # N, K, C, h, w


def test_without_noise_it_is_grad_cam_plus_plus():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2, 4, 5, 6, generator=generator)
    gradients = torch.randn(SHAPE, generator=generator) / 10
    found = smooth_grad_cam_plus_plus(activations, gradients, gradients**2, gradients**3)
    torch.testing.assert_close(found, grad_cam_plus_plus(activations, gradients), rtol=1e-4, atol=1e-5)


def test_it_is_its_formula():
    generator = torch.Generator().manual_seed(1)
    activations = torch.rand(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    gradients = torch.randn(7, *SHAPE, generator=generator, dtype=torch.float64)
    first, second, third = (gradients.pow(power).mean(dim=0) for power in (1, 2, 3))
    found = smooth_grad_cam_plus_plus(activations, first, second, third)
    for n in range(2):
        for k in range(3):
            expected = torch.zeros(5, 6, dtype=torch.float64)
            for c in range(4):
                alpha = second[n, k, c] / (2 * second[n, k, c] + activations[n, c].sum() * third[n, k, c] + 1e-6)
                expected += (alpha * first[n, k, c].clamp(min=0)).sum() * activations[n, c]
            torch.testing.assert_close(found[n, k], expected)


def test_no_gradient_is_no_map():
    nothing = torch.zeros(1, 1, 4, 5, 6)
    assert smooth_grad_cam_plus_plus(torch.zeros(1, 4, 5, 6), nothing, nothing, nothing).eq(0).all()


def test_shapes_that_would_broadcast_are_refused():
    nothing = torch.zeros(1, 1, 4, 5, 6)
    with pytest.raises(ValueError, match="first, second, third"):
        smooth_grad_cam_plus_plus(torch.zeros(1, 4, 5, 6), nothing, nothing, nothing[:, :, :1])
    with pytest.raises(ValueError, match="first, second, third"):
        smooth_grad_cam_plus_plus(torch.zeros(1, 3, 5, 6), nothing, nothing, nothing)
