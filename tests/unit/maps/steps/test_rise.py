"""RISE, by its paper's formula in a loop, and on networks whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.targets import ClassIds
from heatlens_server.maps.steps.drive import STEPPERS
from heatlens_server.maps.steps.rise import RISE_KEPT, RISE_MASKS, random_masks
from loaded_models import noise
from step_jobs import drain, job, placed

SIZE_PX = (48, 64)


class Corner(nn.Module):
    """Two scores: the mean of the image's upper left quarter, and a constant."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 1, 1)
        nn.init.constant_(self.body.weight, 1 / 3)
        nn.init.zeros_(self.body.bias)
        self.offset = offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grey = self.body(x)[:, :, : x.shape[2] // 2, : x.shape[3] // 2].mean((1, 2, 3))
        return torch.stack([grey + self.offset, torch.ones_like(grey)], 1)


def raw(module: nn.Module, target: ClassIds, **options) -> np.ndarray:
    white = np.full((*SIZE_PX, 3), 255, np.uint8)
    maps, _steps = drain(STEPPERS[Method.RISE](job(placed(module, "body"), white, target, rows=16, **options)))
    return maps[0].numpy()


def test_masks_keep_half_of_the_image_each_in_its_own_way():
    masks = random_masks(range(200), SIZE_PX)
    assert masks.shape == (200, 1, *SIZE_PX)
    assert (masks.min(), masks.max()) == (0.0, 1.0)
    np.testing.assert_allclose(masks.mean(0), RISE_KEPT, atol=0.15)
    assert len(np.unique(masks.reshape(200, -1), axis=0)) == 200
    np.testing.assert_array_equal(random_masks([7, 3], SIZE_PX), masks[[7, 3]])


def test_the_formula():
    module = tiny_models.tiny_mlp()
    model = placed(module, "body")
    image = job(model, noise(1)[0], ClassIds((6, 2)), rows=16, score=Score.PROBABILITY)
    found = drain(STEPPERS[Method.RISE](image))[0][0]
    masks = torch.from_numpy(random_masks(range(RISE_MASKS), image.size_px))
    with torch.no_grad():
        scores = module(image.inputs * masks).softmax(-1)[:, [6, 2]].double()
    expected = torch.einsum("nk,nhw->khw", scores - scores.mean(0), masks[:, 0].double()) / (RISE_MASKS * RISE_KEPT)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_what_is_looked_at_is_found_and_the_rest_is_not():
    of_corner, of_nothing = raw(Corner(), ClassIds((0, 1)))
    inside = of_corner[: SIZE_PX[0] // 2, : SIZE_PX[1] // 2]
    assert inside.min() > 0
    assert inside.mean() > 5 * np.abs(of_corner[SIZE_PX[0] // 2 + 8 :, SIZE_PX[1] // 2 + 8 :]).max()
    assert not of_nothing.any()


@pytest.mark.parametrize("offset", [-20.0, 20.0])
def test_scores_with_an_offset_have_the_same_map(offset):
    plain, moved = (raw(Corner(by), ClassIds((0,))) for by in (0.0, offset))
    np.testing.assert_allclose(moved, plain, atol=1e-3 * np.abs(plain).max())
