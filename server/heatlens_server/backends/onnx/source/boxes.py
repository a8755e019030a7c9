"""Detection files: the boxes that a network scores, before any of them is left out, in the forms that are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.find import ImageInput, Scores, size_of
from heatlens_server.backends.onnx.gradient.tape import BATCH, Array, Known, input_of
from heatlens_server.backends.onnx.gradient.values import noise_for, open_graph
from heatlens_server.backends.onnx.network import Corners, Detector, RowScores
from heatlens_server.backends.onnx.source.added import Added, NotReturned
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError

_OVERLAPS = {"yolov8": 0.7, "yolov5": 0.45, "end2end": 1.0}
"""The intersection over union from which on the worse of two boxes is left out, as by default in the tools of each."""

_MOST_CHOSEN = 1000
"""Boxes of which a network has left the worse ones out itself."""

_DENSE_OVERLAP = 0.65
"""The same, where boxes of pairs of outputs are as many as the places of maps."""

_STRIDES = (4, 8, 16, 32, 64, 128)
_COARSEST_FIRST = 16
"""The largest stride that the finest map of a detector has."""

_MOST_ANCHORS = 9
"""Boxes of one place of a map."""

_MOST_RELATIVE = 2.0
"""Parts of the image are no larger than this, wherever a box may be."""

_REARRANGING = frozenset({"Cast", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True, slots=True)
class Suppression:
    """What goes into a file's NonMaxSuppression.

    Attributes:
        boxes: (N, A, 4).
        scores: (N, C, A).
        corners: what the boxes' numbers are, as far as the file tells.
        most_overlap: as in `Detector`.
    """

    boxes: ir.Value
    scores: ir.Value
    corners: Corners
    most_overlap: float


@dataclass(frozen=True, slots=True)
class FoundBoxes:
    """What a detector returns.

    Attributes:
        scores: of rows, (N, A, C), or (N, A, C + 1) with a last class for none.
        boxes: (N, A, 4).
        detector: how they are read.
        told: what was found or assumed, one sentence each, with the key that overrides it.
    """

    scores: Scores
    boxes: ir.Value
    detector: Detector
    told: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a form that is known.

    Attributes:
        form: as the configuration's `detector`.
        output: of the file, that has the scores.
        boxes: (N, A, 4).
        scores: (N, A, C).
        corners: what the boxes' numbers are; None if they are corners of pixels, or else relative ones of the centre.
        most_overlap: as in `Detector`.
    """

    form: str
    output: ir.Value
    boxes: ir.Value
    scores: ir.Value
    corners: Corners | None
    most_overlap: float


_Tried = Callable[[], tuple[Array, Array]]
"""Runs the network on noise, once; returns boxes (1, A, 4) and scores (1, A, C)."""


def cut_suppression(model: ir.Model, config: ModelConfig) -> Suppression | None:
    """Let a graph end before its NonMaxSuppression, if it has one and the configuration does not name another end.

    Raises:
        ModelLoadError: it has several, or none where the configuration says so.
    """
    nodes = [node for node in model.graph if node.op_type == "NonMaxSuppression"]
    is_wanted = config.detector == "nms" or (config.detector == "auto" and config.output is None)
    if config.detector == "nms" and not nodes:
        raise ModelLoadError("detector: the file has no operator NonMaxSuppression")
    if not nodes or not is_wanted or config.task not in {"auto", "detection"}:
        return None
    if len(nodes) > 1:
        raise ModelLoadError(f"the file has {len(nodes)} operators NonMaxSuppression, not one: set output and detector")
    (node,) = nodes
    boxes, scores, *rest = node.inputs
    if boxes is None or scores is None:
        raise ModelLoadError(f"NonMaxSuppression of node {node.name!r} lacks an input")
    model.graph.outputs[:] = [boxes, scores]
    common.RemoveUnusedNodesPass()(model)
    threshold = rest[1].const_value if len(rest) > 1 and rest[1] is not None else None
    if node.attributes["center_point_box"].as_int():
        corners = Corners.CENTER
    else:
        # ONNX says y first. Torch's exporter passes torchvision's boxes on, x first: overlaps are the same.
        corners = Corners.XY if str(model.producer_name).startswith("pytorch") else Corners.YX
    return Suppression(boxes, scores, corners, 0.0 if threshold is None else float(threshold.numpy().ravel()[0]))


