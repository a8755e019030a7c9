"""Methods that mask a layer's output: Ablation-CAM takes channels away, Recipro-CAM leaves one place alone."""

from functools import partial

import torch

from heatlens_server.backends.torch.cam.grid import Layout
from heatlens_server.backends.torch.cam.masks import empty_channels, place_masks, places_alone, without_channels
from heatlens_server.backends.torch.steps.job import ROUNDING, Job, MapSteps
from heatlens_server.maps.methods import cam

_LEAST = 1e-12
"""What a score's magnitude is taken to be at least."""


def ablation_cam(job: Job) -> MapSteps:
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


def recipro_cam(job: Job) -> MapSteps:
    """Recipro-CAM: `s(A * M[p]) - min_q s(A * M[q])`, M[p] the mask that leaves place p of the layer alone.

    Byun and Lee 2022, https://arxiv.org/abs/2209.14074, one place per mask as in the authors' code; of token layers
    Byun and Lee 2023 (ViT-Recipro-CAM), https://arxiv.org/abs/2310.02588: the tokens before the grid are kept, and a
    place comes with its neighbours by a 3x3 Gaussian, as in `openvino_xai` 1.1.0. The score is whichever is asked for;
    the paper's is the probability. Papers stretch the scores from minimum to maximum: with the minimum taken off, so
    does everything that follows here, and scores that are all negative do not vanish in the ReLU.

    Costs a run of the network behind the layer per place, and one of the part before it per step, whatever the number
    of goals.
    """
    height, width = job.features.shape[-2:]
    grid = job.grid
    neighbours = grid.layout is Layout.TOKENS
    scores = []
    for places in job.chunks(torch.arange(height * width, device=job.inputs.device)):
        masks = place_masks(places, height, width, neighbours=neighbours)
        scores.append(job.scores_of_features(partial(places_alone, grid=grid, masks=masks), len(places)))
        del masks
        yield
    maps = torch.unflatten(torch.cat(scores).T[None], 2, (height, width))
    raised = maps - maps.amin(dim=(-2, -1), keepdim=True)
    same = raised.amax(dim=(-2, -1), keepdim=True) <= ROUNDING * maps.abs().amax(dim=(-2, -1), keepdim=True)
    return raised.where(~same, 0.0)
