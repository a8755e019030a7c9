"""RISE: what the network says of the image behind random masks. It looks at no layer, and needs no gradient."""

from collections.abc import Iterable

import numpy as np
from array_api_compat import array_namespace, device

from heatlens_server.core.arrays import Float32Array
from heatlens_server.maps.concrete import as_numpy, upsample
from heatlens_server.maps.noise import generator
from heatlens_server.maps.steps.job import ROUNDING, Job, MapSteps

RISE_MASKS = 1000
"""The paper takes 4,000 and 8,000; 1,000 is the default of `dianna`. The noise of a map falls with its root."""

RISE_CELLS = 7
RISE_KEPT = 0.5
"""The share of cells that a mask keeps. Both as in the paper."""


def rise(job: Job) -> MapSteps:
    """RISE: `sum_i (s(X * M_i) - mean s) M_i / (N p)`, M_i random masks over the normalised input.

    Petsiuk, Das and Saenko 2018, https://arxiv.org/abs/1806.07421, equation 6, with the mean of the scores taken off,
    which changes the paper's map by a constant as the number of masks grows: scores that are large and alike, as
    logits may be, would otherwise draw how often a pixel happened to be kept. The score is whichever is asked for; the
    paper's is the probability. The masks are the same for every image. Costs N runs of the whole network.
    """
    xp = array_namespace(job.inputs)
    masked = np.zeros((job.goals.width, job.size_px[0] * job.size_px[1]))
    kept = np.zeros(masked.shape[1])
    scores = []
    for start in range(0, RISE_MASKS, job.rows):
        masks = random_masks(range(start, min(start + job.rows, RISE_MASKS)), job.size_px)
        behind = job.inputs * xp.asarray(masks, dtype=job.inputs.dtype, device=device(job.inputs))
        scores.append(as_numpy(job.scores_of_inputs(behind)).astype(np.float64))
        flat = masks.reshape(len(masks), -1).astype(np.float64)
        masked += scores[-1].T @ flat
        kept += flat.sum(0)
        del masks, behind, flat
        yield
    every = np.concatenate(scores)
    raw = (masked - every.mean(0)[:, None] * kept) / (RISE_MASKS * RISE_KEPT)
    raw[np.ptp(every, axis=0) <= ROUNDING * np.abs(every).max(0)] = 0
    maps = raw.astype(np.float32).reshape(1, -1, *job.size_px)
    return xp.asarray(maps, device=device(job.inputs))


def random_masks(numbers: Iterable[int], size_px: tuple[int, int]) -> Float32Array:
    """Masks by their numbers: a grid of cells that are kept or not, enlarged bilinearly and shifted at random.

    Args:
        numbers: M of them, each >= 0.
        size_px: (height, width) of the image.

    Returns:
        (M, 1, height, width) in [0, 1].
    """
    height, width = size_px
    # A shift of up to a cell: the grid has one cell more than lie on the image.
    cell = -(-height // RISE_CELLS), -(-width // RISE_CELLS)
    enlarged = (RISE_CELLS + 1) * cell[0], (RISE_CELLS + 1) * cell[1]
    masks = []
    for number in numbers:
        drawn = generator(number)
        cells = drawn.random((1, 1, RISE_CELLS + 1, RISE_CELLS + 1)) < RISE_KEPT
        down, across = drawn.integers(cell)
        masks.append(upsample(cells.astype(np.float32), enlarged)[0, :, down : down + height, across : across + width])
    return np.stack(masks)