def find_boxes(
    model: ir.Model,
    known: Known,
    image: ImageInput,
    config: ModelConfig,
    *,
    suppression: Suppression | None = None,
    name_count: int = 0,
    is_told: bool = False,
) -> tuple[FoundBoxes, Known]:
    """The boxes and scores of a detector; a last sigmoid or softmax is left behind.

    Args:
        model: from `read_file`; what brings boxes and scores to rows is added to it.
        known: its shapes.
        image: its input.
        config: of the model.
        suppression: what `cut_suppression` returned.
        name_count: how many classes have names; 0 if nothing tells.
        is_told: whether something says that the file is a detector.

    Raises:
        NotReturned: there are none, or it is not clear which; names all outputs with their shapes, and the keys.
    """
    added = Added(model, known)
    if suppression is not None:
        rows = _of_suppression(added, suppression)
    else:
        rows = _of_outputs(model, added, size_of(known, image), config, name_count=name_count, is_told=is_told)

    @cache
    def tried() -> tuple[Array, Array]:
        boxes, scores = _run(model, known, image, [rows.boxes, rows.scores])
        return boxes, scores

    kind, value, about_scores = _scores_of(added, rows, config, tried)
    corners, is_relative = _corners_of(rows, config, tried)
    count, columns = added.shape(value)[1:]
    class_count = columns - 1 if kind is RowScores.SOFTMAX else columns
    about = (
        f'The file is read as a detector, detector = "{rows.form}": {count} boxes, boxes = '
        f'"{corners}{"-relative" if is_relative else ""}", with scores of {class_count} classes; detector and boxes '
        "override that."
    )
    is_given = config.detector != "auto" and config.boxes != "auto"
    activation = "" if kind is RowScores.PROBABILITY or value is rows.scores else kind.value
    found = FoundBoxes(
        scores=Scores(value, rows.output, class_count, activation),
        boxes=rows.boxes,
        detector=Detector(kind, corners, is_relative, rows.most_overlap),
        told=(*(() if is_given else (about,)), *about_scores),
    )
    return found, added.finish()


def _of_suppression(added: Added, given: Suppression) -> _Rows:
    shapes = [added.shape(value) for value in (given.boxes, given.scores)]
    for shape, value in zip(shapes, (given.boxes, given.scores), strict=True):
        if len(shape) != 3 or shape[0] != BATCH or min(shape[1:]) < 1:
            raise ModelLoadError(
                f"what NonMaxSuppression takes, {value.name!r} of shape {shape}, is not of a fixed number of boxes: "
                "set output and detector"
            )
    _n, classes, count = shapes[1]
    scores = added.op("Transpose", [given.scores], (BATCH, count, classes), perm=[0, 2, 1])
    return _Rows("nms", given.scores, given.boxes, scores, given.corners, given.most_overlap)


def _of_outputs(
    model: ir.Model, added: Added, size_px: tuple[int, int], config: ModelConfig, *, name_count: int, is_told: bool
) -> _Rows:
    form, output, boxes = _form_of(model, added, size_px, config, is_told=is_told)
    if form == "detr":
        is_dense = _is_dense(added.shape(boxes)[1], size_px)
        return _Rows(form, output, boxes, output, None, _DENSE_OVERLAP if is_dense else 1.0)
    if form == "end2end":
        boxes, scores = _of_chosen(added, output, name_count)
        return _Rows(form, output, boxes, scores, Corners.XY, _OVERLAPS[form])
    first, axis = (5, 2) if form == "yolov5" else (4, 1)
    columns = added.shape(output)[axis] - first
    # Behind the classes there may be coefficients of masks, or places of joints.
    columns = name_count if 0 < name_count < columns else columns
    boxes, scores = _part(added, output, axis, 0, 4), _part(added, output, axis, first, first + columns)
    if form == "yolov5":
        scores = added.op("Mul", [scores, _part(added, output, axis, 4, 5)], added.shape(scores))
    else:
        boxes, scores = (
            added.op("Transpose", [value], (BATCH, *added.shape(value)[:0:-1]), perm=[0, 2, 1])
            for value in (boxes, scores)
        )
    return _Rows(form, output, boxes, scores, Corners.CENTER, _OVERLAPS[form])


