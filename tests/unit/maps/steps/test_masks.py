"""Masks over images and layers, in every layout that a layer may have."""

import pytest
import torch
import torch.nn.functional as F

from heatlens_server.backends.torch.cam.grid import MAP, Grid, LayerOutput, Layout, from_levels, levels_of, to_map
from heatlens_server.maps.steps import masks as of_levels
from heatlens_server.maps.steps.masks import channel_masks, constant_channels, empty_channels, place_masks

CHANNELS, HEIGHT, WIDTH, PREFIX = 5, 3, 4, 2
SHAPES = {
    MAP: (1, CHANNELS, HEIGHT, WIDTH),
    Grid(Layout.CHANNELS_LAST): (1, HEIGHT, WIDTH, CHANNELS),
    Grid(Layout.TOKENS, PREFIX, HEIGHT, WIDTH): (1, PREFIX + HEIGHT * WIDTH, CHANNELS),
}
FORMS = [pytest.param(grid, shape, id=grid.layout.value) for grid, shape in SHAPES.items()]
PYRAMID = Grid(Layout.PYRAMID)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pyramid() -> dict[str, torch.Tensor]:
    return {"fine": drawn(1, 3, 4, 8), "coarse": drawn(1, 2, 2, 4, seed=1)}


def test_a_mask_is_its_channel_upsampled_and_stretched():
    features = drawn(1, CHANNELS, HEIGHT, WIDTH)
    masks = channel_masks(features, (9, 16))
    for channel in range(CHANNELS):
        upsampled = F.interpolate(features[:, channel : channel + 1], size=(9, 16), mode="bilinear")[0, 0]
        spread = upsampled.max() - upsampled.min()
        torch.testing.assert_close(masks[channel, 0], (upsampled - upsampled.min()) / spread)
    assert masks.amin(dim=(1, 2, 3)).eq(0).all()
    assert masks.amax(dim=(1, 2, 3)).eq(1).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3, 1e30, 7e-42])
def test_a_constant_channel_has_no_mask_whatever_upsampling_rounds_it_to(value):
    features = drawn(1, 3, 7, 7)
    features[0, 1] = value
    assert constant_channels(features).tolist() == [False, True, False]
    masks = channel_masks(features, (61, 45))
    assert masks[1].eq(0).all()
    torch.testing.assert_close(masks[::2], channel_masks(features[:, ::2], (61, 45)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_are_made_in_float32(dtype):
    masks = channel_masks(drawn(1, 3, 4, 4).to(dtype), (32, 32))
    assert masks.dtype is torch.float32
    assert len(masks[0].unique()) > 256  # more than bfloat16 has between 0.5 and 1


def test_places_are_numbered_row_by_row():
    masks = place_masks(torch.tensor([0, 5, 11]), HEIGHT, WIDTH, neighbours=False)
    assert masks.sum() == 3
    assert masks[0, 0, 0] == masks[1, 1, 1] == masks[2, 2, 3] == 1


def test_neighbours_beyond_the_edge_are_nothing():
    corner, middle = place_masks(torch.tensor([0, 5]), HEIGHT, WIDTH, neighbours=True)
    expected = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    torch.testing.assert_close(middle[:, :3], expected, rtol=0, atol=0)
    torch.testing.assert_close(corner[:2, :2], expected[1:, 1:], rtol=0, atol=0)
    assert corner.sum() == 9 / 16


def without_channels(output: LayerOutput, grid: Grid, channels: torch.Tensor) -> LayerOutput:
    return from_levels(of_levels.without_channels(levels_of(output, grid), channels), output, grid)


def places_alone(output: LayerOutput, grid: Grid, masks: torch.Tensor) -> LayerOutput:
    return from_levels(of_levels.places_alone(levels_of(output, grid), masks), output, grid)


@pytest.mark.parametrize(("grid", "shape"), FORMS)
def test_one_channel_is_taken_out_of_each_row(grid, shape):
    output = drawn(*shape)
    changed = without_channels(output, grid, torch.tensor([3, 0]))
    for row, channel in enumerate((3, 0)):
        expected = to_map(output, grid).clone()
        expected[:, channel] = 0
        torch.testing.assert_close(to_map(changed, grid)[row], expected[0], rtol=0, atol=0)
    if grid.prefix:
        assert changed[:, : grid.prefix].eq(output[:, : grid.prefix]).all()


@pytest.mark.parametrize(("grid", "shape"), FORMS)
def test_one_place_is_left_in_each_row(grid, shape):
    output = drawn(*shape)
    masks = place_masks(torch.tensor([6, 1]), HEIGHT, WIDTH, neighbours=False)
    changed = places_alone(output, grid, masks)
    torch.testing.assert_close(to_map(changed, grid), to_map(output, grid) * masks[:, None], rtol=0, atol=0)
    if grid.prefix:
        assert changed[:, : grid.prefix].eq(output[:, : grid.prefix]).all()


def test_a_channel_of_a_pyramid_is_one_levels():
    output = pyramid()
    changed = without_channels(output, PYRAMID, torch.tensor([1, 4]))
    assert changed["fine"][0, 1].eq(0).all()
    assert changed["coarse"][1, 1].eq(0).all()
    assert changed["coarse"][0].eq(output["coarse"][0]).all()
    assert changed["fine"][1].eq(output["fine"][0]).all()
    for row, channel in enumerate((1, 4)):
        # The channel's place in the map is where its absence shows.
        fallen = (to_map({k: v[row : row + 1] for k, v in changed.items()}, PYRAMID) != to_map(output, PYRAMID))[0]
        assert fallen.flatten(1).any(dim=1).nonzero().tolist() == [[channel]]


def test_every_place_of_a_pyramid_belongs_to_one_place_of_the_mask():
    output = pyramid()
    changed = places_alone(output, PYRAMID, place_masks(torch.arange(8), 2, 4, neighbours=False))
    for name, level in output.items():
        torch.testing.assert_close(changed[name].sum(dim=0, keepdim=True), level, rtol=0, atol=0)
    assert changed["fine"][6, 0].nonzero().tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]


def test_empty_channels_are_found_in_every_level():
    output = pyramid()
    output["fine"][0, 2] = 0
    output["coarse"][0, 0] = 0
    assert empty_channels(levels_of(output, PYRAMID)).tolist() == [False, False, True, True, False]
