"""Enlarging and combining outside of graphs, against the functions of cam/ that define them."""

import numpy as np
import pytest
import torch

from heatlens_server.backends.onnx.map_finish import Maps, combine, enlarge, finish
from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.core.methods import Aggregation

SIZES = [(7, 7), (14, 9), (1, 5), (28, 28)]


def raw_maps(*sizes: tuple[int, int], images: int = 2, classes: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, classes, *size, generator=generator) * 10**i for i, size in enumerate(sizes)]


def as_graphs_return(raws: list[torch.Tensor]) -> list[Maps]:
    finished = [saliency([raw]) for raw in raws]
    return [Maps(maps.values.numpy(), maps.scale.numpy(), maps.offset.numpy()) for maps in finished]


def judged(raws: list[torch.Tensor], size: tuple[int, int] | None, aggregation: Aggregation = Aggregation.MEAN):
    """In float64: torch rounds its sampling positions to float32, which alone is 1.5e-6 off for some sizes."""
    return saliency([raw.double() for raw in raws], size, aggregation)


def assert_equal(maps: Maps, expected) -> None:
    assert maps.values.dtype == maps.scales.dtype == maps.offsets.dtype == np.float32
    np.testing.assert_allclose(maps.values, expected.values.numpy(), atol=1e-6)
    np.testing.assert_allclose(maps.scales, expected.scale.numpy(), rtol=1e-6)
    np.testing.assert_allclose(maps.offsets, expected.offset.numpy(), rtol=1e-6, atol=1e-6)
    assert maps.values.max() == 1.0


@pytest.mark.parametrize("size", [None, (64, 64), (224, 200), (7, 7), (3, 4)])
@pytest.mark.parametrize("of_layer", SIZES)
def test_one_layer_is_what_saliency_makes_of_it(of_layer, size):
    raws = raw_maps(of_layer)
    assert_equal(finish(as_graphs_return(raws), size), judged(raws, size))


@pytest.mark.parametrize("size", [None, (64, 64), (224, 200)])
@pytest.mark.parametrize("layers", [SIZES[:2], SIZES, SIZES[::-1]])
@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_several_layers_are_what_saliency_makes_of_them(layers, size, aggregation):
    raws = raw_maps(*layers)
    assert_equal(finish(as_graphs_return(raws), size, aggregation), judged(raws, size, aggregation))


def test_a_positive_map_keeps_its_offset():
    raws = [raw.abs() + 5 for raw in raw_maps((7, 7))]
    enlarged = enlarge(*as_graphs_return(raws), (56, 56))
    assert enlarged.offsets.min() >= 5
    expected = torch.nn.functional.interpolate(raws[0], (56, 56), mode="bilinear").numpy()
    rebuilt = enlarged.values * enlarged.scales[..., None, None] + enlarged.offsets[..., None, None]
    np.testing.assert_allclose(rebuilt, expected, rtol=1e-5)


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_flat_maps_stay_zero(level):
    flat = Maps(np.zeros((1, 1, 7, 7), np.float32), np.zeros((1, 1), np.float32), np.full((1, 1), level, np.float32))
    enlarged = enlarge(flat, (14, 14))
    assert not enlarged.values.any()
    assert enlarged.scales == 0
    assert enlarged.offsets == level
    for aggregation in Aggregation:
        both = combine([flat, flat], (14, 14), aggregation)
        assert not both.values.any()
        assert both.scales == both.offsets == 0


def test_a_map_that_is_not_finite_is_not_hidden_and_harms_no_other():
    (raw,) = raw_maps((7, 7))
    raw[0, 1, 2, 3] = float("nan")
    raw[1, 0, 0, 0] = float("inf")
    (maps,) = as_graphs_return([raw])
    several = [combine([maps, maps], (28, 28), aggregation) for aggregation in Aggregation]
    for result in (enlarge(maps, (28, 28)), *several):
        finite = np.isfinite(result.values).all(axis=(2, 3))
        np.testing.assert_array_equal(finite, [[True, False, True], [False, True, True]])


def test_inputs_are_left_as_they_were():
    (maps,) = as_graphs_return(raw_maps((7, 7)))
    before = maps.values.copy()
    enlarge(maps, (14, 14))
    combine([maps, maps], (7, 7))
    np.testing.assert_array_equal(maps.values, before)
