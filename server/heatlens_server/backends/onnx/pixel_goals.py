"""Segmentation by a network that is a graph: the goals are classes, their scores sums over pixels. No torch in here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.core.arrays import BoolArray, Float32Array
from heatlens_server.core.methods import Score
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import ClassIds, Pixels, Target, TopK
from heatlens_server.maps.precision import at_least_float32
from heatlens_server.maps.targets import class_scores, probabilities, seeds

Array = npt.NDArray[Any]

_MOST_CLASSES = 255
"""In a mask of uint8: the last value means that the model did not look."""


@dataclass(frozen=True, slots=True, eq=False)
class _Goal:
    """A class of one image.

    Attributes:
        class_id: which one.
        mask: bool (H, W), its pixels. They stay the same for changed versions of the image.
        area: the part of the image that is predicted as the class.
    """

    class_id: int
    mask: BoolArray
    area: float


class PixelGoals:
    """Classes of N images, each over its pixels. Implements `goals.Goals`.

    The score of a class is the sum over its pixels of the score that it has there, as in
    `backends.torch.goals.segmentation`.
    """

    def __init__(
        self, outputs: Mapping[str, Array], targets: Sequence[Target], *, score: Score, threshold: float | None
    ) -> None:
        """Rank the classes and find their pixels.

        Args:
            outputs: one, of logits (N, C, H, W), at the input's size.
            targets: N `Pixels`.
            score: what is explained about a class.
            threshold: in (0, 1): classes may overlap, and the pixels of each are those whose sigmoid is above it. None:
                classes exclude each other, and a pixel is of the class of its largest logit.

        Raises:
            TypeError: a target is of another task.
        """
        ((self._name, self._output),) = outputs.items()
        self._logits: Float32Array = at_least_float32(self._output)
        self._kind = score
        self._sigmoid = threshold is not None
        chosen = [target for target in targets if isinstance(target, Pixels)]
        if len(chosen) < len(targets):
            raise TypeError("a model for segmentation explains pixels")
        # Logits are compared, since a sigmoid is rounded to 0.5 already where they are small.
        self._predicted = self._logits.argmax(1) if threshold is None else self._logits > _logit(threshold)
        self._goals = [self._find(n, target) for n, target in enumerate(chosen)]

    @property
    def width(self) -> int:
        """The most classes that are explained of an image."""
        return max(len(goals) for goals in self._goals)

    def seed(self, k: int) -> Mapping[str, Array]:
        """The derivative of every image's k-th class's score by the logits: 0 where the image has no such class."""
        seed = np.zeros_like(self._output)
        for n, goals in enumerate(self._goals):
            if k >= len(goals):
                continue
            goal = goals[k]
            if self._kind is Score.LOGIT:
                seed[n, goal.class_id][goal.mask] = 1.0
                continue
            pixels = self._logits[n][:, goal.mask].T
            ids = np.full((len(pixels), 1), goal.class_id, np.int64)
            seed[n][:, goal.mask] = seeds(pixels, ids, self._kind, sigmoid=self._sigmoid)[:, 0].T
        return {self._name: seed}

    def scores_of(self, n: int, outputs: Mapping[str, Array]) -> Float32Array:
        """Scores (R, K) of image n's classes, over their pixels, in logits of R rows."""
        return self._of_rows(n, outputs[self._name], self._kind)

    def probabilities(self, n: int, outputs: Mapping[str, Array]) -> Float32Array:
        """Probabilities (R, K) of image n's classes, their means over the pixels, in logits of R rows."""
        counts = np.array([max(1, int(goal.mask.sum())) for goal in self._goals[n]], np.float32)
        return self._of_rows(n, outputs[self._name], Score.PROBABILITY) / counts

    def by_name(self, n: int) -> Pixels:
        """Image n's classes by id, each over its pixels."""
        goals = self._goals[n]
        return Pixels(ClassIds(tuple(goal.class_id for goal in goals)), np.stack([goal.mask for goal in goals]))

    def least_probable(self, n: int) -> None:
        """Pixels have no such thing."""

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's classes, maps and predicted mask, or one mask per class where classes may overlap."""
        goals = self._goals[n]
        ids = [goal.class_id for goal in goals]
        one_mask = not self._sigmoid and self._logits.shape[1] <= _MOST_CLASSES
        return ImageResult(
            logits=np.empty(0, np.float32),
            class_ids=tuple(ids),
            maps=maps[: len(goals)],
            scales=scales[: len(goals)],
            offsets=offsets[: len(goals)],
            findings=tuple(self._finding(n, goal) for goal in goals),
            mask=self._predicted[n].astype(np.uint8) if one_mask else None,
            masks=self._predicted[n, ids].astype(np.uint8) if self._sigmoid else None,
        )

    def _of_rows(self, n: int, output: Array, kind: Score) -> Float32Array:
        """For each row of logits (R, C, H, W) the sums of a score over the pixels of image n's classes, (R, K)."""
        found = np.empty((len(output), len(self._goals[n])), np.float32)
        for k, goal in enumerate(self._goals[n]):
            for row, logits in zip(found, output, strict=True):
                if kind is Score.LOGIT:
                    row[k] = logits[goal.class_id][goal.mask].sum(dtype=np.float32)
                else:
                    pixels = logits[:, goal.mask].T
                    ids = np.full((len(pixels), 1), goal.class_id, np.int64)
                    row[k] = class_scores(pixels, ids, kind, sigmoid=self._sigmoid).sum()
        return found

    def _finding(self, n: int, goal: _Goal) -> Finding:
        """A class's logit and probability: their means over its pixels, 0 where it has none."""
        pixels = self._logits[n][:, goal.mask].T
        count = max(1, len(pixels))
        logit = pixels[:, goal.class_id].sum(dtype=np.float64) / count
        of_class = probabilities(pixels, sigmoid=self._sigmoid)[:, goal.class_id] if len(pixels) else pixels
        return Finding(goal.class_id, float(logit), float(of_class.sum(dtype=np.float64) / count), area=goal.area)

    def _find(self, n: int, target: Pixels) -> list[_Goal]:
        size = self._logits.shape[2:]
        areas = self._counts(n, None)
        if isinstance(target.classes, TopK):
            counts = areas if target.mask is None else self._counts(n, target.mask)
            ids = self._largest(n, counts, target.mask)[: target.classes.k]
        else:
            ids = list(target.classes.ids)
        if target.mask is None:
            masks = [self._pixels(n, class_id) for class_id in ids]
        else:
            masks = list(np.broadcast_to(target.mask, (len(ids), *size)))
        return [
            _Goal(class_id, mask, float(areas[class_id] / math.prod(size)))
            for class_id, mask in zip(ids, masks, strict=True)
        ]

    def _pixels(self, n: int, class_id: int) -> BoolArray:
        """Bool (H, W): where image n is predicted as a class."""
        found: BoolArray = self._predicted[n, class_id] if self._sigmoid else self._predicted[n] == class_id
        return found

    def _counts(self, n: int, mask: BoolArray | None) -> npt.NDArray[np.int64]:
        """How many pixels of image n, inside a mask, are predicted as each class: (C,)."""
        predicted = self._predicted[n]
        inside = predicted.reshape(*predicted.shape[:-2], -1) if mask is None else predicted[..., mask]
        return inside.sum(1) if self._sigmoid else np.bincount(inside, minlength=self._logits.shape[1])

    def _largest(self, n: int, counts: npt.NDArray[np.int64], mask: BoolArray | None) -> list[int]:
        """The classes of most pixels, largest first, without those that no pixel is predicted as.

        If no class is predicted anywhere, which softmax rules out, the one that comes closest to it.
        """
        ranked = np.argsort(-counts, kind="stable")
        found: list[int] = ranked[counts[ranked] > 0].tolist()
        if found:
            return found
        scores = self._logits[n]
        inside = scores.reshape(len(scores), -1) if mask is None else scores[:, mask]
        return [int(inside.max(1).argmax())]


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)