def _form_of(
    model: ir.Model, added: Added, size_px: tuple[int, int], config: ModelConfig, *, is_told: bool
) -> tuple[str, ir.Value, ir.Value]:
    """Of which form a file is, and which of its outputs have scores and boxes."""
    outputs = [value for value in model.graph.outputs if _is_of_rows(added.shape(value))]
    named = [value for value in outputs if config.output in {None, value.name}]
    found: list[tuple[str, ir.Value, ir.Value]] = []
    if config.detector in {"auto", "detr"}:
        found = [("detr", scores, boxes) for scores in named for boxes in outputs if _are_paired(added, scores, boxes)]
        if len(found) > 1:
            # Scores of four classes look like boxes.
            found = [pair for pair in found if "box" in str(pair[2].name)] or found
    if not found and config.detector != "detr":
        forms = [form for form in _OVERLAPS if config.detector in {"auto", form}]
        is_open = config.detector == "auto"
        found = [
            (form, value, value)
            for value in named
            for form in forms
            if _fits(added.shape(value), form) and not (is_open and not _is_likely(added.shape(value), form, size_px))
        ]
        found = [one for one in found if is_told or not is_open or one[0] != "end2end"]
    if len(found) != 1:
        shapes = ", ".join(f"{value.name} {added.shape(value) or ''}" for value in model.graph.outputs)
        raise NotReturned(
            f"{len(found)} outputs look like those of a detector, (N, 4 + classes, boxes), (N, boxes, 5 + classes), or "
            f"(N, boxes, classes) beside (N, boxes, 4): set output and detector; the file's outputs: {shapes}"
        )
    return found[0]


def _of_chosen(added: Added, output: ir.Value, class_count: int) -> tuple[ir.Value, ir.Value]:
    """Boxes, and scores (N, A, C), of rows of a box, its score and its class."""
    if not class_count:
        raise ModelLoadError("labels: the file does not tell how many classes its detector has: set labels")
    count = added.shape(output)[1]
    boxes, score, class_id = (_part(added, output, 2, *ends) for ends in ((0, 4), (4, 5), (5, 6)))
    is_class = added.op("Equal", [class_id, added.floats(*range(class_count))], (BATCH, count, class_count))
    hot = added.op("Cast", [is_class], (BATCH, count, class_count), to=int(added.known.dtype))
    return boxes, added.op("Mul", [score, hot], (BATCH, count, class_count))


