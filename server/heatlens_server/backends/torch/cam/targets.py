"""The scalar to differentiate about a class, for autograd; `maps.targets` has its derivative in closed form."""

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from heatlens_server.core.methods import Score
from heatlens_server.maps.precision import at_least_float32
from heatlens_server.maps.targets import CONTRASTED


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
        sigmoid: whether the head is a multi-label one: each class is judged on its own.

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
