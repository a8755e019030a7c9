"""Imputation against a dense solution of the same equations, and ROAD against grad-cam."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam.metrics.road import (
    NoisyLinearImputer,
    ROADLeastRelevantFirstAverage,
    ROADMostRelevantFirstAverage,
)
from torch import nn

from heatlens_server.maps.faithfulness.imputation import NOISE, impute
from heatlens_server.maps.faithfulness.perturbation import PERCENTILES, imputed, mean_change

WEIGHTS = {(0, 1): 1 / 6, (1, 0): 1 / 6, (1, 1): 1 / 12, (1, -1): 1 / 12}
OFFSETS = WEIGHTS | {(-y, -x): weight for (y, x), weight in WEIGHTS.items()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(height, width, seed=0):
    """A smooth map without equal pixels, in [0, 1]."""
    coarse = torch.rand(1, 1, 5, 5, generator=generator(seed), dtype=torch.float64)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0, 0]
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min())).float()


def dense_solution(image, removed):
    """Every removed pixel is the weighted mean of the neighbours that it has."""
    height, width = removed.shape
    known = image.double().numpy()
    matrix = np.eye(height * width)
    right = known.reshape(len(known), -1).T.copy()
    for y, x in np.argwhere(removed.numpy()):
        row = y * width + x
        inside = {at: weight for at, weight in OFFSETS.items() if 0 <= y + at[0] < height and 0 <= x + at[1] < width}
        for (dy, dx), weight in inside.items():
            matrix[row, (y + dy) * width + x + dx] = -weight / sum(inside.values())
        right[row] = 0
    return torch.from_numpy(np.linalg.solve(matrix, right).T.reshape(known.shape))


def test_the_solution_is_that_of_the_equations():
    """Holes of several kinds at once, sides that halve unevenly: each as if it were alone."""
    image = torch.randn(3, 37, 26, generator=generator())
    lone = torch.zeros(37, 26, dtype=torch.bool)
    lone[20, 3] = True
    all_but_one = ~lone
    smooth = blobs(37, 26)
    random = torch.rand(37, 26, generator=generator(1))
    removed = torch.stack([smooth > 0.5, smooth <= 0.3, random > 0.2, lone, all_but_one, torch.zeros_like(lone)])
    found = impute(image, removed, noise=0)
    assert found.dtype == torch.float32
    for one, hole in zip(found, removed, strict=True):
        torch.testing.assert_close(one.double(), dense_solution(image, hole), atol=1e-3, rtol=0)
        assert torch.equal(one[:, ~hole], image[:, ~hole])
        torch.testing.assert_close(impute(image, hole[None], noise=0)[0], one, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(1, 9), (3, 3), (2, 40)])
def test_small_images(size):
    image = torch.randn(2, *size, generator=generator())
    hole = torch.rand(size, generator=generator(3)) > 0.4
    hole[0, 0] = False
    torch.testing.assert_close(
        impute(image, hole[None], noise=0)[0].double(), dense_solution(image, hole), atol=1e-3, rtol=0
    )


def test_values_of_removed_pixels_do_not_matter():
    image = torch.randn(3, 16, 16, generator=generator())
    hole = blobs(16, 16) > 0.5
    other = torch.where(hole, torch.full_like(image, torch.nan), image)
    assert torch.equal(impute(image, hole[None]), impute(other, hole[None]))


def test_noise_is_the_same_every_time_and_only_where_imputed():
    image = torch.randn(3, 64, 64, generator=generator())
    hole = blobs(64, 64) > 0.3
    noisy, clean = impute(image, hole[None])[0], impute(image, hole[None], noise=0)[0]
    assert torch.equal(noisy, impute(image, hole[None])[0])
    difference = (noisy - clean)[:, hole]
    assert float(difference.std()) == pytest.approx(NOISE, rel=0.1)
    assert torch.equal(noisy[:, ~hole], clean[:, ~hole])


# grad-cam hands torch tensors to numpy functions.
their_habit = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")


@their_habit
def test_imputes_as_grad_cam_does():
    image = torch.randn(3, 32, 32, generator=generator())
    saliency = blobs(32, 32)
    threshold = np.percentile(saliency.numpy(), PERCENTILES[3])
    theirs = NoisyLinearImputer(noise=0)(image, (saliency < threshold).float())
    ours = imputed(image, saliency, 3, 4, most_first=True)[0]
    # Ours has its noise; 5 standard deviations.
    torch.testing.assert_close(ours, theirs, atol=5 * NOISE, rtol=0)
    assert torch.equal(ours == image, theirs == image)


@their_habit
@pytest.mark.parametrize("most_first", [True, False])
def test_road_agrees_with_grad_cam(most_first):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
        ).eval()
        # Far from indifferent.
        network[-1].weight.data *= 10
        image = torch.randn(1, 3, 32, 32) * 3
        saliency = blobs(32, 32, seed=2)
        metric = (ROADMostRelevantFirstAverage if most_first else ROADLeastRelevantFirstAverage)(list(PERCENTILES))
        theirs = float(metric(image, saliency[None].numpy(), [lambda output: output.softmax(-1)[3]], network)[0])
    with torch.no_grad():
        changed = network(imputed(image[0], saliency, 0, len(PERCENTILES), most_first=most_first))
        ours = mean_change(changed.softmax(-1)[:, 3].tolist(), float(network(image).softmax(-1)[0, 3]))
    assert abs(ours) > 0.05
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_a_map_of_mostly_zeros_keeps_as_many_pixels_as_any():
    """grad-cam's threshold is zero here, which removes the whole image and leaves nothing to impute from."""
    saliency = torch.zeros(20, 20)
    saliency[8:12, 8:12] = blobs(4, 4)
    image = torch.randn(3, 20, 20, generator=generator())
    changed = imputed(image, saliency, 0, len(PERCENTILES), most_first=True)
    kept = (changed == image).all(1).sum((-2, -1))
    assert kept.tolist() == [int(np.ceil(399 * percent / 100)) for percent in PERCENTILES]
    assert bool(changed.isfinite().all())
