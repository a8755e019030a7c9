"""Seeds are the derivatives of scores, in torch and in numpy."""

import numpy as np
import pytest
import torch

from heatlens_server.backends.torch.cam.targets import class_scores
from heatlens_server.core.methods import ABSENT, RANKED, Score
from heatlens_server.maps.targets import class_scores as of_any_library
from heatlens_server.maps.targets import probabilities, resolve, seeds


def case(classes, scale):
    rng = np.random.default_rng(classes)
    logits = rng.normal(size=(4, classes)) * scale
    logits[0] = 0.0
    wanted = np.full((4, min(classes, 3)), RANKED)
    wanted[1, 0], wanted[2, 0] = ABSENT, 0
    return logits, wanted


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 1000])
def test_seeds_are_the_derivatives_of_class_scores(classes, scale, score, sigmoid):
    logits, wanted = case(classes, scale)
    ids = resolve(logits, wanted)
    leaf = torch.from_numpy(logits).requires_grad_(True)
    scores = class_scores(leaf, torch.from_numpy(ids), score, sigmoid=sigmoid)
    found = seeds(logits, ids, score, sigmoid=sigmoid)
    by_torch = seeds(torch.from_numpy(logits), torch.from_numpy(ids), score, sigmoid=sigmoid)
    np.testing.assert_allclose(by_torch.numpy(), found, atol=1e-12)
    for k in range(ids.shape[1]):
        (expected,) = torch.autograd.grad(scores[:, k].sum(), leaf, retain_graph=True)
        np.testing.assert_allclose(found[:, k], expected.numpy(), atol=1e-12)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 1000])
def test_scores_are_those_of_torch(classes, scale, score, sigmoid):
    logits, wanted = case(classes, scale)
    ids = resolve(logits, wanted)
    expected = class_scores(torch.from_numpy(logits), torch.from_numpy(ids), score, sigmoid=sigmoid).numpy()
    found = of_any_library(logits, ids, score, sigmoid=sigmoid)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)
    single = of_any_library(logits.astype(np.float32), ids, score, sigmoid=sigmoid)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5 * scale)


def test_float32_stays_float32():
    logits, wanted = case(10, 1.0)
    for score in Score:
        assert seeds(logits.astype(np.float32), resolve(logits, wanted), score).dtype == np.float32


def test_equal_logits_rank_by_class_id():
    logits = np.array([[1.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    for count in (1, 3):
        expected = [[1, 2, 0], [0, 1, 2]]
        found = resolve(logits, np.full((2, count), RANKED))
        np.testing.assert_array_equal(found, np.array(expected)[:, :count])
        by_torch = resolve(torch.from_numpy(logits), torch.full((2, count), RANKED))
        np.testing.assert_array_equal(by_torch.numpy(), found)


def test_probabilities_do_not_overflow():
    logits = np.array([[1000.0, 0.0, -1000.0]], np.float32)
    np.testing.assert_allclose(probabilities(logits), [[1.0, 0.0, 0.0]])
    np.testing.assert_allclose(probabilities(logits, sigmoid=True), [[1.0, 0.5, 0.0]])


@pytest.mark.parametrize(
    ("logits", "wanted"),
    [
        (np.zeros((2, 3, 1)), np.zeros((2, 1), np.int64)),
        (np.zeros((2, 3)), np.zeros((3, 1), np.int64)),
        (np.zeros((2, 3)), np.zeros((2, 1), np.int32)),
        (np.zeros((2, 3)), np.zeros((2, 4), np.int64)),
    ],
)
def test_what_does_not_fit_is_refused(logits, wanted):
    with pytest.raises(ValueError, match="must"):
        resolve(logits, wanted)
