"""Segmentation: the goals are classes, their scores sums over pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.targets import class_scores
from heatlens_server.backends.torch.goals.base import Goals, RunImages, TaskModel
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import ABSENT, Score
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import ClassIds, Pixels, Target, TopK
from heatlens_server.maps.precision import at_least_float32

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
    mask: Tensor
    area: float


class PixelGoals(Goals):
    """Classes of N images, each over its pixels.

    The score of a class is the sum over its pixels of the score that it has there, as `SemanticSegmentationTarget` of
    the `grad-cam` package 1.5.7: of its logits, or of what `cam.targets.class_scores` makes of a pixel's logits.
    """

    def __init__(
        self, logits: Tensor, targets: Sequence[Pixels], *, score: Score, threshold: float | None = None
    ) -> None:
        """Rank the classes and find their pixels.

        Args:
            logits: (N, C, H, W), at the input's size.
            targets: N targets.
            score: what is explained about a class.
            threshold: in (0, 1): classes may overlap, and the pixels of each are those whose sigmoid is above it. None:
                classes exclude each other, and a pixel is of the class of its largest logit.
        """
        self._logits = logits
        self._kind = score
        self._sigmoid = threshold is not None
        scores = logits.detach()
        # Logits are compared, since a sigmoid is rounded to 0.5 already where they are small.
        self._predicted = scores.argmax(dim=1) if threshold is None else scores > _logit(threshold)
        self._goals = [self._find(n, target) for n, target in enumerate(targets)]

    @property
    def width(self) -> int:
        """The most classes that are explained of an image."""
        return max(len(goals) for goals in self._goals)

    @property
    def class_ids(self) -> Tensor:
        """int64 (N, width)."""
        rows = [[goal.class_id for goal in goals] for goals in self._goals]
        padded = [row + [ABSENT] * (self.width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=self._logits.device)

    def score(self, k: int) -> Tensor:
        """The sum of every image's k-th class's score; without a gradient where it has no pixel."""
        found = [
            self._total(logits, goals[k], self._kind)
            for logits, goals in zip(self._logits, self._goals, strict=True)
            if k < len(goals)
        ]
        return torch.stack(found).sum()

    def scores_of(self, n: int, output: Tensor) -> Tensor:
        """Scores (R, K) of image n's classes, over their pixels, in logits (R, C, H, W)."""
        return self._of_rows(n, output, self._kind)

    def probabilities(self, n: int, output: Tensor) -> Tensor:
        """Probabilities (R, K) of image n's classes, their means over the pixels, in logits (R, C, H, W)."""
        counts = torch.stack([goal.mask.sum() for goal in self._goals[n]]).clamp(min=1)
        return self._of_rows(n, output, Score.PROBABILITY) / counts

    def by_name(self, n: int) -> Pixels:
        """Image n's classes by id, each over its pixels."""
        goals = self._goals[n]
        masks = np.stack([goal.mask.cpu().numpy() for goal in goals])
        return Pixels(ClassIds(tuple(goal.class_id for goal in goals)), masks)

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's classes, maps and predicted mask, or one mask per class where classes may overlap."""
        goals = self._goals[n]
        with torch.no_grad():
            sums = self._of_rows(n, self._logits[n : n + 1], Score.LOGIT)[0]
            probabilities = self.probabilities(n, self._logits[n : n + 1])[0].tolist()
            counts = torch.stack([goal.mask.sum() for goal in goals]).clamp(min=1)
            logits = (sums / counts).tolist()
        one_mask = not self._sigmoid and self._logits.shape[1] <= _MOST_CLASSES
        return ImageResult(
            logits=np.empty(0, np.float32),
            class_ids=tuple(goal.class_id for goal in goals),
            maps=maps[: len(goals)],
            scales=scales[: len(goals)],
            offsets=offsets[: len(goals)],
            findings=tuple(
                Finding(goal.class_id, logit, probability, area=goal.area)
                for goal, logit, probability in zip(goals, logits, probabilities, strict=True)
            ),
            mask=self._predicted[n].to(torch.uint8).cpu().numpy() if one_mask else None,
            masks=self._predicted[n, [goal.class_id for goal in goals]].to(torch.uint8).cpu().numpy()
            if self._sigmoid
            else None,
        )

    def _find(self, n: int, target: Pixels) -> list[_Goal]:
        size = self._logits.shape[2:]
        areas = self._counts(n, None)
        mask = None if target.mask is None else torch.from_numpy(target.mask).to(areas.device)
        if isinstance(target.classes, TopK):
            ids = self._largest(n, areas if mask is None else self._counts(n, mask), mask)[: target.classes.k]
        else:
            ids = list(target.classes.ids)
        share = (areas.double() / math.prod(size)).tolist()
        of_goals = [self._pixels(n, class_id) for class_id in ids] if mask is None else mask.expand(len(ids), *size)
        return [_Goal(class_id, own, share[class_id]) for class_id, own in zip(ids, of_goals, strict=True)]

    def _pixels(self, n: int, class_id: int) -> Tensor:
        """Bool (H, W): where image n is predicted as a class."""
        return self._predicted[n, class_id] if self._sigmoid else self._predicted[n] == class_id

    def _counts(self, n: int, mask: Tensor | None) -> Tensor:
        """How many pixels of image n, inside a mask, are predicted as each class: int64 (C,)."""
        predicted = self._predicted[n]
        inside = predicted.flatten(-2) if mask is None else predicted[..., mask]
        return inside.sum(dim=1) if self._sigmoid else torch.bincount(inside, minlength=self._logits.shape[1])

    def _largest(self, n: int, counts: Tensor, mask: Tensor | None) -> list[int]:
        """The classes of most pixels, largest first, without those that no pixel is predicted as.

        If no class is predicted anywhere, which softmax rules out, the one that comes closest to it.
        """
        ranked = torch.sort(counts, descending=True, stable=True).indices
        found: list[int] = ranked[counts[ranked] > 0].tolist()
        if found:
            return found
        scores = self._logits[n].detach()
        inside = scores.flatten(1) if mask is None else scores[:, mask]
        return [int(inside.amax(dim=1).argmax())]

    def _of_rows(self, n: int, output: Tensor, kind: Score) -> Tensor:
        goals = self._goals[n]
        return torch.stack([torch.stack([self._total(row, goal, kind) for goal in goals]) for row in output])

    def _total(self, logits: Tensor, goal: _Goal, kind: Score) -> Tensor:
        """The sum over a class's pixels of its score there: of logits (C, H, W) a scalar, float32 or wider."""
        if kind is Score.LOGIT:
            return at_least_float32(logits[goal.class_id][goal.mask]).sum()
        pixels = logits[:, goal.mask].T
        ids = torch.full((len(pixels), 1), goal.class_id, device=pixels.device)
        return class_scores(pixels, ids, kind, sigmoid=self._sigmoid).sum()


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)


