import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from heatlens_server.backends.torch.cam.methods import grad_cam
from heatlens_server.backends.torch.cam.normalize import normalize
from heatlens_server.backends.torch.cam.resize import combine_layers, upsample
from heatlens_server.backends.torch.cam.saliency import saliency


def random_maps(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


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
