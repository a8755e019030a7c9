"""Sparseness and rank correlation."""

import pytest
import torch
from scipy.stats import spearmanr

from heatlens_server.maps.faithfulness.map_statistics import gini, rank_correlation


def test_gini_of_one_pixel_and_of_all():
    one_hot = torch.zeros(8, 8)
    one_hot[3, 4] = 0.7
    assert gini(one_hot) == pytest.approx(1 - 1 / 64, abs=1e-12)
    assert gini(torch.full((8, 8), 0.3)) == pytest.approx(0, abs=1e-6)
    assert gini(torch.zeros(8, 8)) == 0


def test_gini_is_the_mean_difference():
    """Its other definition: half the mean absolute difference of two pixels, over their mean."""
    saliency = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)).double()
    pixels = saliency.flatten()
    expected = (pixels[:, None] - pixels).abs().mean() / (2 * pixels.mean())
    assert gini(saliency) == pytest.approx(float(expected), abs=1e-12)
    assert gini(saliency * 3) == pytest.approx(gini(saliency), abs=1e-12)
    assert gini(saliency**4) > gini(saliency)


def test_rank_correlation_is_spearmans_with_ties():
    generator = torch.Generator().manual_seed(0)
    first = (torch.rand(12, 12, generator=generator) * 8).floor()
    second = first + (torch.rand(12, 12, generator=generator) * 8).floor()
    assert rank_correlation(first, second) == pytest.approx(
        spearmanr(first.flatten(), second.flatten()).statistic, abs=1e-12
    )
    assert rank_correlation(first, first**2) == pytest.approx(1)
    assert rank_correlation(first, -first) == pytest.approx(-1)


def test_rank_correlation_of_flat_maps():
    flat, other = torch.zeros(4, 4), torch.arange(16.0).reshape(4, 4)
    assert rank_correlation(flat, other) == rank_correlation(other, flat) == 0
    assert rank_correlation(flat, flat + 1) == 1


def test_maps_of_different_sizes():
    with pytest.raises(ValueError, match=r"second: must be \(2, 2\), not \(4, 4\)"):
        rank_correlation(torch.zeros(2, 2), torch.zeros(4, 4))
