"""Score-CAM and its smoothed and integrated forms: channels weighted by what the network says of the image behind them.

All of an image's goals share every masked run. Masks are made chunk by chunk, at the image's size.
"""

from collections.abc import Generator, Iterator
from itertools import accumulate

from array_api_compat import array_namespace, device

from heatlens_server.maps.concrete import Array
from heatlens_server.maps.methods import cam
from heatlens_server.maps.noise import standard_normal
from heatlens_server.maps.steps.job import Job, MapSteps
from heatlens_server.maps.steps.masks import channel_masks, constant_channels

SS_CAM_SAMPLES = 35
SS_CAM_DEVIATION = 2.0
"""Of the noise on a mask in [0, 1]. Both as in `torch-cam` 0.5.0."""

IS_CAM_STEPS = 10
"""As in `torch-cam` 0.5.0."""

_Scores = Generator[None, None, Array]


def score_cam(job: Job) -> MapSteps:
    """Score-CAM: `sum_c softmax_c(s(X * M[c])) A[c]`, M[c] the channel as a mask over the normalised input.

    Wang et al. 2020, https://arxiv.org/abs/1910.01279: the softmax does not change with the baseline that the paper
    subtracts from s. Weights, masks and their order as in the `grad-cam` package 1.5.7, but for the upsampling; see
    `channel_masks`. A constant channel's mask is zero: it gets the score of an empty image, which runs once for all.
    Costs a run of the whole network per channel that is not constant, and one more if any is.
    """
    scores = yield from _masked_scores(job, (1.0,))
    return _weighted(job, scores)


def is_cam(job: Job) -> MapSteps:
    """IS-CAM: Score-CAM with each mask scaled in steps, and the scores averaged over them.

    Naidu et al. 2020, https://arxiv.org/abs/2010.03023, as in `torch-cam` 0.5.0: the scale accumulates, at step i of
    N = 10 it is 1/N + ... + i/N, so 0.1, 0.3, 0.6 ... 5.5. Costs N runs of the whole network per channel that is not
    constant, and N more if any is.
    """
    scales = tuple(accumulate(step / IS_CAM_STEPS for step in range(1, IS_CAM_STEPS + 1)))
    scores = yield from _masked_scores(job, scales)
    return _weighted(job, scores)


def ss_cam(job: Job) -> MapSteps:
    """SS-CAM: Score-CAM with noise on the masks, and the scores averaged over it.

    Wang et al. 2020, https://arxiv.org/abs/2006.14255, the form that smooths the maps, with the noise of `torch-cam`
    0.5.0: 35 samples of deviation 2, on the mask at the image's size, drawn anew for every channel. The same for every
    image. Constant channels share a score, as in Score-CAM: that of the first one's noise. Costs 35 runs of the whole
    network per channel that is not constant, and 35 more if any is.
    """
    features = job.features
    xp = array_namespace(features)
    constant = constant_channels(features)
    scores = _zeros(job, features)
    # The first constant channel stands for all of them.
    alike = xp.nonzero(constant)[0]
    channels = xp.sort(xp.concat([xp.nonzero(~constant)[0], alike[:1]]))
    for sample in range(SS_CAM_SAMPLES):
        for chunk in job.chunks(channels):
            fields = (sample * features.shape[1] + channel for channel in chunk.tolist())
            noise = SS_CAM_DEVIATION * standard_normal(fields, (1, *job.size_px), features)
            masks = channel_masks(job.on_image(features[:, chunk]), job.size_px) + noise
            scores[chunk] += job.scores_of_inputs(job.inputs * masks)
            del masks, noise
            yield
    scores[alike] = scores[alike[:1]]
    return _weighted(job, scores / SS_CAM_SAMPLES)


def _masked_scores(job: Job, scales: tuple[float, ...]) -> _Scores:
    """The scores (C, K) of the image behind each channel's mask, averaged over what the masks are multiplied by."""
    features = job.features
    scores = _zeros(job, features)
    for chunk, masks in _masks(job, features):
        for scale in scales:
            scores[chunk] += job.scores_of_inputs(job.inputs * (masks * scale))
            yield
    return scores / len(scales)


def _masks(job: Job, features: Array) -> Iterator[tuple[Array, Array | float]]:
    """Channels, at most `rows` of them or those that share a mask, and their masks."""
    xp = array_namespace(features)
    constant = constant_channels(features)
    for chunk in job.chunks(xp.nonzero(~constant)[0]):
        yield chunk, channel_masks(job.on_image(features[:, chunk]), job.size_px)
    alike = xp.nonzero(constant)[0]
    if len(alike):
        yield alike, 0.0


def _zeros(job: Job, features: Array) -> Array:
    xp = array_namespace(features)
    return xp.zeros((features.shape[1], job.goals.width), dtype=xp.float32, device=device(features))


def _weighted(job: Job, scores: Array) -> Array:
    """The channels, weighted by the softmax over them of their scores (C, K)."""
    xp = array_namespace(scores)
    shares = xp.exp(scores - xp.max(scores, axis=0))
    return cam(job.features, (shares / xp.sum(shares, axis=0)).T[None])
