"""Recipro-CAM: the score of every place of a layer alone."""

from functools import partial

import torch

from heatlens_server.backends.torch.cam.grid import Layout
from heatlens_server.backends.torch.cam.masks import place_masks, places_alone
from heatlens_server.backends.torch.steps.job import ROUNDING, Job, RawMaps


def recipro_cam(job: Job) -> RawMaps:
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
