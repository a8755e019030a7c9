"""Detection, with torchvision's interface: each goal is one box that was found."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.saliency import Part
from heatlens_server.backends.torch.goals.base import Goals, RunImages, TaskModel
from heatlens_server.backends.torch.goals.image_part import find_part
from heatlens_server.backends.torch.sources.found_boxes import Found, check_found
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import ABSENT, Score
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import Boxes, Detections, Target
from heatlens_server.maps.precision import at_least_float32

_LEAST_OVERLAP = 0.5
"""The intersection over union from which on a box of a changed image is the same detection, as in `grad-cam`."""

_MOST_PARTS = 1024
"""For how many sizes of images their part is remembered."""

_LEAST_DOUBT = 2.0**-25
"""What 1 - score is taken to be at least: float32 has no number between 0 and twice that."""


@dataclass(frozen=True, slots=True, eq=False)
class _Goals:
    """The detections of one image.

    Attributes:
        places: for each goal, int64 (1,), its place in what was found, or (0,) if it was not found.
        boxes: (K, 4).
        labels: int64 (K,).
    """

    places: list[Tensor]
    boxes: Tensor
    labels: Tensor


class BoxGoals(Goals):
    """Detections of N images.

    The score of a detection is its score before softmax or sigmoid, or the score itself. Changed versions of an image
    are scored as by `FasterRCNNBoxScoreTarget` of the `grad-cam` package 1.5.7: the box that overlaps a detection's the
    most, by more than a half, has its intersection over union plus its score, none has 0; whichever score is asked for.
    Boxes of other labels are no rivals here: in that package one of them that overlaps more makes it 0.
    """

    def __init__(self, found: Sequence[Found], targets: Sequence[Detections | Boxes], *, score: Score) -> None:
        """Choose the detections.

        Args:
            found: what was found in N images.
            targets: N targets.
            score: what is explained about a detection.
        """
        self._found = found
        self._kind = score
        self._goals = [_choose(of_image, target) for of_image, target in zip(found, targets, strict=True)]

    @property
    def width(self) -> int:
        """The most detections that are explained of an image, or 1."""
        return max(1, *(len(goals.places) for goals in self._goals))

    @property
    def class_ids(self) -> Tensor:
        """int64 (N, width)."""
        ids = torch.full((len(self._goals), self.width), ABSENT, device=self._found[0]["labels"].device)
        for row, goals in zip(ids, self._goals, strict=True):
            row[: len(goals.labels)] = goals.labels
        return ids

    def score(self, k: int) -> Tensor:
        """The sum of every image's k-th detection's score."""
        # Of no score at all there is still a sum with a gradient, zero.
        nowhere = torch.zeros(0, dtype=torch.int64, device=self._found[0]["labels"].device)
        chosen = [
            at_least_float32(found["scores"])[goals.places[k] if k < len(goals.places) else nowhere]
            for found, goals in zip(self._found, self._goals, strict=True)
        ]
        scores = torch.cat(chosen)
        return (_logits(scores) if self._kind is Score.LOGIT else scores).sum()

    def scores_of(self, n: int, output: Sequence[Found]) -> Tensor:
        """Scores (R, K) of image n's detections in what was found in R changed versions of it."""
        matches = [_match(self._goals[n], found) for found in output]
        return torch.stack([overlaps + scores for overlaps, scores in matches])

    def probabilities(self, n: int, output: Sequence[Found]) -> Tensor:
        """Intersection over union times score, (R, K): 0 where a detection is lost (Petsiuk et al. 2021).

        Their similarity, https://arxiv.org/abs/2006.03204, equation 6, for the box that `scores_of` takes.
        """
        matches = [_match(self._goals[n], found) for found in output]
        return torch.stack([overlaps * scores for overlaps, scores in matches])

    def by_name(self, n: int) -> Boxes:
        """Image n's detections by box and label."""
        goals = self._goals[n]
        return Boxes(tuple(_box(box) for box in goals.boxes.tolist()), tuple(goals.labels.tolist()))

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's detections and maps."""
        goals, count = self._goals[n], len(self._goals[n].places)
        scores = at_least_float32(self._found[n]["scores"].detach())
        of_goals = [float(scores[place].sum()) for place in goals.places]
        labels = tuple(goals.labels.tolist())
        return ImageResult(
            logits=np.empty(0, np.float32),
            class_ids=labels,
            maps=maps[:count],
            scales=scales[:count],
            offsets=offsets[:count],
            findings=tuple(
                Finding(label, _logit(score), score, box=_box(box))
                for label, score, box in zip(labels, of_goals, goals.boxes.tolist(), strict=True)
            ),
        )


def _choose(found: Found, target: Detections | Boxes) -> _Goals:
    boxes, labels, scores = (found[name].detach() for name in ("boxes", "labels", "scores"))
    if isinstance(target, Boxes):
        wanted = _Goals([], boxes.new_tensor(target.boxes).reshape(-1, 4), labels.new_tensor(target.class_ids))
        overlaps, best = _overlaps(wanted, found)
        places = [place[overlap > 0] for place, overlap in zip(best[:, None], overlaps[:, None], strict=True)]
        return _Goals(places, wanted.boxes, wanted.labels)
    fits = at_least_float32(scores) >= target.min_score
    if target.class_ids:
        fits &= torch.isin(labels, labels.new_tensor(target.class_ids))
    ranked = torch.sort(at_least_float32(scores), descending=True, stable=True).indices
    chosen = ranked[fits[ranked]][: target.max_count]
    return _Goals([place[None] for place in chosen], boxes[chosen], labels[chosen])


