"""Segmentation files: the logits of each pixel, before what the file makes of them, at the size of the image."""

from dataclasses import dataclass

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.find import ImageInput, Scores, size_of
from heatlens_server.backends.onnx.gradient.tape import BATCH, Known, Shape
from heatlens_server.backends.onnx.source.added import Added, NotReturned

_CONVENTIONAL = ("logits", "out")
"""What transformers and torchvision call the scores, if a file returns more than them."""

_PASSED_ON_BACK = frozenset({"Cast", "Identity", "Reshape", "Resize", "Squeeze", "Transpose", "Unsqueeze"})
_ACTIVATIONS = {"Softmax": "softmax", "LogSoftmax": "softmax", "Sigmoid": "sigmoid"}


@dataclass(frozen=True, slots=True)
class _Pixels:
    """Scores of each place of the image.

    Attributes:
        value: of the graph, (N, C, h, w) or (N, h, w, C).
        output: the file's output that is made of them.
        channel_axis: 1 or 3.
        activation: as in `Scores`.
        are_ids: whether the output is the ids of the classes of the largest scores.
    """

    value: ir.Value
    output: ir.Value
    channel_axis: int
    activation: str
    are_ids: bool

    @property
    def told(self) -> str:
        """What is left behind, in a sentence; empty if nothing is."""
        if not self.activation:
            return ""
        made = "the class ids" if self.are_ids else f"the {self.activation}"
        return (
            f"The file's output {self.output.name!r} is {made} of {self.value.name!r}: maps explain that tensor's "
            "logits; output names another output."
        )


def find_pixels(model: ir.Model, known: Known, image: ImageInput, output: str = "") -> tuple[Scores, Known, str]:
    """The logits of each pixel: a last Softmax, Sigmoid or ArgMax is left behind.

    Args:
        model: from `read_file`; what brings the logits to (N, C, H, W) is added to it.
        known: its shapes.
        image: its input.
        output: the name of the output that has the scores; empty to find it.

    Returns:
        The scores, what is known then, and what was left behind, in a sentence or "". Logits of another size than the
        image's are resized bilinearly.

    Raises:
        NotReturned: there are none, or it is not clear which; names all outputs with their shapes.
    """
    size_px = size_of(known, image)
    named = [value for value in model.graph.outputs if output in {"", value.name}]
    found = [pixels for value in named if (pixels := _as_pixels(value, known, image, size_px)) is not None]
    if len(found) > 1:
        found = [pixels for pixels in found if pixels.output.name in _CONVENTIONAL] or found
    if len(found) != 1:
        outputs = ", ".join(f"{value.name} {known.shapes.get(value, '')}" for value in model.graph.outputs)
        asked = f"output {output!r} has no" if output else f"{len(found)} outputs look like"
        raise NotReturned(f"{asked} scores of pixels (N, classes, h, w), set output; the file's outputs: {outputs}")
    (pixels,) = found
    added = Added(model, known)
    value = _at_size(added, pixels, size_px)
    scores = Scores(value, pixels.output, added.shape(value)[1], pixels.activation)
    return scores, added.finish(), pixels.told


def _as_pixels(value: ir.Value, known: Known, image: ImageInput, size_px: tuple[int, int]) -> _Pixels | None:
    scores, at, axis, activation, are_ids = value, value, 0, "", False
    while (node := at.producer()) is not None and node.op_type in {*_PASSED_ON_BACK, *_ACTIVATIONS, "ArgMax"}:
        source = node.inputs[0]
        if source is None:
            break
        at = source
        if node.op_type in {*_ACTIVATIONS, "ArgMax"}:
            scores, activation = source, _ACTIVATIONS.get(node.op_type, "softmax")
            are_ids = are_ids or node.op_type == "ArgMax"
            if "axis" in node.attributes:
                axis = node.attributes["axis"].as_int() % 4
        if node.op_type in _ACTIVATIONS:
            break
    shape = known.shapes.get(scores, ())
    if len(shape) != 4 or shape[0] != BATCH or min(shape[1:]) < 0:
        return None
    axes = [axis] if axis else [3, 1] if image.channels_last else [1, 3]
    fitting = [axis for axis in axes if axis in {1, 3} and _fits(_places(shape, axis), size_px)]
    return _Pixels(scores, value, fitting[0], activation, are_ids) if fitting else None


def _places(shape: Shape, channel_axis: int) -> tuple[int, int]:
    return (shape[2], shape[3]) if channel_axis == 1 else (shape[1], shape[2])


def _fits(size: tuple[int, int], size_px: tuple[int, int]) -> bool:
    """Whether a map has several places, in the image's proportions but for the rounding of its sides."""
    return max(size) > 1 and abs(size[0] * size_px[1] - size[1] * size_px[0]) <= 2 * max(size_px)


def _at_size(added: Added, pixels: _Pixels, size_px: tuple[int, int]) -> ir.Value:
    """Logits (N, C, H, W)."""
    value, shape = pixels.value, added.shape(pixels.value)
    if pixels.channel_axis == 3:
        shape = (BATCH, shape[3], *shape[1:3])
        value = added.op("Transpose", [value], shape, perm=[0, 3, 1, 2])
    if _places(shape, 1) != size_px:
        # As torch.nn.functional.interpolate does, bilinear, with align_corners=False.
        inputs = [value, None, None, added.ints(*size_px)]
        value = added.op("Resize", inputs, (*shape[:2], *size_px), mode="linear", axes=[2, 3])
    return value
