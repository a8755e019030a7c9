"""Methods that mask a layer's output: Ablation-CAM takes channels away, Recipro-CAM leaves one place alone."""

from functools import partial

from array_api_compat import array_namespace, device

from heatlens_server.core.grid import Layout
from heatlens_server.maps.methods import cam
from heatlens_server.maps.steps.job import ROUNDING, Job, MapSteps
from heatlens_server.maps.steps.masks import empty_channels, place_masks, places_alone, without_channels

_LEAST = 1e-12
"""What a score's magnitude is taken to be at least."""


def ablation_cam(job: Job) -> MapSteps:
    """Ablation-CAM: `sum_c (s - s[c]) / |s| A[c]`, s[c] the score with channel c set to zero.

    Desai and Ramaswamy 2020, WACV, equations 3 and 5. The paper divides by s, which turns the map into its negative
    where the score is negative (any log probability, many a logit): the magnitude keeps "falls without it" positive,
    and changes nothing elsewhere. Channels are set to zero whatever the layer's range, as in the paper. The `grad-cam`
    package 1.5.7 sets them to 1e7 below the minimum where that is not zero, and to -1000 in pyramids: it agrees behind
    a ReLU, for positive scores. Tokens before the grid keep the channel; in a pyramid a channel is one level's.

    A channel that is zero already weighs nothing. Costs a run of the network behind the layer for each other channel;
    the torch engine also runs the part before it once per step, see `TorchModel.replay`. In half precision the falls
    are as coarse as the scores.
    """
    features = job.features
    xp = array_namespace(features)
    weights = xp.zeros((features.shape[1], job.goals.width), dtype=xp.float32, device=device(features))
    score = job.scores_of_levels(lambda levels: levels, 1)
    yield
    magnitude = xp.abs(score)
    for chunk in job.chunks(xp.nonzero(~empty_channels(job.levels))[0]):
        without = job.scores_of_levels(partial(without_channels, channels=chunk), len(chunk))
        falls = score - without
        weights[chunk] = xp.where(xp.abs(falls) > ROUNDING * magnitude, falls, 0.0)
        yield
    return cam(features, (weights / xp.where(magnitude < _LEAST, _LEAST, magnitude)).T[None])


def recipro_cam(job: Job) -> MapSteps:
    """Recipro-CAM: `s(A * M[p]) - min_q s(A * M[q])`, M[p] the mask that leaves place p of the layer alone.

    Byun and Lee 2022, https://arxiv.org/abs/2209.14074, one place per mask as in the authors' code; of token layers
    Byun and Lee 2023 (ViT-Recipro-CAM), https://arxiv.org/abs/2310.02588: the tokens before the grid are kept, and a
    place comes with its neighbours by a 3x3 Gaussian, as in `openvino_xai` 1.1.0. The score is whichever is asked for;
    the paper's is the probability. Papers stretch the scores from minimum to maximum: with the minimum taken off, so
    does everything that follows here, and scores that are all negative do not vanish in the ReLU.

    Costs a run of the network behind the layer per place, whatever the number of goals, and with the torch engine one
    of the part before it per step.
    """
    height, width = job.features.shape[-2:]
    xp = array_namespace(job.features)
    neighbours = job.grid.layout is Layout.TOKENS
    scores = []
    for places in job.chunks(xp.arange(height * width, device=device(job.features))):
        masks = place_masks(places, height, width, neighbours=neighbours)
        scores.append(job.scores_of_levels(partial(places_alone, masks=masks), len(places)))
        del masks
        yield
    maps = xp.reshape(xp.concat(scores).T, (1, -1, height, width))
    raised = maps - xp.min(maps, axis=(-2, -1), keepdims=True)
    same = xp.max(raised, axis=(-2, -1), keepdims=True) <= ROUNDING * xp.max(xp.abs(maps), axis=(-2, -1), keepdims=True)
    return xp.where(same, 0.0, raised)
