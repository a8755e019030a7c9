"""What a file's tensors are: its image, its scores, and the values that lie on the image like a map."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.differentiate import differentiate
from heatlens_server.backends.onnx.gradient.inner_values import attention_scores, is_computed, linear_outputs
from heatlens_server.backends.onnx.gradient.paths import bottlenecks
from heatlens_server.backends.onnx.gradient.tape import BATCH, Array, Known, NotDifferentiable, Shape
from heatlens_server.backends.onnx.gradient.values import noise_for, open_graph
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.preprocess import MAX_CHANNELS

_MOST_PREFIX_TOKENS = 8
"""Tokens before the grid: class, distillation, registers."""

_LAST_CANDIDATES, _MOST_CANDIDATES = 12, 48
"""Of so many of the last ones at a time, and of so many in all, it is asked whether scores depend on their places."""

_LEAST_SHARE = 0.5
"""The share of a map's places on which scores must depend."""

_MOST_IMAGES = 32
"""How many noise images are tried: of one, a maximum over all places takes as many places as there are channels."""

_MOST_LAYERS = 5

_QUANTISERS = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear"})
"""Their outputs are integers, whose scales are elsewhere."""

_PASSED_ON_BACK = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze"})
_BEHIND_FEATURES = frozenset({"Add", "Gemm", "MatMul", "Unsqueeze", *_PASSED_ON_BACK})
_ACTIVATIONS = {"Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}


@dataclass(frozen=True, slots=True)
class ImageInput:
    """The input that takes images.

    Attributes:
        value: of the graph.
        channels: how many.
        height_px: 0 if the file leaves it open.
        width_px: 0 if the file leaves it open.
        channels_last: whether it is (N, H, W, C).
    """

    value: ir.Value
    channels: int
    height_px: int
    width_px: int
    channels_last: bool

    def shape(self, height_px: int, width_px: int) -> Shape:
        """Of one image, without the batch."""
        if self.channels_last:
            return height_px, width_px, self.channels
        return self.channels, height_px, width_px


@dataclass(frozen=True, slots=True)
class Scores:
    """The logits of a classifier.

    Attributes:
        value: of the graph, (N, C) or (N, C, 1, 1).
        output: the graph's output that is made of them.
        class_count: C.
        activation: what the file makes of logits: "softmax", "sigmoid", or "" if it returns them.
    """

    value: ir.Value
    output: ir.Value
    class_count: int
    activation: str


@dataclass(frozen=True, slots=True)
class FoundLayer:
    """A value whose places are those of the image.

    Attributes:
        value: of the graph.
        grid: how it is read as a map.
        channels: of each place.
        height: rows of the map.
        width: columns of the map.
        is_bypassed: whether scores depend on the image by paths around it as well, where that was looked at.
    """

    value: ir.Value
    grid: Grid
    channels: int
    height: int
    width: int
    is_bypassed: bool = field(default=False, compare=False)


def find_image(model: ir.Model) -> ImageInput:
    """The one input of four dimensions with 1 to 16 channels.

    Raises:
        ModelLoadError: there is none, or several; names all inputs with their shapes.
    """
    found = [image for value in model.graph.inputs if (image := _as_image(value)) is not None]
    if len(found) != 1:
        inputs = ", ".join(f"{value.name} {_shape_text(value)}" for value in model.graph.inputs)
        raise ModelLoadError(f"{len(found)} inputs of the file look like images, not one: {inputs}")
    return found[0]


def _as_image(value: ir.Value) -> ImageInput | None:
    if value.shape is None or len(value.shape) != 4:
        return None
    lengths = [length if isinstance(length, int) and length > 0 else 0 for length in value.shape]
    _n, first, second, last = lengths
    if 1 <= first <= MAX_CHANNELS and not 1 <= last <= min(first, 4):
        return ImageInput(value, first, second, last, channels_last=False)
    if 1 <= last <= MAX_CHANNELS:
        return ImageInput(value, last, first, second, channels_last=True)
    return None


def _shape_text(value: ir.Value) -> str:
    return "of unknown shape" if value.shape is None else f"({', '.join(str(length) for length in value.shape)})"


def find_scores(model: ir.Model, known: Known, output: str = "") -> Scores:
    """The logits: a last Softmax or Sigmoid is left behind.

    Args:
        model: from `read_file`.
        known: its shapes.
        output: the name of the output that has the scores; empty to find it.

    Raises:
        ModelLoadError: there are none, or it is not clear which; names all outputs with their shapes.
    """
    named = [value for value in model.graph.outputs if output in {"", value.name}]
    found = [scores for value in named if (scores := _as_scores(value, known)) is not None]
    if len(found) > 1:
        found = [scores for scores in found if scores.activation == "softmax"] or found
    if len(found) != 1:
        outputs = ", ".join(f"{value.name} {known.shapes.get(value, '')}" for value in model.graph.outputs)
        asked = f"output {output!r} has no" if output else f"{len(found)} outputs look like"
        raise ModelLoadError(f"{asked} scores (N, classes); the file's outputs: {outputs}")
    return found[0]


def _as_scores(value: ir.Value, known: Known) -> Scores | None:
    shape = known.shapes.get(value, ())
    if (
        shape[:1] != (BATCH,)
        or len(shape) < 2
        or any(length != 1 for length in shape[2:])
        or min(shape[1:], default=1) < 0
    ):
        return None
    at = value
    passed_on = {*_PASSED_ON_BACK, "DequantizeLinear", "QuantizeLinear"}
    while (node := at.producer()) is not None and node.op_type in {*passed_on, *_ACTIVATIONS}:
        source = node.inputs[0]
        if source is None:
            break
        if node.op_type in _ACTIVATIONS:
            return Scores(source, value, shape[1], _ACTIVATIONS[node.op_type])
        at = source
    return Scores(value, value, shape[1], "")


def find_layers(
    model: ir.Model,
    known: Known,
    image: ImageInput,
    scores: Scores,
    candidates: Sequence[FoundLayer] | None = None,
) -> tuple[FoundLayer, ...]:
    """The values that can be explained, the default first: the last on whose places the scores depend.

    Where paths from places go around it, such as that of a mean beside a standard deviation, the default is the last
    of its size that all of them go through, if there is one before it. The others are the last ones of every finer
    resolution, from the coarsest on.

    Args:
        model: from `read_file`.
        known: its shapes, with the image's size.
        image: the input.
        scores: the logits.
        candidates: those to choose from; None for all.

    Raises:
        ModelLoadError: no value lies on the image like a map.
        NotDifferentiable: an operator behind the last ones has no rule.
    """
    candidates = list(find_candidates(model, known, image)) if candidates is None else candidates
    default = last_telling(model, known, image, scores, candidates)
    if default.is_bypassed:
        default = _before_bypass(model, known, image, scores, candidates, default=default)
    return with_stages(default, candidates)


def last_telling(
    model: ir.Model, known: Known, image: ImageInput, scores: Scores, candidates: Sequence[FoundLayer]
) -> FoundLayer:
    """The last of some values on whose places the scores depend; see `find_layers`."""
    if not candidates:
        raise ModelLoadError("no tensor of the file lies on the image like a map")
    telling: list[FoundLayer] = []
    # Networks of several branches whose scores are of class tokens have many behind the last that tells of places.
    for last in range(0, min(len(candidates), _MOST_CANDIDATES), _LAST_CANDIDATES):
        asked = candidates[max(len(candidates) - last - _LAST_CANDIDATES, 0) : len(candidates) - last]
        shares = _shares(model, known, image, scores, asked)
        if telling := [layer for layer, share in zip(asked, shares, strict=True) if share > _LEAST_SHARE]:
            break
    else:
        raise ModelLoadError(
            "the scores depend on no tensor of the file that lies on the image like a map: layers names one"
        )
    is_bypassed = telling[-1].value not in bottlenecks(scores.value, by_gradient=True)
    return replace(telling[-1], is_bypassed=is_bypassed)


def _before_bypass(
    model: ir.Model,
    known: Known,
    image: ImageInput,
    scores: Scores,
    candidates: Sequence[FoundLayer],
    *,
    default: FoundLayer,
) -> FoundLayer:
    """The bottleneck before a layer that the graph goes around, if scores depend on its places by that way.

    Residuals go around the norm of a transformer's last block with the class token alone. A layer with class tokens
    stays the default in any case, and so does a coarser one than the bottleneck: stems say little of classes.
    """
    common_to_all = bottlenecks(scores.value, by_gradient=True)
    before = [layer for layer in candidates[: candidates.index(default)] if layer.value in common_to_all][-1:]
    if not before:
        return default
    try:
        shares = _shares(model, known, image, scores, before, constant=default.value)
    except NotDifferentiable:
        return default
    if shares[0] <= _LEAST_SHARE:
        return replace(default, is_bypassed=False)
    is_as_large = (before[0].height, before[0].width) == (default.height, default.width)
    return before[0] if is_as_large and not default.grid.prefix else default


def with_stages(default: FoundLayer, candidates: Sequence[FoundLayer], *, finer: bool = True) -> tuple[FoundLayer, ...]:
    """A layer, and one before it of every finer resolution, or of every other one, from the coarsest on.

    It is the last that all of the network goes through, such as the output of a residual block; or, where nothing does,
    as in a U-Net, the last.
    """
    before = candidates[: candidates.index(default)]
    common_to_all = bottlenecks(default.value)
    ends = {(layer.height, layer.width): layer for layer in before}
    ends |= {(layer.height, layer.width): layer for layer in before if layer.value in common_to_all}
    ends.pop((default.height, default.width), None)
    others = sorted(ends.values(), key=lambda layer: layer.height * layer.width)
    return (default, *(layer for layer in others if layer.height > default.height or not finer))[:_MOST_LAYERS]


def _shares(
    model: ir.Model,
    known: Known,
    image: ImageInput,
    scores: Scores,
    layers: Sequence[FoundLayer],
    *,
    constant: ir.Value | None = None,
) -> list[float]:
    """For each layer, the share of its places on which the scores depend, by gradients for noise.

    One value may count as a constant: what depends on places through it is not seen.
    """
    copy, values = _copied(model)
    height_px, width_px = size_of(known, image)
    kind = known.dtype
    features = _before_head(scores.value)
    shape = known.shapes[features]
    seed = ir.Value(name="seed", type=ir.TensorType(kind), shape=ir.Shape(["n", *shape[1:]]))
    copied = Known(
        {values[value.name]: lengths for value, lengths in known.shapes.items() if value.name in values},
        {values[value.name]: array for value, array in known.constants.items() if value.name in values},
        kind,
        known.opset,
    )
    targets = [values[layer.value.name] for layer in layers]
    held = [] if constant is None else [values[constant.name]]
    backward = differentiate(list(copy.graph), {values[features.name]: seed}, targets, copied, constants=held)
    copy.graph.inputs.append(seed)
    copy.graph.extend(backward.nodes)
    for value in backward.initializers:
        copy.graph.register_initializer(value)
    gradients = [backward.gradients[value] for value in targets]
    copy.graph.outputs[:] = [value for value in gradients if value is not None]
    if not copy.graph.outputs:
        return [0.0] * len(layers)
    with_gradient = [layer for layer, gradient in zip(layers, gradients, strict=True) if gradient is not None]
    session = open_graph(copy)
    read: list[Array] = []
    shares: list[float] = []
    for number in range(_MOST_IMAGES):
        feeds = {
            str(image.value.name): noise_for(image.value, (1, *image.shape(height_px, width_px)), number),
            str(seed.name): np.random.default_rng(number).normal(size=(1, *shape[1:])).astype(kind.numpy()),
        }
        here = [_read(found[0], layer) for found, layer in zip(session.run(None, feeds), with_gradient, strict=True)]
        read = [one | before for one, before in zip(here, read, strict=True)] if read else here
        before, shares = shares, [float(places.mean()) for places in read]
        grows = (share > (before[at] if before else 0) for at, share in enumerate(shares) if share <= _LEAST_SHARE)
        if not any(grows):
            break
    by_layer = iter(shares)
    return [0.0 if gradient is None else next(by_layer) for gradient in gradients]


def _before_head(scores: ir.Value) -> ir.Value:
    """What the last linear layer reads: the weights of a head that is yet to be trained may be zero."""
    at = scores
    while (node := at.producer()) is not None and node.op_type in _BEHIND_FEATURES:
        computed = [value for value in node.inputs if value is not None and is_computed(value)]
        if len(computed) != 1:
            break
        at = computed[0]
        if node.op_type in {"Gemm", "MatMul"}:
            return at
    return scores


def _read(gradient: Array, layer: FoundLayer) -> Array:
    """Where a map's gradient, of one image, is not zero."""
    if layer.grid.layout is Layout.TOKENS:
        size: Array = np.abs(gradient[layer.grid.prefix :]).sum(1)
    else:
        size = np.abs(gradient).sum(-1 if layer.grid.layout is Layout.CHANNELS_LAST else 0)
    return np.greater(size, 0.0)


def _copied(model: ir.Model) -> tuple[ir.Model, dict[str | None, ir.Value]]:
    """A copy of a model to add to, and its values by name."""
    copy = model.clone()
    values = {value.name: value for value in (*copy.graph.inputs, *copy.graph.initializers.values())}
    return copy, values | {value.name: value for node in copy.graph for value in node.outputs}


def size_of(known: Known, image: ImageInput) -> tuple[int, int]:
    """(height, width) of the image, in pixels."""
    _n, *lengths = known.shapes[image.value]
    return (lengths[0], lengths[1]) if image.channels_last else (lengths[1], lengths[2])


def layer_of(
    model: ir.Model, known: Known, image: ImageInput, value: ir.Value, grid: Grid | None = None
) -> FoundLayer | None:
    """How a value lies on the image.

    Args:
        model: from `read_file`.
        known: its shapes.
        image: its input.
        value: which one.
        grid: how it is read as a map; None to find it.

    Returns:
        The layer; None if the value's shape is not that of a map.
    """
    shape = known.shapes.get(value, ())
    if shape[:1] != (BATCH,) or min(shape[1:], default=1) < 0:
        return None
    if grid is None:
        found = [layer for layer in find_candidates(model, known, image) if layer.value is value]
        sizes = {(layer.height, layer.width) for layer in find_candidates(model, known, image)}
        return found[0] if found else _as_layer(value, shape, sizes, size_of(known, image))
    if grid.layout is Layout.TOKENS:
        fits = len(shape) == 3 and shape[1] == grid.prefix + grid.height * grid.width
        return FoundLayer(value, grid, shape[2], grid.height, grid.width) if fits else None
    if len(shape) != 4:
        return None
    channels, height, width = (shape[3], *shape[1:3]) if grid.layout is Layout.CHANNELS_LAST else shape[1:]
    return FoundLayer(value, grid, channels, height, width)


_LINEAR = frozenset({"Flatten", "Gemm", "GlobalAveragePool", "MatMul", "ReduceMean", "Reshape", "Squeeze", "Unsqueeze"})


def has_linear_head(known: Known, layer: FoundLayer, scores: Scores) -> bool:
    """Whether scores are linear in the means over places of a layer: what CAM takes."""
    at, pooled = scores.value, False
    while at is not layer.value:
        node = at.producer()
        computed = [] if node is None else [value for value in node.inputs if is_computed(value)]
        if node is None or len(computed) != 1 or node.op_type not in {*_LINEAR, "Add"} or computed[0] is None:
            return False
        at = computed[0]
        if node.op_type in {"GlobalAveragePool", "ReduceMean"}:
            pooled = len(known.shapes.get(at, ())) == 4 and at is layer.value
    return pooled


def find_candidates(model: ir.Model, known: Known, image: ImageInput) -> Iterator[FoundLayer]:
    """The values that lie on the image, in the order in which they are computed."""
    height_px, width_px = size_of(known, image)
    grids: set[tuple[int, int]] = set()
    excluded = attention_scores(model, known) | linear_outputs(model, known)
    for node in model.graph:
        value = node.outputs[0]
        shape = known.shapes.get(value, ())
        if node.op_type in {"Conv", "ConvInteger", "MaxPool", "AveragePool"} and len(shape) == 4:
            grids.add((shape[2], shape[3]))
        if value in excluded or node.op_type in _QUANTISERS or shape[:1] != (BATCH,) or min(shape[1:], default=1) < 0:
            continue
        layer = _as_layer(value, shape, grids, (height_px, width_px))
        if layer is not None and layer.height * layer.width > 1:
            grids.add((layer.height, layer.width))
            yield layer


def _as_layer(
    value: ir.Value, shape: Shape, grids: set[tuple[int, int]], image_px: tuple[int, int]
) -> FoundLayer | None:
    def lies_on_image(height: int, width: int) -> bool:
        return (height, width) in grids or _in_proportion((height, width), image_px)

    if len(shape) == 4:
        _n, one, two, three = shape
        if lies_on_image(two, three):
            return FoundLayer(value, Grid(), one, two, three)
        if lies_on_image(one, two):
            return FoundLayer(value, Grid(Layout.CHANNELS_LAST), three, one, two)
    if len(shape) == 3:
        _n, tokens, channels = shape
        for height, width in sorted(grids, key=lambda grid: -grid[0] * grid[1]):
            prefix = tokens - height * width
            if 0 <= prefix <= _MOST_PREFIX_TOKENS and height * width > 1:
                return FoundLayer(value, Grid(Layout.TOKENS, prefix, height, width), channels, height, width)
    return None


def _in_proportion(size: tuple[int, int], image_px: tuple[int, int]) -> bool:
    """Whether both sides are the image's, divided by one power of two and rounded."""
    factors = (2**power for power in range(1, 7))
    return any(size == tuple(-(-side // factor) for side in image_px) for factor in factors)
