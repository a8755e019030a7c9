"""Transformers: the layer and the grid that are found, the places that they stand for, and maps against `grad-cam`."""

import copy
import dataclasses

import numpy as np
import pytest
import pytorch_grad_cam as reference
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from heatlens_server.backends.torch.cam.grid import MAP, Grid, Layout, from_map, to_map
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.layers import discover
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from loaded_models import MEAN, STD, hook_count, loaded, noise
from tiny_transformers import CLASS_COUNT, NETWORKS, transformer

LAST = Grid(Layout.CHANNELS_LAST)


def tokens(prefix, height=4, width=4):
    return Grid(Layout.TOKENS, prefix, height, width)


def blocks(*suffixes, of="blocks.{}", norm=""):
    return tuple(of.format(number) + norm for number in suffixes)


FOUND = {
    "vit": (blocks(3, 2, 1, 0, norm=".norm1"), tokens(1)),
    "vit-shallow": (blocks(1, 0, norm=".norm1"), tokens(1)),
    "vit-torchvision": (blocks(3, 2, 1, 0, of="encoder.layers.encoder_layer_{}", norm=".ln_1"), tokens(1)),
    "vit-registers": (blocks(3, 2, 1, 0, norm=".norm1"), tokens(5)),
    "vit-averaged": (("blocks", *blocks(2, 1, 0)), tokens(4)),
    "vit-pooled": (("norm", *blocks(2, 1, 0)), tokens(0)),
    "vit-oblong": (blocks(3, 2, 1, 0, norm=".norm1"), tokens(1, 4, 6)),
    "deit-distilled": (blocks(3, 2, 1, 0, norm=".norm1"), tokens(2)),
    "beit": (blocks(3, 2, 1, 0), tokens(1)),
    "eva": (blocks(3, 2, 1, 0), tokens(1)),
    "swin": (("norm", "layers.2", "layers.1", "layers.0"), LAST),
    "swin-v2": (("norm", "layers.2", "layers.1", "layers.0"), LAST),
    "swin-torchvision": (("permute", "features.3", "features.1"), MAP),
    "maxvit-torchvision": (("blocks.1", "blocks.0", "stem"), MAP),
    "convnext": (("stages", "stages.2", "stages.1", "stem"), MAP),
    "hiera": (("blocks.4", "patch_embed.proj"), tokens(0, 2, 2)),
}


def size_of(name):
    return (64, 96) if name == "vit-oblong" else (NETWORKS[name][0],) * 2


@pytest.fixture(scope="module", params=FOUND)
def network(request):
    return request.param, transformer(request.param)


def hand_made(output, grid):
    """The layer's output as a map, place by place."""
    if grid.layout is Layout.MAP:
        return output
    if grid.layout is Layout.CHANNELS_LAST:
        return torch.stack([output[..., channel] for channel in range(output.shape[3])], dim=1)
    found = torch.zeros(output.shape[0], output.shape[2], grid.height, grid.width)
    for row in range(grid.height):
        for column in range(grid.width):
            found[:, :, row, column] = output[:, grid.prefix + row * grid.width + column]
    return found


def outputs_of(module, layers, images):
    kept = {}
    handles = [
        module.get_submodule(layer).register_forward_hook(
            lambda _module, _args, output, layer=layer: kept.__setitem__(layer, output.detach().clone())
        )
        for layer in layers
    ]
    with torch.no_grad():
        module(images)
    for handle in handles:
        handle.remove()
    return kept


def test_layers_and_grids(network):
    name, module = network
    found = discover(module, size_of(name))
    layers, grid = FOUND[name]
    assert found.layers[: len(layers)] == layers
    assert found.grids[layers[0]] == grid
    assert tuple(found.grids) == found.layers
    assert found.class_count == CLASS_COUNT
    assert hook_count(module) == 0


@pytest.mark.parametrize("name", FOUND)
def test_grids_are_the_images_places(name):
    """A changed patch of the image changes its own place of the map most: through residual connections."""
    module = transformer(name, redrawn=False)
    found = discover(module, size_of(name))
    images = torch.randn(1, 3, *size_of(name), generator=torch.Generator().manual_seed(1))
    before = outputs_of(module, found.layers, images)
    for down, right in ((0, 1), (1, 0), (1, 1)):
        changed = images.clone()
        height, width = images.shape[2] // 2, images.shape[3] // 2
        changed[:, :, down * height :, right * width :][:, :, :height, :width] += 1.0
        after = outputs_of(module, found.layers, changed)
        for layer, grid in found.grids.items():
            a, b = to_map(before[layer], grid), to_map(after[layer], grid)
            assert torch.equal(a, hand_made(before[layer], grid))
            difference = nn.functional.adaptive_avg_pool2d((b - a).norm(dim=1), (2, 2))[0]
            assert divmod(int(difference.argmax()), 2) == (down, right), layer
            # And back again, for another number of rows too.
            if grid.layout is not Layout.MAP:
                assert torch.equal(from_map(a, before[layer], grid), before[layer])
                assert from_map(torch.cat([a, b]), before[layer], grid).shape == (2, *before[layer].shape[1:])


