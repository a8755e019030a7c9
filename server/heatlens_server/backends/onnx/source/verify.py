"""Whether the backward pass of a file is right, told by differences in float64: at every load, and of every export."""

import logging
from dataclasses import replace

from heatlens_server.backends.onnx.gradient.values import noise_for
from heatlens_server.backends.onnx.packed import open_packed
from heatlens_server.backends.onnx.providers import load_runtime
from heatlens_server.backends.onnx.source.judge import Verdict, gradient_by, judge
from heatlens_server.backends.onnx.source.load import LoadedFile
from heatlens_server.core.methods import Method

_log = logging.getLogger(__name__)

MOST_GRADIENT_ERROR = 0.05
"""Relative. A wrong rule is off by about 1; a maximum that changes places between differences, by some thousandths."""

USUAL_GRADIENT_ERROR = 1e-3
"""What is above it is said: of default layers of 20 networks the largest was 5e-7."""

MOST_FORWARD_ERROR = 2e-2
"""Relative; quantised files round otherwise. Where the forward pass in float64 is off by more, it is not the file's."""


def judge_layer(loaded: LoadedFile, layer: str) -> Verdict | None:
    """Judge the gradient of a file's scores by a layer, on an image of noise.

    Args:
        loaded: a file that can be differentiated.
        layer: one of its layers.

    Returns:
        The verdict; None if the forward pass cannot be run in float64.

    Raises:
        NotDifferentiable: there is no gradient by the layer.
        ModelLoadError: the graphs cannot be run.
    """
    passes = loaded.passes((layer,))
    if passes.backward is None:
        return None
    runtime = load_runtime()
    forward, _ = open_packed(runtime, passes.forward, runs_once=True)
    backward, _ = open_packed(runtime, passes.backward, runs_once=True)
    shape = (1, *loaded.image.shape(*loaded.info.preprocess.input_px))
    found = {passes.image: noise_for(loaded.image.value, shape)}
    names = [name for name in (*passes.scores, *passes.layers.values(), *passes.kept) if name not in found]
    found |= zip(dict.fromkeys(names), forward.run(list(dict.fromkeys(names)), dict(found)), strict=True)
    values = {str(value.name): value for node in loaded.model.graph for value in node.outputs}
    try:
        return judge(
            loaded.model,
            loaded.known,
            layer=values[layer],
            scores=[values[name] for name in passes.seeds],
            forward=found,
            gradient_at=gradient_by(passes, backward, layer, found),
        )
    # The reference runtime raises whatever an operator that it lacks meets.
    except Exception as error:
        _log.info("the gradient by %s cannot be judged (%s)", layer, type(error).__name__, exc_info=error)
        return None


def is_wrong(verdict: Verdict) -> bool:
    """Whether a gradient is not the derivative of the forward pass."""
    return verdict.forward_error <= MOST_FORWARD_ERROR and not verdict.gradient_error <= MOST_GRADIENT_ERROR


def verified(loaded: LoadedFile) -> LoadedFile:
    """Judge the gradient by the default layer, and say what is to be said; one that is wrong is not offered.

    Raises:
        ModelLoadError: the graphs cannot be run.
    """
    if Method.GRAD_CAM in loaded.info.refusals:
        return loaded
    layer = loaded.info.layers[0].name
    verdict = judge_layer(loaded, layer)
    if verdict is None or verdict.forward_error > MOST_FORWARD_ERROR:
        told = f"The gradient by {layer!r} could not be compared with differences in float64."
        return replace(loaded, assumptions=(*loaded.assumptions, told))
    if verdict.gradient_error <= USUAL_GRADIENT_ERROR:
        return loaded
    reason = (
        f"the gradient by {layer!r} is off from differences in float64 by {verdict.gradient_error:.1e} of its length"
    )
    if not is_wrong(verdict):
        return replace(loaded, assumptions=(*loaded.assumptions, f"{reason[0].upper()}{reason[1:]}."))
    _log.error("%s: please report the file's operators", reason)
    refusals = {method: reason for method in Method if method.traits.needs_gradient}
    return replace(loaded, info=replace(loaded.info, refusals=refusals))
