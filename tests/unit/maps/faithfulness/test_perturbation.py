"""Deletion and insertion against a reference that takes pixels one by one."""

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve, gaussian_filter

from heatlens_server.maps.faithfulness.perturbation import STEPS, area, blurred, deleted, inserted, places

HEIGHT, WIDTH = 17, 23


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def image():
    return torch.randn(3, HEIGHT, WIDTH, generator=generator())


@pytest.fixture
def saliency():
    """With many equal pixels."""
    return (torch.rand(HEIGHT, WIDTH, generator=generator(1)) * 10).floor() / 10


def in_order(saliency):
    """Coordinates, most salient first; equal ones row by row."""
    pixels = [(y, x) for y in range(HEIGHT) for x in range(WIDTH)]
    return sorted(pixels, key=lambda at: (-float(saliency[at]), at))


def test_places_are_the_order_with_ties_by_index(saliency):
    found = places(saliency)
    assert [int(found[at]) for at in in_order(saliency)] == list(range(HEIGHT * WIDTH))
    least_first = places(torch.tensor([[0.5, 0.0], [0.0, 0.5]]), most_first=False)
    assert least_first.tolist() == [[2, 0], [1, 3]]


def test_a_flat_map_goes_row_by_row():
    flat = torch.zeros(2, 3)
    assert places(flat).tolist() == places(flat, most_first=False).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("insertion", [False, True])
def test_pixels_go_and_come_in_order(image, saliency, insertion):
    begin, end = (blurred(image), image) if insertion else (image, torch.zeros_like(image))
    changed = begin.clone()
    states = [changed.clone()]
    for at in in_order(saliency):
        changed[:, *at] = end[:, *at]
        states.append(changed.clone())
    expected = torch.stack([states[k * HEIGHT * WIDTH // STEPS] for k in range(STEPS + 1)])
    made = (inserted if insertion else deleted)(image, saliency, 0, STEPS + 1)
    assert torch.equal(made, expected)
    assert torch.equal((inserted if insertion else deleted)(image, saliency, 5, 9), expected[5:9])


def test_the_blur_is_that_of_the_authors_code(image):
    one = np.zeros((11, 11))
    one[5, 5] = 1
    kernel = gaussian_filter(one, 5)
    expected = np.stack([convolve(plane, kernel, mode="constant") for plane in image.double().numpy()])
    np.testing.assert_allclose(blurred(image).numpy(), expected, atol=1e-6)


def test_area_is_the_trapezoidal_rule():
    values = torch.rand(STEPS + 1, generator=generator()).double()
    assert area(values.tolist()) == pytest.approx(float(torch.trapezoid(values, dx=1 / STEPS)), abs=1e-12)
    assert area([0.3, 0.3]) == pytest.approx(0.3)
