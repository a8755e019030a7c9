"""Which tensors of a file are explained by default, for each task."""

from collections.abc import Callable, Sequence
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
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Layout
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
        around = ", and other paths to the scores go around it" if default.is_bypassed else ""
        return f"Maps explain {default.value.name!r} ({size}), {self.why}{around}; layers overrides that."


def choose_layers(
    model: ir.Model, known: Known, image: ImageInput, scores: Scores, task: Task, *, are_named: bool = False
) -> ChosenLayers:
    """Choose what is explained.

    Of segmentation the last tensor of the lowest resolution, where the bottleneck is (Vinogradova et al. 2020,
    arXiv:2002.11434), and of the finer ones before it. Of detection the last tensor on which all heads of the network
    depend, so that every box has a map, and the last ones of every other resolution before it: of a neck that goes up
    and down, its finest map and the coarser ones on the way up. Of other tasks see `find_layers`.

    Args:
        model: from `read_file`.
        known: its shapes, with the image's size.
        image: its input.
        scores: what is explained.
        task: what the network does.
        are_named: whether others than these are explained: what is found is listed, and need not be there.

    Raises:
        ModelLoadError: no value lies on the image like a map.
    """
    candidates = tuple(find_candidates(model, known, image))
    why = "the last tensor of the file through which the scores depend on places"
    try:
        if task not in {Task.SEGMENTATION, Task.DETECTION}:
            # Maps of class scores, which fully convolutional networks average, are explained and do not explain.
            before = _before_scores(candidates, scores) if task.traits.has_image_classes else candidates
            return ChosenLayers(candidates, find_layers(model, known, image, scores, before or candidates), why)
        candidates = _before_scores(candidates, scores)
        if task is Task.DETECTION:
            why = "the last tensor of the file on which the scores of all boxes depend"
            candidates = tuple(layer for layer in candidates if not _is_of_queries(known, layer, scores))
            common = _common(candidates, scores)
            default = last_telling(model, known, image, scores, common)
            return ChosenLayers(candidates, with_stages(default, common, finer=False), why)
        why = "the last tensor of the lowest resolution on whose places the scores depend"
        fit = _up_to_coarsest(candidates, size_of(known, image)[0])
        coarsest = [layer for layer in fit if layer.height == fit[-1].height]
        default = last_telling(model, known, image, scores, coarsest)
        return ChosenLayers(candidates, with_stages(default, fit), why)
    except NotDifferentiable as error:
        return ChosenLayers(candidates, candidates[-1:], "the last tensor that lies on the image", str(error))
    except ModelLoadError:
        if not are_named:
            raise
        return ChosenLayers(candidates, (), "")


def _before_scores(candidates: Sequence[FoundLayer], scores: Scores) -> tuple[FoundLayer, ...]:
    """Those that scores are computed from, and behind which there are weights still: the others are scores already."""
    are_scores = _sources(scores.value, lambda value: _operator_of(value) in _WITH_WEIGHTS)
    sources = _sources(scores.value)
    return tuple(layer for layer in candidates if layer.value in sources and layer.value not in are_scores)


def _is_of_queries(known: Known, layer: FoundLayer, scores: Scores) -> bool:
    """Whether tokens are as many as the boxes: queries, which are no places of the image."""
    return layer.grid.layout is Layout.TOKENS and known.shapes[layer.value][1] == known.shapes[scores.value][1]


def _common(candidates: Sequence[FoundLayer], scores: Scores) -> list[FoundLayer]:
    """Those on which every head depends: each of the maps that scores are computed from without any other map."""
    values = {layer.value for layer in candidates}
    heads = values & _sources(scores.value, values.__contains__)
    common = values.intersection(*(_sources(head) for head in heads))
    return [layer for layer in candidates if layer.value in common]


def _sources(value: ir.Value, is_end: Callable[[ir.Value], bool] = lambda _: False) -> set[ir.Value]:
    """A value and what it is computed from; what an end is computed from is not looked at."""
    waiting, seen = [value], {value}
    while waiting:
        at = waiting.pop()
        node = at.producer()
        if node is None or node.op_type == "Shape" or is_end(at):
            continue
        further = [one for one in node.inputs if one is not None and one not in seen]
        waiting += further
        seen.update(further)
    return seen


def _operator_of(value: ir.Value) -> str:
    node = value.producer()
    return "" if node is None else node.op_type


def _up_to_coarsest(candidates: Sequence[FoundLayer], height_px: int) -> list[FoundLayer]:
    """The maps up to the last one of the lowest resolution."""
    fit = [layer for layer in candidates if layer.height * _COARSEST >= height_px]
    coarsest = min((layer.height for layer in fit), default=0)
    while fit and fit[-1].height > coarsest:
        fit.pop()
    return fit
