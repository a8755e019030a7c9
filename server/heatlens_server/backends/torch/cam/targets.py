"""From the classes wanted to the scalar to differentiate. Traced into exported graphs like the rest of this folder."""

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from heatlens_server.core.methods import ABSENT, RANKED, Score
from heatlens_server.maps.precision import at_least_float32

__all__ = ["ABSENT", "RANKED", "class_scores", "probabilities", "resolve", "seeds"]

CONTRASTED = 3
"""How many classes `Score.CONTRAST` compares a class with, as in the `grad-cam` package."""


def resolve(logits: Tensor, wanted: Tensor) -> Tensor:
    """Turn the classes wanted into class ids.

    Equal logits rank by class id, lowest first, on every device and at every batch size; `Tensor.topk` leaves their
    order open.

    Args:
        logits: (N, C) floating point.
        wanted: int64 (N, K), K <= C. An entry is a class id in [0, C), `RANKED` or `ABSENT`. Ids are not checked
            here: that would make the graph depend on the data.

    Returns:
        int64 (N, K) class ids; `ABSENT` where `wanted` is.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: must be (N, C), not {tuple(logits.shape)}")
    if wanted.ndim != 2 or wanted.dtype != torch.int64 or wanted.shape[0] != logits.shape[0]:
        raise ValueError(f"wanted: must be int64 ({logits.shape[0]}, K), not {wanted.dtype} {tuple(wanted.shape)}")
    count = wanted.shape[1]
    if not 1 <= count <= logits.shape[1]:
        raise ValueError(f"wanted: must hold 1 to {logits.shape[1]} classes per image, not {count}")
    if count == 1:
        # The common case: argmax takes the first of equals by contract and costs a fraction of a sort.
        ranked = logits.argmax(dim=1, keepdim=True)
    else:
        # A gather, not a slice: sliced strides make a traced graph doubt that K may be any number.
        positions = torch.arange(count, device=logits.device).expand(logits.shape[0], count)
        ranked = torch.sort(logits, dim=1, descending=True, stable=True).indices.gather(1, positions)
    return torch.where(wanted == RANKED, ranked, wanted)


def probabilities(logits: Tensor, *, sigmoid: bool = False) -> Tensor:
    """Turn logits into probabilities.

    Args:
        logits: (..., C) floating point.
        sigmoid: whether each class is judged on its own (a multi-label head) instead of one against the others.

    Returns:
        (..., C) in [0, 1], float32 or wider.
    """
    return torch.sigmoid(at_least_float32(logits)) if sigmoid else torch.softmax(at_least_float32(logits), dim=-1)


def class_scores(logits: Tensor, class_ids: Tensor, kind: Score = Score.LOGIT, *, sigmoid: bool = False) -> Tensor:
    """The scalar that is explained about each class of each image; differentiable.

    - `LOGIT`: the score before softmax or sigmoid.
    - `PROBABILITY`: its softmax or sigmoid. Confident networks have tiny gradients here: they are computed from the
      other classes' scores and not as 1 - p, which would be zero from p = 1 - 6e-8 on.
    - `LOG_PROBABILITY`: the logarithm of that.
    - `CONTRAST`: what sets the class apart from those most like it: `l[k] - sum_i w[i] l[i]`, over the three other
      classes whose logits are closest to l[k] (fewer if there are no more; equal ones by class id, lowest first), `w`
      the softmax over these alone, which is differentiated too. Zhang et al. 2025 (Finer-CAM),
      https://arxiv.org/abs/2501.11309, equation 8, with alpha = 1, as `FinerCAM` of the `grad-cam` package 1.5.7 by
      default. That one adds 1e-9 to the sum of the weights' probabilities, which takes over for improbable classes;
      here there is none. Multi-label heads have the same contrast. The only class of a network has its logit.

    Args:
        logits: (N, C) floating point.
        class_ids: int64 (N, K), each in [0, C) or `ABSENT`, as `resolve` returns them.
        kind: which scalar.
        sigmoid: whether the head is a multi-label one: see `probabilities`.

    Returns:
        (N, K), float32 or wider; 0, with no gradient, where the class is absent.
    """
    logits = at_least_float32(logits)
    chosen = logits.gather(1, class_ids.clamp(min=0))
    if kind is Score.CONTRAST:
        if logits.shape[1] > 1:
            alike = _alike(logits.detach(), class_ids)
            weights = torch.softmax(logits.unsqueeze(1).masked_fill(~alike, -torch.inf), dim=2)
            chosen = chosen - (weights * logits.unsqueeze(1)).sum(dim=2)
    elif kind is not Score.LOGIT:
        log_probability = F.logsigmoid(chosen if sigmoid else _margin(logits, class_ids))
        chosen = log_probability if kind is Score.LOG_PROBABILITY else log_probability.exp()
    return torch.where(class_ids >= 0, chosen, 0.0)


def seeds(logits: Tensor, class_ids: Tensor, kind: Score = Score.LOGIT, *, sigmoid: bool = False) -> Tensor:
    """The derivative of each class score with respect to all logits, in closed form: what a backward pass starts with.

    Args:
        logits: (N, C) floating point.
        class_ids: int64 (N, K), as for `class_scores`.
        kind: which scalar.
        sigmoid: as for `class_scores`.

    Returns:
        (N, K, C), float32 or wider: d class_scores[n, k] / d logits[n, c]; 0 where the class is absent.
    """
    logits = at_least_float32(logits)
    hot = _hot(logits, class_ids)
    # Every seed is this, but for absent classes: an absent one is nowhere hot.
    seed = torch.where(hot, 1.0, torch.zeros((), dtype=logits.dtype, device=logits.device))
    if kind is Score.LOGIT:
        return seed
    present = class_ids.unsqueeze(2) >= 0
    if kind is Score.CONTRAST:
        if logits.shape[1] == 1:
            return seed
        values = logits.unsqueeze(1)
        weights = torch.softmax(values.masked_fill(~_alike(logits, class_ids), -torch.inf), dim=2)
        mean = (weights * values).sum(dim=2, keepdim=True)
        return torch.where(present, seed - weights * (1.0 + values - mean), 0.0)
    if sigmoid:
        margin = logits.gather(1, class_ids.clamp(min=0))
    else:
        margin = _margin(logits, class_ids)
        if logits.shape[1] > 1:
            seed = seed - torch.softmax(logits.unsqueeze(1).masked_fill(hot, -torch.inf), dim=2)
    slope = torch.sigmoid(-margin)
    if kind is Score.PROBABILITY:
        slope = slope * torch.sigmoid(margin)
    return torch.where(present, seed * slope.unsqueeze(2), 0.0)


def _hot(logits: Tensor, class_ids: Tensor) -> Tensor:
    """Where each wanted class is: bool (N, K, C); nowhere if it is absent."""
    return class_ids.unsqueeze(2) == torch.arange(logits.shape[1], device=logits.device)


def _margin(logits: Tensor, class_ids: Tensor) -> Tensor:
    """How far each class is ahead of all others together, (N, K): its probability is the sigmoid of this."""
    chosen = logits.gather(1, class_ids.clamp(min=0))
    if logits.shape[1] == 1:
        return chosen * 0.0 + torch.inf
    others = logits.unsqueeze(1).masked_fill(_hot(logits, class_ids), -torch.inf)
    return chosen - torch.logsumexp(others, dim=2)


def _alike(logits: Tensor, class_ids: Tensor) -> Tensor:
    """Where the classes are that a class is compared with: bool (N, K, C)."""
    hot = _hot(logits, class_ids)
    chosen = logits.gather(1, class_ids.clamp(min=0)).unsqueeze(2)
    likeness = -(logits.unsqueeze(1) - chosen).abs().masked_fill(hot, torch.inf)
    places = torch.arange(logits.shape[1], device=logits.device)
    alike = torch.zeros_like(hot)
    # One after the other: argmax takes the first of equals by contract, which topk does not.
    for _ in range(min(CONTRASTED, logits.shape[1] - 1)):
        alike = alike | (places == likeness.masked_fill(alike, -torch.inf).argmax(dim=2, keepdim=True))
    return alike