def _is_of_rows(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[0] == BATCH and min(shape[1:]) > 0


def _are_paired(added: Added, scores: ir.Value, boxes: ir.Value) -> bool:
    """Whether one output has the boxes of another's scores."""
    (_n, count, _classes), (_, others, numbers) = added.shape(scores), added.shape(boxes)
    return scores is not boxes and count == others and numbers == 4


def _fits(shape: Sequence[int], form: str) -> bool:
    """Whether an output can have boxes and scores of a form."""
    _n, rows, columns = shape
    return columns == 6 if form == "end2end" else rows > 4 if form == "yolov8" else columns > 5


def _is_likely(shape: Sequence[int], form: str, size_px: tuple[int, int]) -> bool:
    """Whether it has them by the number of its boxes: as many as maps have places, or few that were chosen."""
    _n, rows, columns = shape
    if form == "end2end":
        return rows <= _MOST_CHOSEN and not _is_dense(rows, size_px)
    count, numbers = (columns, rows - 4) if form == "yolov8" else (rows, columns - 5)
    return numbers < count and _is_dense(count, size_px)


def _is_dense(count: int, size_px: tuple[int, int]) -> bool:
    """Whether boxes are as many as the places of two maps or more, of strides that follow each other."""
    places = [(-(-size_px[0] // stride)) * (-(-size_px[1] // stride)) for stride in _STRIDES]
    ends = combinations(range(len(places) + 1), 2)
    sums = [sum(places[first:end]) for first, end in ends if _STRIDES[first] <= _COARSEST_FIRST and end - first > 1]
    return any(count % one == 0 and count // one <= _MOST_ANCHORS for one in sums)


def _part(added: Added, value: ir.Value, axis: int, start: int, stop: int) -> ir.Value:
    """A part of a value along an axis: what a Concat joins there, if it is that."""
    node, at = value.producer(), 0
    if node is not None and node.op_type == "Concat" and node.attributes["axis"].as_int() % 3 == axis:
        for joined in node.inputs:
            length = added.shape(joined)[axis] if joined is not None and added.shape(joined) else 0
            if joined is not None and (at, at + length) == (start, stop):
                return joined
            at += length
    shape = [*added.shape(value)]
    shape[axis] = stop - start
    return added.op("Slice", [value, *(added.ints(one) for one in (start, stop, axis))], tuple(shape))


def _scores_of(
    added: Added, rows: _Rows, config: ModelConfig, tried: _Tried
) -> tuple[RowScores, ir.Value, tuple[str, ...]]:
    """What the scores are, the value that has them, and what was assumed."""
    node = rows.scores.producer()
    if _ends_in_sigmoid(rows.scores):
        return RowScores.SIGMOID, _before_sigmoid(added, rows.scores), ()
    if node is not None and node.op_type == "Softmax" and node.attributes["axis"].as_int() in {-1, 2}:
        return RowScores.SOFTMAX, input_of(node), ()
    if rows.form in {"yolov5", "end2end"}:
        return RowScores.PROBABILITY, rows.scores, ()
    scores = tried()[1]
    if scores.min() >= 0.0 and scores.max() <= 1.0:
        return RowScores.PROBABILITY, rows.scores, ()
    if config.activation != "auto":
        return RowScores(config.activation), rows.scores, ()
    # Of most boxes, what has a class for none says so.
    if (scores.argmax(-1) == scores.shape[-1] - 1).mean() > 0.5:
        kind, why = RowScores.SOFTMAX, "the last one is the largest of most boxes, and taken as that of no class"
    else:
        kind, why = RowScores.SIGMOID, "the last one is seldom the largest, so that each is taken by itself"
    told = f'The scores of a box are logits, of which {why}: activation = "{kind}"; activation overrides that.'
    return kind, rows.scores, (told,)


def _ends_in_sigmoid(value: ir.Value | None) -> bool:
    """Whether all elements of a value are a sigmoid's, which were rearranged at most."""
    node = None if value is None else value.producer()
    if node is None or node.op_type == "Sigmoid":
        return node is not None
    inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1] if node.op_type in _REARRANGING else ()
    return bool(inputs) and all(_ends_in_sigmoid(one) for one in inputs)


def _before_sigmoid(added: Added, value: ir.Value) -> ir.Value:
    """What the sigmoids took, rearranged likewise."""
    node = value.producer()
    if node is None:
        raise ValueError("not the sigmoid of anything")
    if node.op_type == "Sigmoid":
        return input_of(node)
    moved = len(node.inputs) if node.op_type == "Concat" else 1
    before = [_before_sigmoid(added, one) for one in node.inputs[:moved] if one is not None]
    return added.like(value, [*before, *node.inputs[moved:]])


def _corners_of(rows: _Rows, config: ModelConfig, tried: _Tried) -> tuple[Corners, bool]:
    """What the numbers of a box are, and whether they are parts of the image's sides."""
    if config.boxes != "auto":
        corners, _, relative = config.boxes.partition("-")
        return Corners(corners), bool(relative)
    if rows.form in _OVERLAPS and rows.corners is not None:
        return rows.corners, False
    is_relative = float(np.abs(tried()[0]).max()) <= _MOST_RELATIVE
    return rows.corners or (Corners.CENTER if is_relative else Corners.XY), is_relative


def _run(model: ir.Model, known: Known, image: ImageInput, values: Sequence[ir.Value]) -> list[Array]:
    """What a graph computes for noise."""
    copy = model.clone()
    made = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs[:] = [made[value.name] for value in values]
    common.RemoveUnusedNodesPass()(copy)
    names = [str(value.name) for value in values]
    shape = (1, *known.shapes[image.value][1:])
    return open_graph(copy).run(names, {str(image.value.name): noise_for(image.value, shape)})