def _overlaps(goals: _Goals, found: Found) -> tuple[Tensor, Tensor]:
    """For each goal the largest intersection over union, (K,), of a found box with its label, and that one's place.

    Overlaps of no more than a half are none: 0.
    """
    boxes, labels = found["boxes"].detach(), found["labels"]
    if not len(boxes):
        return boxes.new_zeros(len(goals.labels)), labels.new_zeros(len(goals.labels))
    overlaps = _intersections_over_unions(goals.boxes.float(), boxes.float())
    overlaps = overlaps.where(labels == goals.labels[:, None], 0.0)
    largest, places = overlaps.max(dim=1)
    return largest.where(largest > _LEAST_OVERLAP, 0.0), places


def _intersections_over_unions(one: Tensor, other: Tensor) -> Tensor:
    """(K, B) for boxes (K, 4) and (B, 4), as `torchvision.ops.box_iou`; boxes without an area overlap nothing: 0."""
    one_px2, other_px2 = ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (one, other))
    first, last = torch.maximum(one[:, None, :2], other[:, :2]), torch.minimum(one[:, None, 2:], other[:, 2:])
    common_px2 = (last - first).clamp(min=0).prod(dim=2)
    return (common_px2 / (one_px2[:, None] + other_px2 - common_px2)).nan_to_num()


def _match(goals: _Goals, found: Found) -> tuple[Tensor, Tensor]:
    """The overlaps (K,) and scores (K,) of the boxes that are the goals in a changed image; 0 where there is none."""
    overlaps, places = _overlaps(goals, found)
    if not len(found["scores"]):
        return overlaps, overlaps
    return overlaps, at_least_float32(found["scores"])[places].where(overlaps > 0, 0.0)


def _logits(scores: Tensor) -> Tensor:
    return scores.log() - (1.0 - scores).clamp(min=_LEAST_DOUBT).log()


def _logit(score: float) -> float:
    return math.log(max(score, sys.float_info.min)) - math.log(max(1.0 - score, _LEAST_DOUBT))


def _box(values: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = values
    return left, top, right, bottom


def _is_torchvisions(transform: object) -> bool:
    """Whether it is a GeneralizedRCNNTransform, told without torchvision, which takes seconds to import."""
    return any(kind.__module__ == "torchvision.models.detection.transform" for kind in type(transform).__mro__)


def _part_of_transform(transform: Any, size_px: tuple[int, int]) -> Part:  # noqa: ANN401 - see `_is_torchvisions`
    if transform.fixed_size is not None:
        resized = transform.fixed_size[::-1]
    else:
        scale = min(transform.min_size[-1] / min(size_px), transform.max_size / max(size_px))
        resized = tuple(math.floor(side * scale) for side in size_px)
    multiple = transform.size_divisible
    down, across = (side / (math.ceil(side / multiple) * multiple) for side in resized)
    return Part(bottom=down, right=across)


class Detection(TaskModel):
    """Runs networks that take images and return what they found in each."""

    def __init__(self) -> None:
        """Know nothing yet about where images lie in what the network's layers get."""
        self._parts: dict[tuple[int, int, int], Part] = {}

    def run(self, module: nn.Module, inputs: Tensor) -> list[Found]:
        """What was found in each of the inputs (R, C, H, W), which are in [0, 1]: detectors normalise themselves."""
        found: list[Found] = module(list(inputs))
        return found

    def part_on_image(self, module: nn.Module, shape: tuple[int, int, int]) -> Part:
        """Less than all where the network pads what it has resized: to multiples of 32 pixels, or to a square.

        Known for torchvision's transform, found by running other networks, once for each size of images.
        """
        transform = getattr(module, "transform", None)
        if _is_torchvisions(transform):
            return _part_of_transform(transform, (shape[1], shape[2]))
        if shape not in self._parts:
            if len(self._parts) >= _MOST_PARTS:
                self._parts.clear()
            self._parts[shape] = find_part(lambda images: self.run(module, images), module, shape)
        return self._parts[shape]

    def goals(self, output: Sequence[Found], targets: Sequence[Target], *, score: Score, run: RunImages) -> BoxGoals:  # noqa: ARG002
        """Choose the detections that are asked for.

        Raises:
            TypeError: a target is of another task.
        """
        chosen = [target for target in targets if isinstance(target, Detections | Boxes)]
        if len(chosen) < len(targets):
            raise TypeError("a detector explains detections")
        return BoxGoals(output, chosen, score=score)

    def total(self, output: Any, class_count: int) -> Tensor:  # noqa: ANN401, ARG002 - what a network returns
        """The sum of all scores."""
        return torch.cat([found["scores"] for found in check_found(output)]).sum()
