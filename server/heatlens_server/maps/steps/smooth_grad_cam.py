"""Smooth Grad-CAM++: Grad-CAM++ over noisy copies of the image."""

from array_api_compat import array_namespace

from heatlens_server.maps.methods import smooth_grad_cam_plus_plus
from heatlens_server.maps.noise import standard_normal
from heatlens_server.maps.precision import at_least_float32
from heatlens_server.maps.steps.job import Job, MapSteps

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
    xp = array_namespace(features)
    totals = [[0.0] * job.goals.width for _power in range(3)]
    for start in range(0, SAMPLES, job.rows):
        numbers = range(start, min(start + job.rows, SAMPLES))
        noise = DEVIATION * standard_normal(numbers, tuple(job.inputs.shape[1:]), features)
        for k, gradients in enumerate(job.gradients(job.inputs + noise)):
            for power, of_goals in enumerate(totals, start=1):
                of_goals[k] = of_goals[k] + xp.sum(gradients**power, axis=0)
            yield
    first, second, third = (xp.stack(of_goals)[None] / SAMPLES for of_goals in totals)
    return smooth_grad_cam_plus_plus(features, first, second, third)
