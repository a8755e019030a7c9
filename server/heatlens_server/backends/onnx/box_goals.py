"""Detection by a network that is a graph: each goal is one box. No torch in here."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.network import Corners, Detector, RowScores
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Score
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import Boxes, Detections, Target
from heatlens_server.maps.precision import at_least_float32

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]

_LEAST_OVERLAP = 0.5
"""The intersection over union from which on a box is the one that is asked for, as in `backends.torch.goals`."""

_LEAST_DOUBT = 2.0**-25
"""What 1 - score is taken to be at least: float32 has no number between 0 and twice that."""

_LEAST_SCORE = 2.0**-100
"""What a score is taken to be at least where it divides."""


@dataclass(frozen=True, slots=True)
class _Goal:
    """A detection of one image.

    Attributes:
        row: where it is among the boxes that the network scores; None if it was not found.
        class_id: its class.
        box: left, top, right, bottom in pixels.
    """

    row: int | None
    class_id: int
    box: tuple[float, float, float, float]


class BoxGoals:
    """Detections of N images. Implements `goals.Goals`.

    Each row of what the network returns is a box with scores of all classes, and is taken as its best one. A box is
    found if no better one of its class overlaps it by more than the detector allows. The score of a detection is its
    score before sigmoid, or the logit of its probability.
    """

    def __init__(
        self,
        outputs: Mapping[str, Array],
        targets: Sequence[Target],
        *,
        detector: Detector,
        size_px: tuple[int, int],
        score: Score,
    ) -> None:
        """Choose the detections.

        Args:
            outputs: the scores (N, A, C), or (N, A, C + 1) with a last class for none, and then the boxes (N, A, 4).
            targets: N `Detections` or `Boxes`.
            detector: how they are read.
            size_px: (height, width) of the images.
            score: what is explained about a detection.

        Raises:
            TypeError: a target is of another task.
        """
        (self._name, output), (self._boxes_name, boxes) = outputs.items()
        self._shape, self._dtype = output.shape, output.dtype
        self._scores: Float32Array = at_least_float32(output)
        self._boxes = corners_of(boxes, detector, size_px)
        self._detector = detector
        self._size_px = size_px
        self._kind = score
        chosen = [target for target in targets if isinstance(target, Detections | Boxes)]
        if len(chosen) < len(targets):
            raise TypeError("a detector explains detections")
        self._goals = [
            self._matching(n, target) if isinstance(target, Boxes) else self._found(n, target)
            for n, target in enumerate(chosen)
        ]

    @property
    def width(self) -> int:
        """The most detections that are explained of an image, or 1."""
        return max(1, *(len(goals) for goals in self._goals))

    def seed(self, k: int) -> Mapping[str, Array]:
        """The derivative of every image's k-th detection's score by the scores of all rows."""
        seed = np.zeros(self._shape, self._dtype)
        for n, goals in enumerate(self._goals):
            if k < len(goals) and (row := goals[k].row) is not None:
                seed[n, row] = self._slope(self._scores[n, row], goals[k].class_id)
        return {self._name: seed}

    def scores_of(self, n: int, outputs: Mapping[str, Array]) -> Float32Array:
        """Intersection over union plus score (R, K) of image n's detections, whichever score is asked for.

        As `FasterRCNNBoxScoreTarget` of the `grad-cam` package 1.5.7, for the row that a box asked for would be; 0
        where there is none.
        """
        overlaps, scores = self._matches(n, outputs)
        return overlaps + scores

    def probabilities(self, n: int, outputs: Mapping[str, Array]) -> Float32Array:
        """Intersection over union times score (R, K): 0 where a detection is lost (Petsiuk et al. 2021).

        Their similarity, https://arxiv.org/abs/2006.03204, equation 6, for the row that `scores_of` takes.
        """
        overlaps, scores = self._matches(n, outputs)
        return overlaps * scores

    def by_name(self, n: int) -> Boxes:
        """Image n's detections by box and class."""
        goals = self._goals[n]
        return Boxes(tuple(goal.box for goal in goals), tuple(goal.class_id for goal in goals))

    def least_probable(self, n: int) -> None:
        """Detections have no such thing."""

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's detections and maps."""
        goals = self._goals[n]
        return ImageResult(
            logits=np.empty(0, np.float32),
            class_ids=tuple(goal.class_id for goal in goals),
            maps=maps[: len(goals)],
            scales=scales[: len(goals)],
            offsets=offsets[: len(goals)],
            findings=tuple(self._finding(n, goal) for goal in goals),
        )

    def _finding(self, n: int, goal: _Goal) -> Finding:
        if goal.row is None:
            return Finding(goal.class_id, _logit(0.0), 0.0, box=goal.box)
        row = self._scores[n, goal.row : goal.row + 1]
        probability = float(probabilities_of(row, self._detector.scores)[0, goal.class_id])
        is_logit = self._detector.scores is RowScores.SIGMOID
        logit = float(row[0, goal.class_id]) if is_logit else _logit(probability)
        return Finding(goal.class_id, logit, probability, box=goal.box)

    def _slope(self, row: Float32Array, class_id: int) -> Float64Array:
        """The derivative of a class's score by what the network says of a row, (C,)."""
        values = row.astype(np.float64)
        probability = float(probabilities_of(values[None], self._detector.scores)[0, class_id])
        doubt = 1.0 - probability
        slope = np.zeros_like(values)
        slope[class_id] = 1.0
        if self._detector.scores is RowScores.PROBABILITY:
            if self._kind is Score.LOGIT:
                slope /= max(probability, _LEAST_SCORE)
                # Where it is rounded to 1, there is no slope left.
                slope += slope * probability / doubt if doubt > _LEAST_DOUBT else 0.0
            return slope
        if self._detector.scores is RowScores.SOFTMAX:
            # The logit of a softmax is how far the class is ahead of all others together.
            others = np.where(slope > 0, -np.inf, values)
            weights = np.exp(others - others.max())
            slope -= weights / weights.sum()
        return slope * (probability * doubt) if self._kind is Score.PROBABILITY else slope

    def _found(self, n: int, target: Detections) -> list[_Goal]:
        classes, scores = best_of(self._scores[n], self._detector.scores)
        fits = scores >= target.min_score
        if target.class_ids:
            fits &= np.isin(classes, target.class_ids)
        ranked = np.argsort(-scores, kind="stable")
        left = ranked[fits[ranked]]
        goals: list[_Goal] = []
        while len(left) and len(goals) < target.max_count:
            best, left = left[0], left[1:]
            box, class_id = self._boxes[n, best], int(classes[best])
            goals.append(_Goal(int(best), class_id, _box(box)))
            if self._detector.most_overlap < 1.0:
                overlaps = overlaps_with(box, self._boxes[n, left])
                left = left[(classes[left] != class_id) | (overlaps <= self._detector.most_overlap)]
        return goals

    def _matching(self, n: int, target: Boxes) -> list[_Goal]:
        """For each box that is asked for the row that is it, if any."""
        return [
            _Goal(self._match(self._scores[n], self._boxes[n], box, class_id)[0], class_id, box)
            for box, class_id in zip(target.boxes, target.class_ids, strict=True)
        ]

    def _match(
        self, scores: Float32Array, boxes: Float64Array, box: Sequence[float], class_id: int
    ) -> tuple[int | None, float, float]:
        """The row whose overlap with a box times its score is largest, if it overlaps enough; overlap and score."""
        overlaps = overlaps_with(np.array(box), boxes)
        near = np.flatnonzero(overlaps > _LEAST_OVERLAP)
        if not len(near):
            return None, 0.0, 0.0
        found = probabilities_of(scores[near], self._detector.scores)[:, class_id]
        best = int(np.argmax(overlaps[near] * found))
        return int(near[best]), float(overlaps[near[best]]), float(found[best])

    def _matches(self, n: int, outputs: Mapping[str, Array]) -> tuple[Float32Array, Float32Array]:
        """The overlaps and the scores (R, K) of the rows that are image n's detections in R changed versions of it."""
        boxes = corners_of(outputs[self._boxes_name], self._detector, self._size_px)
        found = np.zeros((2, len(boxes), len(self._goals[n])), np.float32)
        for r, (scores, of_row) in enumerate(zip(outputs[self._name], boxes, strict=True)):
            for k, goal in enumerate(self._goals[n]):
                found[:, r, k] = self._match(scores, of_row, goal.box, goal.class_id)[1:]
        return found[0], found[1]


