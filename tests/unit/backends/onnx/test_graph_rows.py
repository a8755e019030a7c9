"""Targets to rows and rows to results, against a graph that is plain numpy: no torch, no onnxruntime."""

import numpy as np
import pytest
import torch

from heatlens_server.backends.onnx.graph_rows import (
    GraphRows,
    class_index,
    explain_batch,
    normalisation_table,
    normalised_planes,
    planes,
    run_wanted,
)
from heatlens_server.backends.onnx.map_finish import Maps
from heatlens_server.core.methods import ABSENT, RANKED
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.core.targets import ClassIds, TopK
from heatlens_server.imaging.preprocess import normalise
from heatlens_server.maps import targets
from loaded_models import MEAN, STD, noise

CLASSES = 12


def image(number: int) -> np.ndarray:
    return np.full((4, 4, 3), number, np.uint8)


def logits_of(images: np.ndarray) -> np.ndarray:
    """Some equal ones in every row."""
    numbers = images[:, 0, 0, 0].astype(np.float32)
    return np.floor(np.abs(np.sin(numbers[:, None] + np.arange(CLASSES, dtype=np.float32))) * 4).astype(np.float32)


class Graph:
    """A graph whose map of class c on image i is the constant picture [c, i], so that a mix-up shows."""

    def __init__(self, classes: int | None, size: int = 2) -> None:
        self.classes = classes
        self.size = size
        self.rows: list[int] = []

    def __call__(self, images: np.ndarray, index: np.ndarray) -> GraphRows:
        assert index.dtype == np.int64
        assert index.flags.c_contiguous
        assert self.classes in {None, index.shape[1]}
        assert len(images) == len(index)
        self.rows.append(len(images))
        logits = logits_of(images)
        ids = targets.resolve(torch.from_numpy(logits), torch.from_numpy(index)).numpy()
        numbers = np.broadcast_to(images[:, 0, 0, 0, None], ids.shape).astype(np.float32)
        values = np.stack([ids, numbers], axis=2)[:, :, :, None].repeat(self.size, axis=3).astype(np.float32)
        return GraphRows(logits, ids, Maps(values, numbers + ids.astype(np.float32), numbers - ids.astype(np.float32)))


TARGETS = [TopK(1), ClassIds((7, 3, 0)), TopK(5), ClassIds((11,)), TopK(CLASSES)]
IMAGES = np.stack([image(n + 1) for n in range(len(TARGETS))])


def test_short_rows_are_padded_with_absent():
    index = class_index([TopK(2), ClassIds((5, 0, 1)), TopK(1)])
    assert index.dtype == np.int64
    np.testing.assert_array_equal(index, [[RANKED, RANKED, ABSENT], [5, 0, 1], [RANKED, ABSENT, ABSENT]])


@pytest.mark.parametrize("classes", [None, 1, 2, 3, 5, CLASSES])
def test_every_image_gets_its_own_classes_whatever_the_graph_takes(classes):
    graph = Graph(classes)
    results = explain_batch([graph], IMAGES, TARGETS, classes=classes, size=None)
    order = np.argsort(-logits_of(IMAGES), axis=1, kind="stable")
    expected_ids = [tuple(order[0, :1]), (7, 3, 0), tuple(order[2, :5]), (11,), tuple(order[4])]
    for n, (result, ids) in enumerate(zip(results, expected_ids, strict=True)):
        assert result.class_ids == ids
        assert all(type(class_id) is int for class_id in result.class_ids)
        np.testing.assert_array_equal(result.logits, logits_of(IMAGES)[n])
        np.testing.assert_array_equal(result.maps[:, 0, 0], ids)
        np.testing.assert_array_equal(result.maps[:, 1, 0], n + 1)
        np.testing.assert_array_equal(result.scales, n + 1 + np.array(ids))
        np.testing.assert_array_equal(result.offsets, n + 1 - np.array(ids))
        assert result.maps.dtype == result.scales.dtype == result.offsets.dtype == np.float32


def test_images_run_once_and_only_those_with_more_classes_again():
    graph = Graph(2)
    run_wanted(graph, IMAGES, class_index(TARGETS), 2)
    # 3 classes take one further row of 2, 5 take two, 12 take five.
    assert graph.rows == [5, 8]
    graph = Graph(1)
    run_wanted(graph, IMAGES, class_index([TopK(1)] * 5), 1)
    assert graph.rows == [5]


def test_further_rows_run_a_batch_at_a_time():
    graph = Graph(1)
    many = np.concatenate([IMAGES] * 4)
    run_wanted(graph, many, class_index([TopK(4)] * 20), 1)
    assert graph.rows == [20, 20, 20, 20]
    graph = Graph(1)
    run_wanted(graph, IMAGES[:1], class_index([TopK(12)]), 1)
    assert graph.rows == [1, 8, 3]


def test_layers_explain_the_classes_of_the_first_one():
    """A second graph that ranks otherwise does not get to choose."""
    asked = []

    def other(images: np.ndarray, index: np.ndarray) -> GraphRows:
        asked.append(index)
        return Graph(None, size=4)(images, index)

    results = explain_batch([Graph(None), other], IMAGES, TARGETS, classes=None, size=None)
    assert not (asked[0] == RANKED).any()
    assert [len(result.class_ids) for result in results] == [1, 3, 5, 1, 12]
    assert results[0].maps.shape == (1, 2, 4)


def images(count: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    pixels[0, 0, :, :] = np.arange(15).reshape(5, 3) * 17
    return pixels


@pytest.mark.parametrize("make", [lambda: images(1), lambda: images(3), lambda: images(4)[::2], lambda: noise(2)])
def test_planes_are_a_transposition(make):
    separated = planes(make())
    assert separated.flags.c_contiguous
    np.testing.assert_array_equal(separated, make().transpose(0, 3, 1, 2))


def test_looking_levels_up_is_normalising_to_the_bit():
    spec = PreprocessSpec(resize_px=8, crop_px=(8, 8), mean=MEAN, std=STD, interpolation=Interpolation.BILINEAR)
    every_level = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), 3, axis=3)
    for pixels in (every_level, images(3)):
        expected = np.stack([normalise(image, spec) for image in pixels])
        np.testing.assert_array_equal(normalised_planes(pixels, spec, normalisation_table(spec)), expected)
