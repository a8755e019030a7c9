"""Weights in another order: all of them, none lost, always the same."""

import numpy as np

import tiny_models
from heatlens_server.backends.onnx.shuffle import shuffled
from loaded_models import loaded
from onnx_files import as_file


def test_every_weight_is_shuffled_and_always_alike():
    rng = np.random.default_rng(1)
    weights = {
        "kernel": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "bias": rng.normal(size=40),
        "quantised": rng.integers(-100, 100, (8, 8)).astype(np.int8),
        "sizes": np.arange(30),
        "scale": np.float32(3.0),
    }
    before = {name: array.copy() for name, array in weights.items()}
    after, again = shuffled(weights), shuffled(weights)
    assert list(after) == list(before)
    for name, array in before.items():
        np.testing.assert_array_equal(weights[name], array)
        np.testing.assert_array_equal(again[name], after[name])
        assert (after[name].shape, after[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(np.sort(after[name], axis=None), np.sort(array, axis=None))
        assert np.array_equal(after[name], array) == (name in {"sizes", "scale"})


def test_a_twin_has_other_scores_and_the_same_layers():
    network = as_file(loaded(tiny_models.tiny_mlp(), ("body", "stem")))
    twin = network.twin()
    assert twin.info == network.info
    assert list(twin.passes(("body", "stem")).layers) == ["body", "stem"]
    assert twin.tail("stem").kept == network.tail("stem").kept
