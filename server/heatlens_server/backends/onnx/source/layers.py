"""Which tensors of a file are explained by default, for each task."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.find import (
    FoundLayer,
    ImageInput,
    Scores,
    find_candidates,
    find_layers,
    last_telling,
    size_of,
    with_stages,
)
from heatlens_server.backends.onnx.gradient.tape import Known, NotDifferentiable
from heatlens_server.core.tasks import Task

_COARSEST = 32
"""Maps of pooling pyramids (PSPNet, DeepLabV3) are coarser than a network's own."""

_WITH_WEIGHTS = frozenset(
    {
        *("BatchNormalization", "Conv", "ConvInteger", "ConvTranspose", "Einsum", "Gemm", "InstanceNormalization"),
        *("LayerNormalization", "MatMul", "MatMulInteger"),
    }
)


@dataclass(frozen=True, slots=True)
class ChosenLayers:
    """The tensors that are explained unless others are named.

    Attributes:
        candidates: all that may be explained, in the order in which they are computed.
        layers: the default first.
        why: what the default is.
        why_not: why there are no gradients by them; empty if there are.
    """

    candidates: tuple[FoundLayer, ...]
    layers: tuple[FoundLayer, ...]
    why: str
    why_not: str = ""

    @property
    def told(self) -> str:
        """What is chosen, in a sentence."""
        default = self.layers[0]
        size = f"{default.channels} x {default.height} x {default.width}"
        return f"Maps explain {default.value.name!r} ({size}), {self.why}; layers overrides that."


def choose_layers(model: ir.Model, known: Known, image: ImageInput, scores: Scores, task: Task) -> ChosenLayers:
    """Choose what is explained.

    Of segmentation the last tensor of the lowest resolution, where the bottleneck is (Vinogradova et al. 2020,
    arXiv:2002.11434), and of the finer ones before it; of other tasks see `find_layers`.

    Args:
        model: from `read_file`.
        known: its shapes, with the image's size.
        image: its input.
        scores: what is explained.
        task: what the network does.

    Raises:
        ModelLoadError: no value lies on the image like a map.
    """
    candidates = tuple(find_candidates(model, known, image))
    why = "the last tensor of the file on whose places the scores depend"
    try:
        if task is not Task.SEGMENTATION:
            # Maps of class scores, which fully convolutional networks average, are explained and do not explain.
            before = _before_scores(candidates, scores) if task.traits.has_image_classes else candidates
            return ChosenLayers(candidates, find_layers(model, known, image, scores, before or candidates), why)
        why = "the last tensor of the lowest resolution on whose places the scores depend"
        candidates = _before_scores(candidates, scores)
        fit = _up_to_coarsest(candidates, size_of(known, image)[0])
        coarsest = [layer for layer in fit if layer.height == fit[-1].height]
        default = last_telling(model, known, image, scores, coarsest)
        return ChosenLayers(candidates, with_stages(default, fit), why)
    except NotDifferentiable as error:
        return ChosenLayers(candidates, candidates[-1:], "the last tensor that lies on the image", str(error))


def _before_scores(candidates: Sequence[FoundLayer], scores: Scores) -> tuple[FoundLayer, ...]:
    """Those behind which there are weights still: the others are scores already."""
    waiting, seen = [scores.value], {scores.value}
    while waiting:
        node = waiting.pop().producer()
        if node is None or node.op_type in _WITH_WEIGHTS:
            continue
        further = [value for value in node.inputs if value is not None and value not in seen]
        waiting += further
        seen.update(further)
    return tuple(layer for layer in candidates if layer.value not in seen)


def _up_to_coarsest(candidates: Sequence[FoundLayer], height_px: int) -> list[FoundLayer]:
    """The maps up to the last one of the lowest resolution."""
    fit = [layer for layer in candidates if layer.height * _COARSEST >= height_px]
    coarsest = min((layer.height for layer in fit), default=0)
    while fit and fit[-1].height > coarsest:
        fit.pop()
    return fit
