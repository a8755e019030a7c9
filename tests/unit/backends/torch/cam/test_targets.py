import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from heatlens_server.backends.torch.cam.targets import class_scores
from heatlens_server.core.methods import ABSENT, RANKED
from heatlens_server.maps.targets import resolve

LOGITS = torch.tensor([[0.1, 3.0, -1.0, 2.0], [5.0, 1.0, 6.0, 0.0]])  # ranked: 1 3 0 2, and 2 0 1 3


def summed(logits, class_ids, k):
    """What is differentiated: every image's k-th class."""
    return class_scores(logits, class_ids)[:, k].sum()


def test_ranks_ids_and_absent_ones():
    wanted = torch.tensor([[RANKED, RANKED, RANKED], [3, RANKED, ABSENT]])
    # Position 1 of the second image is its second most probable class, whatever is at position 0.
    assert resolve(LOGITS, wanted).tolist() == [[1, 3, 0], [3, 0, ABSENT]]
    assert wanted.tolist() == [[-1, -1, -1], [3, -1, -2]]


def test_the_most_probable_class_alone():
    assert resolve(LOGITS, torch.tensor([[RANKED], [RANKED]])).tolist() == [[1], [2]]
    assert resolve(LOGITS, torch.tensor([[0], [ABSENT]])).tolist() == [[0], [ABSENT]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 5])
def test_equal_logits_rank_by_class_id(dtype, k):
    logits = torch.zeros(3, 1000, dtype=dtype)
    logits[1, 500:] = 1
    first = [0, 500, 0]
    expected = [list(range(start, start + k)) for start in first]
    assert resolve(logits, torch.full((3, k), RANKED)).tolist() == expected


@pytest.mark.parametrize(
    ("logits", "wanted", "message"),
    [
        (torch.zeros(4), torch.zeros(1, 1, dtype=torch.int64), r"logits: must be \(N, C\)"),
        (LOGITS, torch.zeros(2, 1, dtype=torch.int32), r"wanted: must be int64 \(2, K\), not torch.int32"),
        (LOGITS, torch.zeros(1, 1, dtype=torch.int64), "wanted: must be int64"),
        (LOGITS, torch.zeros(2, dtype=torch.int64), "wanted: must be int64"),
        (LOGITS, torch.zeros(2, 5, dtype=torch.int64), "wanted: must hold 1 to 4 classes per image, not 5"),
        (LOGITS, torch.zeros(2, 0, dtype=torch.int64), "wanted: must hold 1 to 4"),
    ],
)
def test_wrong_input(logits, wanted, message):
    with pytest.raises(ValueError, match=message):
        resolve(logits, wanted)


def test_score_by_hand():
    ids = torch.tensor([[1, 0], [2, ABSENT]])
    assert summed(LOGITS, ids, 0).item() == 9.0
    assert summed(LOGITS, ids, 1).item() == pytest.approx(0.1)


def test_score_ignores_what_stands_at_absent_classes():
    logits = LOGITS.clone()
    logits[1] = torch.nan
    assert summed(logits, torch.tensor([[1], [ABSENT]]), 0).item() == 3.0


def test_score_of_half_precision_does_not_overflow():
    assert summed(torch.full((4, 2), 60000.0, dtype=torch.float16), torch.zeros(4, 1, dtype=torch.int64), 0) == 240000


def test_the_gradient_of_an_image_depends_on_that_image_only():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 6)).double()
    images = torch.randn(3, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[4, 1], [ABSENT, 5], [2, ABSENT]])
    for k in range(2):
        (together,) = torch.autograd.grad(summed(net(images), ids, k), images)
        for n in range(3):
            if ids[n, k] == ABSENT:
                assert not together[n].any()
            else:
                (alone,) = torch.autograd.grad(net(images[n : n + 1])[0, ids[n, k]], images)
                assert together[n].any()
                torch.testing.assert_close(together[n], alone[n])


def test_traces_with_any_batch_size():
    def graph(logits, wanted):
        ids = resolve(logits, wanted)
        return ids, summed(logits, ids, 0)

    for k in (1, 3):
        example = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)), torch.full((2, k), RANKED)
        traced = make_fx(graph, tracing_mode="symbolic")(*example)
        logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
        wanted = torch.tensor([[RANKED], [ABSENT], [6], [RANKED], [0]]).expand(5, k).contiguous()
        torch.testing.assert_close(traced(logits, wanted), graph(logits, wanted))
