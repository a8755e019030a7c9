"""Ablation-CAM: channels weighted by how far the score falls without them."""

from functools import partial

import torch

from heatlens_server.backends.torch.cam.masks import empty_channels, without_channels
from heatlens_server.backends.torch.cam.methods import cam
from heatlens_server.backends.torch.steps.job import ROUNDING, Job, RawMaps

_LEAST = 1e-12
"""What a score's magnitude is taken to be at least."""


def ablation_cam(job: Job) -> RawMaps:
    """Ablation-CAM: `sum_c (s - s[c]) / |s| A[c]`, s[c] the score with channel c set to zero.

    Desai and Ramaswamy 2020, WACV, equations 3 and 5. The paper divides by s, which turns the map into its negative
    where the score is negative (any log probability, many a logit): the magnitude keeps "falls without it" positive,
    and changes nothing elsewhere. Channels are set to zero whatever the layer's range, as in the paper. The `grad-cam`
    package 1.5.7 sets them to 1e7 below the minimum where that is not zero, and to -1000 in pyramids: it agrees behind
    a ReLU, for positive scores. Tokens before the grid keep the channel; in a pyramid a channel is one level's.

    A channel that is zero already weighs nothing. Costs a run of the network behind the layer for each other channel,
    and one of the part before it per step; see `TorchModel.replay`. In half precision the falls are as coarse as the
    scores.
    """
    features, grid = job.features, job.grid
    weights = torch.zeros(features.shape[1], job.goals.width, device=features.device)
    score = job.scores_of_features(lambda output: output, 1)
    yield
    for chunk in job.chunks((~empty_channels(job.output, grid)).nonzero()[:, 0]):
        without = job.scores_of_features(partial(without_channels, grid=grid, channels=chunk), len(chunk))
        falls = score - without
        weights[chunk] = falls.where(falls.abs() > ROUNDING * score.abs(), 0.0)
        yield
    return cam(features, (weights / score.abs().clamp(min=_LEAST)).T[None])
