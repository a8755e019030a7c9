"""Every method that takes steps, by name."""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from heatlens_server.backends.torch.goals.base import has_goals
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.one_pass import RawMaps, results
from heatlens_server.backends.torch.passes.table import explain
from heatlens_server.backends.torch.steps.job import Job, Stepper
from heatlens_server.backends.torch.steps.masked_layer import ablation_cam, recipro_cam
from heatlens_server.backends.torch.steps.measure_maps import Measures, measure_maps
from heatlens_server.backends.torch.steps.score_cam import is_cam, score_cam, ss_cam
from heatlens_server.backends.torch.steps.smooth_grad_cam import smooth_grad_cam_plus_plus_in_steps
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import MapSpec, Steps
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import Target
from heatlens_server.maps.normalization import NormalizedMap, normalize

STEPPERS: Mapping[Method, Stepper] = MappingProxyType(
    {
        Method.SMOOTH_GRAD_CAM_PLUS_PLUS: smooth_grad_cam_plus_plus_in_steps,
        Method.SCORE_CAM: score_cam,
        Method.SS_CAM: ss_cam,
        Method.IS_CAM: is_cam,
        Method.ABLATION_CAM: ablation_cam,
        Method.RECIPRO_CAM: recipro_cam,
    }
)
"""The methods of many runs."""


_FACTORS = (0.9, 1.0, 1.1)
"""What the normalised input is multiplied by: test-time augmentation as in the `grad-cam` package 1.5.7."""


def explain_in_steps(model: TorchModel, image: ImageArray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
    """Explain one image with a spec that is `in_steps`; see `core.engine.SteppingEngine.steps`.

    Resume it with gradients enabled.
    """
    yield from ()  # nothing runs before the first `next`, nor is there a step of no work
    inputs = model.inputs(image[None])
    size_px = (image.shape[0], image.shape[1])
    explained = yield from raw_maps(model, inputs, [target], spec, rows=rows)
    maps = explained.maps(spec, size_px)
    fixed = explained.goals.by_name(0)
    if spec.augment:
        yield
        maps = yield from _smoothed(model, inputs, fixed, spec, maps, rows=rows)
    (result,) = results(explained.goals, maps)
    measured = spec.metrics and has_goals(explained.goals)
    # The goals may hold the graph of the whole forward pass: they are not kept across what follows.
    del explained
    if spec.metrics:
        yield
        measures: Measures = ()
        if measured:
            measures = yield from measure_maps(model, inputs, fixed, spec, maps, rows=rows, remake=raw_maps)
        result = dataclasses.replace(result, faithfulness=measures)
    return result


def raw_maps(
    model: TorchModel, inputs: Tensor, targets: Sequence[Target], spec: MapSpec, *, rows: int
) -> Generator[None, None, RawMaps]:
    """Explain inputs with any method, smoothing aside: in one go, or, one image only, in steps."""
    stepper = STEPPERS.get(spec.method)
    if stepper is None:
        return explain(model, inputs, targets, spec)
    with torch.no_grad():
        output, outputs = model.record(inputs, spec.layers, differentiate=False)
        goals = model.task.goals(output, targets, score=spec.score, run=model.run_images)
    size_px = (inputs.shape[2], inputs.shape[3])
    if not has_goals(goals):
        nothing = [torch.zeros_like(model.features(layer, outputs[layer])[:, :1]) for layer in spec.layers]
        return RawMaps(goals, nothing).on_image(model, size_px)
    raw = []
    for layer in spec.layers:
        yield
        raw.append((yield from stepper(Job(model, inputs, goals, layer, outputs[layer], rows))))
    return RawMaps(goals, raw).on_image(model, size_px)


def _smoothed(
    model: TorchModel, inputs: Tensor, target: Target, spec: MapSpec, plain: NormalizedMap[Tensor], *, rows: int
) -> Generator[None, None, NormalizedMap[Tensor]]:
    """Average finished maps over the image and its mirror image, each in three strengths.

    Args:
        model: the network.
        inputs: (1, C, H, W).
        target: names its goals.
        spec: how.
        plain: the maps of the image as it is, one of the six.
        rows: the most rows of a step.
    """
    size_px = (inputs.shape[2], inputs.shape[3])
    total = plain.values
    variants = [(factor, flip) for flip in (False, True) for factor in _FACTORS if flip or factor != 1.0]
    step = 1 if spec.method.traits.in_steps else rows
    for start in range(0, len(variants), step):
        chosen = variants[start : start + step]
        changed = torch.cat([(inputs.flip(-1) if flip else inputs) * factor for factor, flip in chosen])
        explained = yield from raw_maps(model, changed, [target] * len(chosen), spec, rows=rows)
        maps = explained.maps(spec, size_px).values
        del explained
        for one, (_, flip) in zip(maps, chosen, strict=True):
            total = total + (one.flip(-1) if flip else one)
        yield
    return normalize(total / (len(variants) + 1))
