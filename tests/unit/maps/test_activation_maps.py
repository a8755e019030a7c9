import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from heatlens_server.core.methods import Method
from heatlens_server.maps.activation_maps import fem, random_cam
from heatlens_server.maps.methods import raw_map, shapley_cam


def activations_of(n=3, c=16, h=7, w=7, dtype=torch.float64):
    return torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(0), dtype=dtype).relu()


def weights_of(count, channels):
    """Random-CAM's weights (K, C): the maps of one-hot activations."""
    return random_cam(torch.eye(channels, dtype=torch.float64).reshape(1, channels, 1, channels), count)[0, :, 0]


def test_fem_is_its_formula():
    activations = activations_of()
    maps = fem(activations).squeeze(1).numpy()
    for n, image in enumerate(activations.numpy()):
        expected = sum(channel.mean() * (channel > channel.mean() + 2 * channel.std()) for channel in image)
        assert np.abs(maps[n] - expected).max() < 1e-12
        assert expected.max() > 0


def test_fem_of_flat_channels_is_zero():
    assert not fem(torch.full((2, 3, 7, 7), 0.1)).any()


def test_fem_keeps_a_nan():
    activations = activations_of()
    activations[1, 0, 0, 0] = torch.nan
    maps = fem(activations)
    assert maps[1].isnan().any()
    assert maps[[0, 2]].isfinite().all()


def test_random_weights_are_uniform_and_independent():
    weights = weights_of(40, 1000)
    print(f"random weights: mean {weights.mean():.4f}, variance {weights.var():.4f} of 0.3333")
    assert weights.min() >= -1
    assert weights.max() < 1
    # Of 40000 independent draws: standard errors 0.003 and 0.0015.
    assert abs(weights.mean()) < 0.012
    assert abs(weights.var() - 1 / 3) < 0.006
    histogram = torch.histc(weights, bins=10, min=-1, max=1)
    assert (histogram / 4000 - 1).abs().max() < 0.08
    correlation = torch.corrcoef(weights) - torch.eye(40)
    # The largest of 780 pairs, each with a standard error of 0.032.
    assert correlation.abs().max() < 0.16
    # Over the channels of one class position: neighbours know nothing of each other.
    assert torch.corrcoef(torch.stack([weights[:, :-1].flatten(), weights[:, 1:].flatten()]))[0, 1].abs() < 0.02


def test_random_weights_are_the_same_for_any_number_of_channels_classes_and_images():
    weights = weights_of(3, 50)
    torch.testing.assert_close(weights_of(5, 80)[:3, :50], weights, rtol=0, atol=0)
    activations = activations_of(c=50)
    expected = torch.einsum("kc,nchw->nkhw", weights, activations)
    torch.testing.assert_close(random_cam(activations, 3), expected)
    torch.testing.assert_close(random_cam(activations[1:2].float(), 3), expected[1:2].float(), rtol=1e-5, atol=1e-5)


def test_random_weights_stay_as_they_are():
    """Maps of another version must be comparable: the top 24 bits of what SplitMix64 gives for seed 0, as published."""
    a, b = [0xE220A8, 0x06C45D], [0x6E789E, 0xF88BB8]
    expected = [[first / 2**23 - 1 for first in a], [(f + s) % 2**24 / 2**23 - 1 for f, s in zip(a, b, strict=True)]]
    assert weights_of(2, 2).tolist() == expected


@pytest.mark.parametrize("method", [Method.FEM, Method.RANDOM_CAM])
def test_maps_of_activations_alone(method):
    activations, factors = activations_of(dtype=torch.float16), torch.zeros(3, 2)
    maps = raw_map(method, activations, factors)
    assert maps.shape == (3, 2, 7, 7)
    assert maps.dtype is torch.float32
    assert not raw_map(method, activations * 0, factors).any()
    with pytest.raises(ValueError, match="activations: must be"):
        raw_map(method, activations[0], factors)


@pytest.mark.parametrize("method", [Method.FEM, Method.RANDOM_CAM])
def test_traces_with_any_batch_size(method):
    traced = make_fx(lambda a, f: raw_map(method, a, f), tracing_mode="symbolic")(
        activations_of(2), torch.zeros(2, 3, 1)
    )
    for n, k in [(5, 2), (1, 4)]:
        case = activations_of(n), torch.zeros(n, k, 1)
        torch.testing.assert_close(traced(*case), raw_map(method, *case))


def test_shapley_cam_by_hand():
    activations = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]])
    gradients = torch.tensor([[[[[1.0, 3.0]], [[-1.0, 1.0]]]]])
    curvature = torch.tensor([[[[[2.0, 2.0]], [[0.0, -4.0]]]]])
    # Weights: 2 - 0.5 * 2 = 1 and 0 + 0.5 * 2 = 1.
    assert shapley_cam(activations, gradients, curvature).tolist() == [[[[3.0, 3.0]]]]
    with pytest.raises(ValueError, match="curvature: must be"):
        shapley_cam(activations, gradients, curvature[0])
