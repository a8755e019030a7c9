"""How faithful one image's maps are, measured on the network that they explain."""

import dataclasses
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.saliency import upsample
from heatlens_server.backends.torch.faithfulness.measure import measure
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.one_pass import RawMaps
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Metric
from heatlens_server.core.targets import Target
from heatlens_server.maps.normalization import NormalizedMap

Measures = tuple[dict[Metric, float], ...]

Remake = Callable[..., Generator[None, None, RawMaps]]
"""Explains as `drive.raw_maps` does."""


def measure_maps(
    model: TorchModel,
    inputs: Tensor,
    target: Target,
    spec: MapSpec,
    maps: NormalizedMap[Tensor],
    *,
    rows: int,
    remake: Remake,
) -> Generator[None, None, Measures]:
    """Measure one image's maps in steps.

    Args:
        model: the network.
        inputs: (1, C, H, W), the image.
        target: names the goals of the maps.
        spec: how they were made, and the metrics wanted.
        maps: (1, K, h, w).
        rows: the most rows of a step.
        remake: makes maps again: of a network with other weights, or of another goal.

    Returns:
        For each of the K goals its measures.
    """
    size_px = (inputs.shape[2], inputs.shape[3])
    with torch.no_grad():
        goals = model.task.goals(model.run(inputs), [target], score=spec.score, run=model.run_images)
        at_input = upsample(maps.values, size_px)[0]
    yield
    # The sanity checks compare maps as the method makes them; smoothing is not what they are about.
    plain = dataclasses.replace(spec, metrics=(), augment=False, upsample=True)
    others: dict[Metric, Tensor] = {}
    if Metric.MODEL_RANDOMISATION in spec.metrics:
        again = yield from remake(model.twin(), inputs, [target], plain, rows=rows)
        others[Metric.MODEL_RANDOMISATION] = again.maps(plain, size_px).values[0]
        del again
        yield
    least_probable = goals.least_probable(0)
    if Metric.CLASS_SENSITIVITY in spec.metrics and least_probable is not None:
        again = yield from remake(model, inputs, [least_probable], plain, rows=rows)
        others[Metric.CLASS_SENSITIVITY] = again.maps(plain, size_px).values[0].expand_as(at_input)
        del again
        yield
    found: list[dict[Metric, float]] = []
    for k, one in enumerate(at_input):

        def probability(images: Tensor, k: int = k) -> Tensor:
            return goals.probabilities(0, model.run(images))[:, k]

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
