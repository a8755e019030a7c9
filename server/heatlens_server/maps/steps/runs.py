"""How many runs of the model an explanation takes: passes forward or backward, of one image each."""

from collections.abc import Mapping

from heatlens_server.core.engine import LayerShape, MapSpec
from heatlens_server.core.methods import Method, Metric
from heatlens_server.maps.faithfulness.measure import runs_to_measure
from heatlens_server.maps.steps.drive import VARIANTS
from heatlens_server.maps.steps.rise import RISE_MASKS
from heatlens_server.maps.steps.score_cam import IS_CAM_STEPS, SS_CAM_SAMPLES
from heatlens_server.maps.steps.smooth_grad_cam import SAMPLES

_PER_CHANNEL: Mapping[Method, int] = {
    Method.SCORE_CAM: 1,
    Method.SS_CAM: SS_CAM_SAMPLES,
    Method.IS_CAM: IS_CAM_STEPS,
    Method.ABLATION_CAM: 1,
}
_PASSES: Mapping[Method, int] = {Method.SHAPLEY_CAM: 2, Method.GUIDED_GRAD_CAM: 2}
"""How often methods of one pass differentiate, where that is not once. What runs backward runs forward as often."""


def model_runs(spec: MapSpec, count: int, shapes: Mapping[str, LayerShape]) -> int:
    """How many runs explaining one image takes at most, smoothing and measures included.

    Args:
        spec: how.
        count: the most goals that it has.
        shapes: of the layers, as far as they are known; others count as the largest of these.
    """
    of_maps = _of_maps(spec, count, shapes)
    runs = of_maps * (VARIANTS if spec.augment else 1)
    if spec.metrics:
        runs += 1 + count * runs_to_measure(spec.metrics)
    if Metric.MODEL_RANDOMISATION in spec.metrics:
        runs += of_maps
    if Metric.CLASS_SENSITIVITY in spec.metrics:
        runs += _of_maps(spec, 1, shapes)
    return runs


def _of_maps(spec: MapSpec, count: int, shapes: Mapping[str, LayerShape]) -> int:
    method = spec.method
    if not method.traits.in_steps:
        passes = _PASSES.get(method, 1)
        return passes * (1 + (0 if method.traits.class_free else count))
    if method is Method.RISE:
        return 1 + RISE_MASKS
    if method is Method.SMOOTH_GRAD_CAM_PLUS_PLUS:
        return 1 + len(spec.layers) * SAMPLES * (1 + count)
    most = [max(lengths) for lengths in zip(*shapes.values(), strict=True)] or [0, 0, 0]
    runs = 1
    for layer in spec.layers:
        channels, height, width = shapes.get(layer, most)
        # One more for what all constant channels share, or for the score of the whole image.
        runs += height * width if method is Method.RECIPRO_CAM else _PER_CHANNEL[method] * (channels + 1)
    return runs
