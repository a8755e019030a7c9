"""Every method that takes steps, by name; the steps of one image's explanation, smoothing and measures included."""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType

from array_api_compat import array_namespace

from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import MapSpec, Steps
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import Target
from heatlens_server.maps.concrete import Array
from heatlens_server.maps.normalization import NormalizedMap, normalize
from heatlens_server.maps.steps.job import Explained, Stepper
from heatlens_server.maps.steps.masked_layer import ablation_cam, recipro_cam
from heatlens_server.maps.steps.measure_maps import Measures, measure_maps
from heatlens_server.maps.steps.network import Network, results
from heatlens_server.maps.steps.rise import rise
from heatlens_server.maps.steps.score_cam import is_cam, score_cam, ss_cam
from heatlens_server.maps.steps.smooth_grad_cam import smooth_grad_cam_plus_plus_in_steps

STEPPERS: Mapping[Method, Stepper] = MappingProxyType(
    {
        Method.SMOOTH_GRAD_CAM_PLUS_PLUS: smooth_grad_cam_plus_plus_in_steps,
        Method.SCORE_CAM: score_cam,
        Method.SS_CAM: ss_cam,
        Method.IS_CAM: is_cam,
        Method.ABLATION_CAM: ablation_cam,
        Method.RECIPRO_CAM: recipro_cam,
        Method.RISE: rise,
    }
)
"""The methods of many runs."""


_FACTORS = (0.9, 1.0, 1.1)
"""What the normalised input is multiplied by: test-time augmentation as in the `grad-cam` package 1.5.7."""

VARIANTS = 2 * len(_FACTORS)
"""How many images augmentation explains: each factor, flipped and not."""


def explain_in_steps(network: Network, image: ImageArray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
    """Explain one image with a spec that is `in_steps`; see `core.engine.SteppingEngine.steps`.

    Resume it where gradients can be taken.
    """
    yield from ()  # nothing runs before the first `next`, nor is there a step of no work
    inputs = network.inputs(image[None])
    size_px = (image.shape[0], image.shape[1])
    explained = yield from raw_maps(network, inputs, [target], spec, rows=rows)
    maps = explained.maps(spec, size_px)
    fixed = explained.goals.by_name(0)
    if spec.augment:
        yield
        maps = yield from _smoothed(network, inputs, fixed, spec, maps, rows=rows)
    (result,) = results(explained.goals, maps)
    # The goals may hold the graph of the whole forward pass: they are not kept across what follows.
    del explained
    if spec.metrics:
        yield
        measures: Measures = ()
        # A detector may find nothing.
        if fixed.count:
            measures = yield from measure_maps(network, inputs, fixed, spec, maps, rows=rows, remake=raw_maps)
        result = dataclasses.replace(result, faithfulness=measures)
    return result


def raw_maps(
    network: Network, inputs: Array, targets: Sequence[Target], spec: MapSpec, *, rows: int
) -> Generator[None, None, Explained]:
    """Explain inputs with any method, smoothing aside; of methods of many runs, one image only."""
    stepper = STEPPERS.get(spec.method)
    if stepper is None:
        return (yield from network.explain(inputs, targets, spec))
    (target,) = targets
    looks_at_layers = spec.method.traits.looks_at_layers
    if not looks_at_layers:
        spec = dataclasses.replace(spec, layers=spec.layers[:1])
    jobs = network.jobs(inputs, target, spec, rows=rows)
    raw = []
    for job in jobs:
        if job.goals.by_name(0).count:
            yield
            of_layer = yield from stepper(job)
        else:
            of_layer = array_namespace(inputs).zeros_like(job.features[:, :1])
        raw.append(job.on_image(of_layer) if looks_at_layers else of_layer)
    return jobs[0].explained(raw)


def _smoothed(
    network: Network, inputs: Array, target: Target, spec: MapSpec, plain: NormalizedMap[Array], *, rows: int
) -> Generator[None, None, NormalizedMap[Array]]:
    """Average finished maps over the image and its mirror image, each in three strengths.

    Args:
        network: the network.
        inputs: (1, C, H, W).
        target: names its goals.
        spec: how.
        plain: the maps of the image as it is, one of the six.
        rows: the most rows of a step.
    """
    xp = array_namespace(inputs)
    size_px = (inputs.shape[2], inputs.shape[3])
    total = plain.values
    variants = [(factor, flip) for flip in (False, True) for factor in _FACTORS if flip or factor != 1.0]
    step = 1 if spec.method.traits.in_steps else rows
    for start in range(0, len(variants), step):
        chosen = variants[start : start + step]
        changed = xp.concat([(xp.flip(inputs, axis=-1) if flip else inputs) * factor for factor, flip in chosen])
        explained = yield from raw_maps(network, changed, [target] * len(chosen), spec, rows=rows)
        maps = explained.maps(spec, size_px).values
        del explained
        for one, (_, flip) in zip(maps, chosen, strict=True):
            total = total + (xp.flip(one, axis=-1) if flip else one)
        yield
    return normalize(total / VARIANTS)
