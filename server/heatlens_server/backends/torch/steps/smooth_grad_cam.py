"""Smooth Grad-CAM++: Grad-CAM++ over noisy copies of the image."""

from collections.abc import Iterator

import torch
from torch import Tensor

from heatlens_server.backends.torch.steps.job import Job, MapSteps, Noise
from heatlens_server.maps.methods import smooth_grad_cam_plus_plus
from heatlens_server.maps.precision import at_least_float32

SAMPLES = 4
DEVIATION = 0.3
"""Of the noise on the normalised input. Both as in `torch-cam` 0.5.0."""


def smooth_grad_cam_plus_plus_in_steps(job: Job) -> MapSteps:
    """Smooth Grad-CAM++ of 4 noisy copies of the normalised image, deviation 0.3, the same noise for every image.

    See `maps.methods.smooth_grad_cam_plus_plus`.

    Costs 4 runs of the network, and as many backward passes through what is behind the layer for every goal.

    Raises:
        TypeError: the layer returns a pyramid, which has no gradient here.
    """
    features = at_least_float32(job.features)
    first, second, third = torch.zeros(3, 1, job.goals.width, *features.shape[1:], device=features.device).unbind()
    noise = Noise(DEVIATION, tuple(job.inputs.shape[1:]), features.device)
    for chunk in job.chunks(torch.arange(SAMPLES)):
        for k, gradients in enumerate(_gradients(job, job.inputs + noise.draw(len(chunk)))):
            for power, total in enumerate((first, second, third), start=1):
                total[0, k] += gradients.pow(power).sum(dim=0)
        yield
    return smooth_grad_cam_plus_plus(features, first / SAMPLES, second / SAMPLES, third / SAMPLES)


def _gradients(job: Job, inputs: Tensor) -> Iterator[Tensor]:
    """For each goal its score's gradients (R, C, h, w) for R changed images, float32 or wider."""
    output, outputs = job.model.record(inputs, (job.layer,), differentiate=True)
    leaf = outputs[job.layer]
    if not isinstance(leaf, Tensor):
        raise TypeError("a pyramid of feature maps has no gradient here")
    scores = job.goals.scores_of(0, output).sum(dim=0)
    for k, score in enumerate(scores):
        # A goal that none of the changed images has is a constant.
        (gradient,) = (
            job.model.gradients(score, (leaf,), retain_graph=k + 1 < len(scores))
            if score.requires_grad
            else (torch.zeros_like(leaf),)
        )
        yield at_least_float32(job.model.features(job.layer, gradient))