def probabilities_of(scores: Array, kind: RowScores) -> Float64Array:
    """The probability of each class in rows (R, C), or (R, C + 1) with a last class for none, which is dropped."""
    values = scores.astype(np.float64)
    if kind is RowScores.PROBABILITY:
        return values
    if kind is RowScores.SOFTMAX:
        exponentials = np.exp(values - values.max(1, keepdims=True))
        found: Float64Array = (exponentials / exponentials.sum(1, keepdims=True))[:, :-1]
        return found
    # Of -|x|, which cannot overflow.
    small = np.exp(-np.abs(values))
    sigmoid: Float64Array = np.where(values < 0, small, 1.0) / (1.0 + small)
    return sigmoid


def best_of(scores: Array, kind: RowScores) -> tuple[npt.NDArray[np.int64], Float64Array]:
    """Of each row the most probable class, (R,), and its probability, (R,)."""
    if kind is RowScores.SOFTMAX:
        scores, kind = probabilities_of(scores, kind), RowScores.PROBABILITY
    # A sigmoid keeps their order: it is computed of the best ones alone.
    classes = scores.argmax(1)
    best = np.take_along_axis(scores, classes[:, None], 1)
    return classes, probabilities_of(best, kind)[:, 0]


def corners_of(boxes: Array, detector: Detector, size_px: tuple[int, int]) -> Float64Array:
    """Boxes (..., 4) of a detector as left, top, right, bottom in pixels; what is beyond the image is cut off."""
    one, two, three, four = np.moveaxis(boxes.astype(np.float64), -1, 0)
    if detector.corners is Corners.CENTER:
        one, two, three, four = one - three / 2, two - four / 2, one + three / 2, two + four / 2
    elif detector.corners is Corners.YX:
        one, two, three, four = two, one, four, three
    height_px, width_px = size_px
    down, across = size_px if detector.is_relative else (1, 1)
    # Either diagonal will do, as for ONNX's NonMaxSuppression.
    sides = np.stack([np.minimum(one, three), np.minimum(two, four), np.maximum(one, three), np.maximum(two, four)], -1)
    found: Float64Array = np.clip(sides * [across, down, across, down], 0, [width_px, height_px, width_px, height_px])
    return found


def overlaps_with(box: Array, others: Float64Array) -> Float64Array:
    """Intersection over union of a box (4,) with others (R, 4): left, top, right, bottom. 0 for boxes of no area."""
    inner = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    both = np.maximum(inner, 0.0).prod(1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both
    return np.where(union > 0, both / np.where(union > 0, union, 1.0), 0.0)


def _logit(probability: float) -> float:
    return math.log(max(probability, sys.float_info.min)) - math.log(max(1.0 - probability, _LEAST_DOUBT))


def _box(values: Float64Array) -> tuple[float, float, float, float]:
    left, top, right, bottom = values.tolist()
    return left, top, right, bottom
