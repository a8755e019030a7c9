"""How faithful one image's maps are, measured on the network that they explain."""

import dataclasses
from collections.abc import Callable, Generator

from array_api_compat import array_namespace

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Metric
from heatlens_server.core.targets import Target
from heatlens_server.maps.concrete import Array, upsample
from heatlens_server.maps.faithfulness.measure import measure
from heatlens_server.maps.normalization import NormalizedMap
from heatlens_server.maps.steps.job import Explained
from heatlens_server.maps.steps.network import Network

Measures = tuple[dict[Metric, float], ...]

Remake = Callable[..., Generator[None, None, Explained]]
"""Explains as `drive.raw_maps` does."""


def measure_maps(
    network: Network,
    inputs: Array,
    target: Target,
    spec: MapSpec,
    maps: NormalizedMap[Array],
    *,
    rows: int,
    remake: Remake,
) -> Generator[None, None, Measures]:
    """Measure one image's maps in steps.

    Args:
        network: the network.
        inputs: (1, C, H, W), the image.
        target: names the goals of the maps.
        spec: how they were made, and the metrics wanted.
        maps: (1, K, h, w).
        rows: the most rows of a step.
        remake: makes maps again: of a network with other weights, or of another goal.

    Returns:
        For each of the K goals its measures.
    """
    job = network.jobs(inputs, target, spec, rows=rows)[0]
    at_input = upsample(maps.values, job.size_px)[0]
    yield
    # The sanity checks compare maps as the method makes them; smoothing is not what they are about.
    plain = dataclasses.replace(spec, metrics=(), augment=False, upsample=True)
    others: dict[Metric, Array] = {}
    if Metric.MODEL_RANDOMISATION in spec.metrics:
        again = yield from remake(network.twin(), inputs, [target], plain, rows=rows)
        others[Metric.MODEL_RANDOMISATION] = again.maps(plain, job.size_px).values[0]
        del again
        yield
    least_probable = job.goals.least_probable(0)
    if Metric.CLASS_SENSITIVITY in spec.metrics and least_probable is not None:
        again = yield from remake(network, inputs, [least_probable], plain, rows=rows)
        of_least = again.maps(plain, job.size_px).values[0]
        others[Metric.CLASS_SENSITIVITY] = array_namespace(at_input).broadcast_to(of_least, at_input.shape)
        del again
        yield
    found: list[dict[Metric, float]] = []
    for k, one in enumerate(at_input):

        def probability(images: Array, k: int = k) -> Array:
            return job.probabilities_of_inputs(images)[:, k]

        found.append(
            (
                yield from measure(
                    spec.metrics,
                    saliency=one,
                    image=inputs[0],
                    probability=probability,
                    rows=rows,
                    others={metric: of_goals[k] for metric, of_goals in others.items()},
                )
            )
        )
    return tuple(found)
