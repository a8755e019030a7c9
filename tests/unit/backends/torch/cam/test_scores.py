"""Scores of classes and their derivatives: `class_scores`, and `maps.targets` on tensors."""

import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget
from torch.fx.experimental.proxy_tensor import make_fx

from heatlens_server.backends.torch.cam.targets import class_scores
from heatlens_server.core.methods import ABSENT, Score
from heatlens_server.maps.targets import probabilities, seeds

IDS = torch.tensor([[3, 0, 6], [1, ABSENT, 2], [5, 4, ABSENT]])


def random_logits(classes=7, dtype=torch.float64):
    return 3 * torch.randn(3, classes, generator=torch.Generator().manual_seed(0), dtype=dtype)


def plainly(logits, ids, kind, *, sigmoid):
    """The same scalars as anybody would write them."""
    log_probabilities = F.logsigmoid(logits) if sigmoid else torch.log_softmax(logits, dim=1)
    every = {
        Score.LOGIT: logits,
        Score.PROBABILITY: log_probabilities.exp(),
        Score.LOG_PROBABILITY: log_probabilities,
    }[kind]
    return torch.where(ids >= 0, every.gather(1, ids.clamp(min=0)), 0.0)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("kind", [Score.LOGIT, Score.PROBABILITY, Score.LOG_PROBABILITY])
def test_values_and_gradients_are_the_plain_ones(kind, sigmoid):
    logits = random_logits().requires_grad_()
    ours, plain = (make(logits, IDS, kind, sigmoid=sigmoid) for make in (class_scores, plainly))
    torch.testing.assert_close(ours, plain)
    for k in range(3):
        of_ours, of_plain = (torch.autograd.grad(s[:, k].sum(), logits, retain_graph=True)[0] for s in (ours, plain))
        torch.testing.assert_close(of_ours, of_plain)


def test_contrast_is_that_of_grad_cam():
    logits = random_logits().requires_grad_()
    ours = class_scores(logits, IDS, Score.CONTRAST)
    worst = 0.0
    for (n, k), score in zip(torch.cartesian_prod(torch.arange(3), torch.arange(3)), ours.flatten(), strict=True):
        class_id = IDS[n, k].item()
        if class_id == ABSENT:
            assert score == 0
            continue
        # As FinerCAM picks them.
        _, *alike = (logits[n] - logits[n, class_id]).abs().argsort()[:4].tolist()
        theirs = FinerWeightedTarget(class_id, alike, 1)(logits[n])
        gradients = [torch.autograd.grad(s, logits, retain_graph=True)[0] for s in (score, theirs)]
        worst = max(worst, (score - theirs).abs().item(), (gradients[0] - gradients[1]).abs().max().item())
    print(f"contrast against grad-cam's FinerWeightedTarget: {worst:.1e} at most")
    assert worst < 1e-5  # their 1e-9 beside probabilities of 1e-4 and more


@pytest.mark.parametrize("classes", [1, 2, 3, 7])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("kind", list(Score))
def test_seeds_are_the_derivatives(kind, sigmoid, classes):
    logits = random_logits(classes).requires_grad_()
    ids = torch.where(classes > IDS, IDS, 0)
    scores = class_scores(logits, ids, kind, sigmoid=sigmoid)
    assert scores.shape == ids.shape
    assert scores.isfinite().all()
    ours = seeds(logits.detach(), ids, kind, sigmoid=sigmoid)
    for k in range(3):
        (gradient,) = torch.autograd.grad(scores[:, k].sum(), logits, retain_graph=True)
        torch.testing.assert_close(ours[:, k], gradient, rtol=1e-9, atol=1e-12)
        assert not gradient[ids[:, k] == ABSENT].any()


def test_few_classes_are_compared_with_what_there_is():
    logits = torch.tensor([[2.0, 5.0]])
    ids = torch.tensor([[0, 1]])
    assert class_scores(logits, ids, Score.CONTRAST).tolist() == [[-3.0, 3.0]]
    assert class_scores(logits[:, :1], ids[:, :1], Score.CONTRAST).tolist() == [[2.0]]
    assert class_scores(logits[:, :1], ids[:, :1], Score.PROBABILITY).tolist() == [[1.0]]


def test_of_classes_equally_alike_the_first_are_taken():
    # Classes 0 to 4 are all equally far from class 5.
    logits = torch.tensor([[1.0, 1, 3, 3, 3, 2]], dtype=torch.float64)
    score = class_scores(logits, torch.tensor([[5]]), Score.CONTRAST)
    weights = torch.softmax(logits[0, :3], dim=0)
    torch.testing.assert_close(score.squeeze(), 2 - (weights * logits[0, :3]).sum())


@pytest.mark.parametrize("kind", [Score.PROBABILITY, Score.LOG_PROBABILITY])
def test_confident_networks_keep_their_gradients(kind):
    """At p = 1 - 4e-18, where 1 - p is zero in float32 and float64 alike."""
    logits = torch.tensor([[40.0, -1.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(class_scores(logits, torch.tensor([[0]]), kind).sum(), logits)
    others = torch.exp(torch.tensor([-1.0, 0.0]) - 40)
    torch.testing.assert_close(gradient, torch.cat([others.sum()[None], -others])[None], rtol=1e-5, atol=0)
    torch.testing.assert_close(seeds(logits.detach(), torch.tensor([[0]]), kind)[0], gradient, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", list(Score))
def test_half_precision_comes_out_wide(kind):
    logits = random_logits(dtype=torch.float32).half()
    assert class_scores(logits, IDS, kind).dtype is torch.float32
    assert seeds(logits, IDS, kind).dtype is torch.float32
    torch.testing.assert_close(seeds(logits, IDS, kind), seeds(logits.float(), IDS, kind))


def test_probabilities():
    logits = torch.tensor([[0.0, 0.0]], dtype=torch.float16)
    assert probabilities(logits).dtype is torch.float32
    assert probabilities(logits + 1).tolist() == [[0.5, 0.5]]
    assert probabilities(logits, sigmoid=True).tolist() == [[0.5, 0.5]]
    assert probabilities(logits + 60000, sigmoid=True).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("kind", list(Score))
def test_traces_with_any_batch_size(kind):
    traced = make_fx(lambda logits, ids: seeds(logits, ids, kind), tracing_mode="symbolic")(
        random_logits()[:2], IDS[:2]
    )
    torch.testing.assert_close(traced(random_logits(), IDS), seeds(random_logits(), IDS, kind))
