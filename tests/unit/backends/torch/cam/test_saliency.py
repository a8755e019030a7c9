"""Raw maps become the map that callers get: resizing, combining layers, the order of these and min-max."""

import cv2
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from heatlens_server.backends.torch.cam.saliency import WHOLE, Part, combine_layers, cut, saliency, upsample
from heatlens_server.core.methods import Aggregation
from heatlens_server.maps.methods import grad_cam
from heatlens_server.maps.normalization import normalize


def random_maps(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def test_upsampling_by_hand():
    # Half-pixel centres: output columns sit at -0.25, 0.25, 0.75 and 1.25 of the input; the outer ones are clamped.
    maps = torch.tensor([[[[0.0, 4.0]]]])
    assert upsample(maps, (1, 4)).tolist() == [[[[0.0, 1.0, 3.0, 4.0]]]]


@pytest.mark.parametrize("size", [(96, 128), (7, 5), (8, 224), (3, 2)])
def test_is_opencv_s_linear_resize(size):
    maps = random_maps(2, 3, 7, 5)
    actual = upsample(maps, size)
    assert actual.shape == (2, 3, *size)
    for n in range(2):
        for k in range(3):
            expected = cv2.resize(maps[n, k].numpy(), (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
            torch.testing.assert_close(actual[n, k], torch.from_numpy(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equal_size_is_the_identity(dtype):
    maps = random_maps(2, 3, 7, 5, dtype=dtype)
    assert upsample(maps, (7, 5)) is maps
    assert upsample(maps, (14, 10)).dtype == dtype


def test_min_max_before_upsampling_changes_nothing_after_it():
    maps = random_maps(2, 3, 7, 5).relu().double()
    once = normalize(upsample(maps, (96, 128))).values
    twice = normalize(upsample(normalize(maps).values, (96, 128))).values
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-12)


def test_combine_layers_by_hand():
    # Normalised: [0, 1] widened to [0, 0.25, 0.75, 1], and [1, 0, 0.5, 0] after the ReLU.
    small = torch.tensor([[[[5.0, 9.0]]]])
    large = torch.tensor([[[[2.0, -7.0, 1.0, 0.0]]]])
    for layers in ([small, large], [large, small]):
        assert combine_layers(layers).tolist() == [[[[0.5, 0.125, 0.625, 0.5]]]]
        assert combine_layers(layers, aggregation=Aggregation.MAX).tolist() == [[[[1.0, 0.25, 0.75, 1.0]]]]
        assert combine_layers(layers, aggregation=Aggregation.PRODUCT).tolist() == [[[[0.0, 0.0, 0.375, 0.0]]]]


def test_a_product_s_factors_are_stretched_again_once_they_are_resized():
    # Three pixels shrunk to their outer two by linear sampling: [0, 1, 0.5] at 0.25 and 1.75 is [0.25, 0.625].
    layer, other = torch.tensor([[[[0.0, 4.0, 2.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    assert combine_layers([layer, other], (1, 2), Aggregation.MAX).tolist() == [[[[0.25, 1.0]]]]
    assert combine_layers([layer, other], (1, 2), Aggregation.PRODUCT).tolist() == [[[[0.0, 1.0]]]]


def test_combine_layers_at_a_size_resizes_once():
    layers = [random_maps(2, 1, 7, 5), random_maps(2, 1, 14, 10)]
    expected = sum(upsample(normalize(maps).values, (96, 128)) for maps in layers) / 2
    torch.testing.assert_close(combine_layers(layers, (96, 128)), expected)


def test_combine_layers_takes_the_largest_of_each_side():
    assert combine_layers([random_maps(1, 1, 8, 2), random_maps(1, 1, 4, 6)]).shape == (1, 1, 8, 6)


def test_combine_layers_of_one_layer_is_its_normalised_map():
    maps = random_maps(2, 3, 7, 5)
    assert torch.equal(combine_layers([maps]), normalize(maps).values)


def test_a_flat_layer_adds_zeros():
    flat, other = torch.ones(1, 1, 7, 5), random_maps(1, 1, 7, 5)
    assert torch.equal(combine_layers([flat, other]), normalize(other).values / 2)
    assert torch.equal(combine_layers([flat, other], aggregation=Aggregation.MAX), normalize(other).values)
    assert not combine_layers([flat, other], aggregation=Aggregation.PRODUCT).any()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "at least one"),
        ([torch.zeros(1, 1, 2, 2), torch.zeros(2, 1, 2, 2)], "one N and K"),
        ([torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)], "one N and K"),
        ([torch.zeros(1, 2, 2)], "one N and K"),
    ],
)
def test_combine_layers_wrong_input(layers, message):
    with pytest.raises(ValueError, match=f"raw_maps: .*{message}"):
        combine_layers(layers)


def test_upsample_wrong_input():
    with pytest.raises(ValueError, match=r"maps: must be \(N, K, h, w\), not \(7, 5\)"):
        upsample(torch.zeros(7, 5), (8, 8))
    with pytest.raises(ValueError, match="size: must be positive, not 0x8"):
        upsample(torch.zeros(1, 1, 7, 5), (0, 8))


class TestCut:
    def test_the_whole_is_the_map_itself(self):
        maps = torch.rand(1, 2, 3, 4)
        assert cut(maps, WHOLE) is maps

    def test_a_ramp_stays_one(self):
        ramp = (torch.arange(20) + 0.5).expand(2, 3, 10, 20)
        part = cut(ramp, Part(bottom=0.5, right=0.8125))
        assert part.shape == (2, 3, 5, 16)
        torch.testing.assert_close(part[1, 2, 4], (torch.arange(16) + 0.5) / 16 * 16.25)
        torch.testing.assert_close(cut(ramp.mT, Part(bottom=0.8125, right=0.5)), part.mT)

    def test_a_part_from_the_middle_has_pixels_of_half_the_size(self):
        ramp = (torch.arange(20) + 0.5).expand(1, 1, 4, 20)
        part = cut(ramp, Part(left=0.25, right=0.8))
        assert part.shape == (1, 1, 4, 22)
        torch.testing.assert_close(part[0, 0, 3], 5 + (torch.arange(22) + 0.5) / 22 * 11)

    def test_beyond_the_maps_there_is_nothing(self):
        part = cut(torch.ones(1, 2, 4, 4), Part(top=-0.5, bottom=1.5, right=0.5))
        assert part.shape == (1, 2, 16, 2)
        assert part[0, 0, :, 0].tolist() == [0.0] * 4 + [1.0] * 8 + [0.0] * 4

    def test_less_than_a_pixel_is_one(self):
        assert cut(torch.rand(1, 1, 2, 2), Part(bottom=0.01)).shape == (1, 1, 1, 2)


def test_the_relu_comes_before_upsampling():
    # relu: [0, 4], upsampled: [0, 1, 3, 4]. The other order would give relu([-4, -2, 2, 4]) = [0, 0, 2, 4].
    result = saliency([torch.tensor([[[[-4.0, 4.0]]]])], (1, 4))
    assert result.values.tolist() == [[[[0.0, 0.25, 0.75, 1.0]]]]
    assert result.scale.item() == 4.0
    assert result.offset.item() == 0.0


def test_the_layer_s_own_size_is_plain_normalisation():
    maps = random_maps(2, 3, 7, 5)
    result, expected = saliency([maps]), normalize(maps)
    assert torch.equal(result.values, expected.values)
    assert torch.equal(result.scale, expected.scale)
    assert torch.equal(result.offset, expected.offset)


@pytest.mark.parametrize("size", [None, (28, 20)])
def test_several_layers_are_combined_and_stretched_again(size):
    layers = [random_maps(2, 3, 7, 5), random_maps(2, 3, 14, 10)]
    mean = combine_layers(layers, size)
    result = saliency(layers, size)
    assert torch.equal(result.values, normalize(mean).values)
    assert (result.scale < 1).any()
    back = result.values * result.scale[..., None, None] + result.offset[..., None, None]
    torch.testing.assert_close(back, mean)


def test_scale_and_offset_lead_back_to_the_upsampled_map():
    maps = random_maps(2, 3, 7, 5) + 2
    result = saliency([maps], (28, 20))
    back = result.values * result.scale[..., None, None] + result.offset[..., None, None]
    torch.testing.assert_close(back, upsample(maps.relu(), (28, 20)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_interpolated_in_float32(dtype):
    maps = random_maps(2, 3, 7, 5, dtype=dtype)
    result = saliency([maps], (28, 20))
    assert result.values.dtype == torch.float32
    assert torch.equal(result.values, saliency([maps.float()], (28, 20)).values)


def test_no_layers():
    with pytest.raises(ValueError, match="raw_maps: must hold at least one"):
        saliency([])


def test_traces_with_any_batch_size():
    def graph(activations, gradients):
        result = saliency([grad_cam(activations, gradients)], (28, 20))
        return result.values, result.scale, result.offset

    traced = make_fx(graph, tracing_mode="symbolic")(random_maps(2, 8, 7, 5), random_maps(2, 3, 8, 7, 5))
    for n, k in [(5, 2), (1, 4)]:
        case = random_maps(n, 8, 7, 5), random_maps(n, k, 8, 7, 5)
        torch.testing.assert_close(traced(*case), graph(*case))