def test_a_head_of_zeros_changes_nothing():
    module = transformer("vit")
    nn.init.zeros_(module.head.weight)
    assert discover(module, (64, 64)).layers == FOUND["vit"][0]


def test_wanted_layers_are_read_as_they_are_found_or_as_configured():
    module = transformer("deit-distilled")
    found = discover(module, (64, 64), ["blocks.1", "patch_embed.proj"])
    assert found.layers == ("blocks.1", "patch_embed.proj")
    assert found.grids == {"blocks.1": tokens(2), "patch_embed.proj": MAP}
    given = {"blocks.1": tokens(2, 2, 8)}
    assert discover(module, (64, 64), ["blocks.1"], grids=given).grids == given


@pytest.mark.parametrize(
    ("layer", "grid", "message"),
    [
        ("blocks.1", tokens(1), r"grids: module 'blocks.1' returns \(1, 18, 32\), not \(1, 17, C\)"),
        ("blocks.1", MAP, r"returns \(1, 18, 32\), not \(1, C, h, w\)"),
        ("blocks.1", LAST, r"returns \(1, 18, 32\), not \(1, h, w, C\)"),
        ("norm", None, "scores do not depend on the places of the image in what module 'norm' returns"),
        ("head", None, r"returns \(1, 7\), not a feature map .* or tokens that fit"),
    ],
)
def test_unfit_wanted_layers(layer, grid, message):
    with pytest.raises(ModelLoadError, match=message):
        discover(transformer("deit-distilled"), (64, 64), [layer], grids={layer: grid} if grid else None)


class Odd(nn.Module):
    """Tokens in no form of the image's behind a convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 8, 8)
        self.mix = nn.Linear(64, 45)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.mix(self.stem(x).flatten(2)).transpose(1, 2)).mean(1))


def test_tokens_that_fit_no_grid_are_refused_unless_told_how_to_read_them():
    module = Odd().eval()
    with pytest.raises(ModelLoadError, match=r"tokens that fit no grid.*'stem'.*`grids`"):
        discover(module, (64, 64))
    grid = tokens(0, 5, 9)
    assert discover(module, (64, 64), ["norm"], grids={"norm": grid}).grids == {"norm": grid}


def test_a_network_without_maps():
    """Patches cut by hand: the grid is the one that divides the image."""

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3 * 64, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            patches = nn.functional.unfold(x, 8, stride=8).transpose(1, 2)
            return self.head(self.embed(patches).mean(1))

    found = discover(Cut().eval(), (32, 48))
    assert (found.layers, found.grids) == (("embed",), {"embed": tokens(0, 4, 6)})


@pytest.mark.parametrize("name", ["vit", "deit-distilled", "swin", "beit"])
def test_grad_cam_is_that_of_the_package(name):
    module = transformer(name)
    px = NETWORKS[name][0]
    found = discover(module, (px, px))
    (layer, *_), grid = FOUND[name]

    def reshape(output):
        # As in the package's tutorials on ViT and Swin.
        if grid.layout is Layout.CHANNELS_LAST:
            return output.transpose(2, 3).transpose(1, 2)
        result = output[:, grid.prefix :, :].reshape(output.size(0), grid.height, grid.width, output.size(2))
        return result.transpose(2, 3).transpose(1, 2)

    images = noise(2, px)
    values = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    inputs = torch.from_numpy(values.transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        class_ids = module(inputs).topk(2).indices.diagonal().tolist()
    own = copy.deepcopy(module)
    with reference.GradCAM(own, [own.get_submodule(layer)], reshape_transform=reshape) as explainer:
        expected = explainer(inputs, [ClassifierOutputTarget(class_id) for class_id in class_ids])
    assert (expected.max(axis=(1, 2)) - expected.min(axis=(1, 2)) > 0.99).all()
    model = dataclasses.replace(loaded(module, found.layers, class_count=CLASS_COUNT, px=px), grids=found.grids)
    engine = TorchEngine(model, device="cpu")
    try:
        results = engine.explain(
            images, [ClassIds((class_id,)) for class_id in class_ids], MapSpec(Method.GRAD_CAM, (layer,), upsample=True)
        )
    finally:
        engine.close()
    actual = np.stack([result.maps[0] for result in results])
    print(f"{name}: {np.abs(actual - expected).max():.1e}")  # `pytest -rP` shows the figures of docs/transformers.md
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