class Segmentation(TaskModel):
    """Runs networks that return scores of each pixel, (N, C, h, w)."""

    def __init__(self, reading: OutputReading, *, threshold: float | None = None) -> None:
        """Describe the networks.

        Args:
            reading: how what they return becomes logits.
            threshold: as for `PixelGoals`.
        """
        self._reading = reading
        self._threshold = threshold

    def run(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Logits (R, C, H, W) of inputs (R, C, H, W); those of a smaller output are resized bilinearly."""
        logits = self._reading(module, inputs)
        size = inputs.shape[2:]
        if logits.shape[2:] == size:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

    def unpadded(self, output: Tensor, size_px: tuple[int, int]) -> Tensor:
        """The logits (R, C, H, W) of the images alone."""
        height_px, width_px = size_px
        return output[..., :height_px, :width_px]

    def goals(self, output: Tensor, targets: Sequence[Target], *, score: Score, run: RunImages) -> PixelGoals:  # noqa: ARG002
        """Find the classes that are asked for, and their pixels.

        Raises:
            TypeError: a target is of another task.
        """
        chosen = [target for target in targets if isinstance(target, Pixels)]
        if len(chosen) < len(targets):
            raise TypeError("a model for segmentation explains pixels")
        return PixelGoals(output, chosen, score=score, threshold=self._threshold)

    def total(self, output: Tensor, class_count: int) -> Tensor:
        """The sum of all logits."""
        if output.shape[1] != class_count:
            raise ModelLoadError(f"the model gives scores of shape {tuple(output.shape)}, not (1, {class_count}, h, w)")
        return output.sum()
