"""The measures say the same of numpy's arrays as of torch's; numpy in float64 is the judge."""

import numpy as np
import pytest
import torch

from heatlens_server.core.methods import Metric
from heatlens_server.maps.faithfulness.imputation import impute
from heatlens_server.maps.faithfulness.map_statistics import gini, rank_correlation
from heatlens_server.maps.faithfulness.measure import SANITY_CHECKS, measure
from heatlens_server.maps.faithfulness.perturbation import STEPS, blurred, deleted, imputed, inserted, places

HEIGHT, WIDTH = 29, 18


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


IMAGE = drawn(3, HEIGHT, WIDTH) - 0.5
# With many equal pixels.
SALIENCY = np.floor(10 * drawn(HEIGHT, WIDTH, seed=1)) / 10

LIBRARIES = {
    "numpy": lambda array: array.astype(np.float32) if array.dtype == np.float64 else array,
    "torch": lambda array: torch.from_numpy(array).float() if array.dtype == np.float64 else torch.from_numpy(array),
    "torch in float64": torch.from_numpy,
}


@pytest.fixture(params=LIBRARIES)
def made(request):
    return LIBRARIES[request.param]


@pytest.mark.parametrize("most_first", [True, False])
def test_places(made, most_first):
    found = places(made(SALIENCY), most_first=most_first)
    np.testing.assert_array_equal(found, places(SALIENCY, most_first=most_first))


@pytest.mark.parametrize(
    "change",
    [
        lambda image, saliency: deleted(image, saliency, 0, STEPS + 1),
        lambda image, saliency: inserted(image, saliency, 3, STEPS),
        lambda image, _: blurred(image),
        lambda image, saliency: imputed(image, saliency, 2, 7, most_first=True),
        lambda image, saliency: impute(image, saliency[None] > 0.3, noise=0),
    ],
)
def test_changed_images(made, change):
    found, expected = change(made(IMAGE), made(SALIENCY)), change(IMAGE, SALIENCY)
    assert expected.dtype == np.float64
    assert found.dtype == made(IMAGE).dtype
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_statistics(made):
    other = made(drawn(HEIGHT, WIDTH, seed=2))
    assert gini(made(SALIENCY)) == pytest.approx(gini(SALIENCY), abs=1e-6)
    expected = rank_correlation(SALIENCY, drawn(HEIGHT, WIDTH, seed=2))
    assert rank_correlation(made(SALIENCY), other) == pytest.approx(expected, abs=1e-6)


def test_all_measures(made):
    def measured(make):
        image, saliency = make(IMAGE), make(SALIENCY)

        def probability(images):
            distance = ((images - image) ** 2 * saliency).mean((1, 2, 3))
            return 1 / (1 + 10 * distance)

        others = {metric: make(drawn(HEIGHT, WIDTH, seed=3)) for metric in SANITY_CHECKS}
        steps = measure(tuple(Metric), saliency=saliency, image=image, probability=probability, rows=16, others=others)
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                return stop.value

    expected = measured(np.asarray)
    assert all(expected[metric] != 0 for metric in Metric if metric is not Metric.INCREASE)
    assert measured(made) == pytest.approx(expected, abs=1e-5)
