"""Classification, single-label, multi-label and binary: the goals are classes, their scores functions of the logits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heatlens_server.backends.onnx.graph_rows import class_index
from heatlens_server.backends.torch.cam.targets import class_scores
from heatlens_server.backends.torch.goals.base import Goals, RunImages, TaskModel, sum_of
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Score
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import ClassIds, ClassTarget, Target, class_targets
from heatlens_server.core.tasks import Activation
from heatlens_server.maps.targets import probabilities, resolve


class ClassGoals(Goals):
    """Classes of N images."""

    def __init__(self, logits: Tensor, targets: Sequence[ClassTarget], *, score: Score, sigmoid: bool) -> None:
        """Rank the classes.

        Args:
            logits: (N, C).
            targets: N targets.
            score: what is explained about a class.
            sigmoid: whether classes do not exclude each other.
        """
        self._logits = logits
        self._counts = [target.count for target in targets]
        self._kind = score
        self._sigmoid = sigmoid
        wanted = torch.from_numpy(class_index(targets)).to(logits.device)
        self._ids: Tensor = resolve(logits.detach(), wanted)
        self._scores = class_scores(logits, self._ids, score, sigmoid=sigmoid)

    @property
    def width(self) -> int:
        """The most classes that are explained of an image."""
        return max(self._counts)

    @property
    def class_ids(self) -> Tensor:
        """int64 (N, width)."""
        return self._ids

    def score(self, k: int) -> Tensor:
        """The sum of every image's k-th class's score."""
        return self._scores[:, k].sum()

    def scores_of(self, n: int, output: Tensor) -> Tensor:
        """Scores (R, K) of image n's classes in logits (R, C)."""
        return class_scores(output, self._ids_of(n).expand(len(output), -1), self._kind, sigmoid=self._sigmoid)

    def probabilities(self, n: int, output: Tensor) -> Tensor:
        """Probabilities (R, K) of image n's classes in logits (R, C)."""
        found: Tensor = probabilities(output, sigmoid=self._sigmoid)[:, self._ids_of(n)]
        return found

    def by_name(self, n: int) -> ClassIds:
        """Image n's classes by id."""
        return ClassIds(tuple(self._ids_of(n).tolist()))

    def least_probable(self, n: int) -> ClassIds:
        """The least probable class."""
        return ClassIds((int(self._logits[n].argmin()),))

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's logits, classes and maps."""
        count = self._counts[n]
        return ImageResult(
            logits=self._logits[n].detach().float().cpu().numpy(),
            class_ids=tuple(self._ids_of(n).tolist()),
            maps=maps[:count],
            scales=scales[:count],
            offsets=offsets[:count],
        )

    def _ids_of(self, n: int) -> Tensor:
        return self._ids[n, : self._counts[n]]


class Classification(TaskModel):
    """Runs classifiers."""

    def __init__(self, reading: OutputReading, activation: Activation) -> None:
        """Describe the classifier.

        Args:
            reading: how what it returns becomes logits.
            activation: how these become probabilities.
        """
        self._reading = reading
        self._sigmoid = activation is Activation.SIGMOID

    def run(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Logits (R, C) of inputs (R, C, H, W)."""
        return self._reading(module, inputs)

    def goals(self, output: Tensor, targets: Sequence[Target], *, score: Score, run: RunImages) -> ClassGoals:  # noqa: ARG002
        """Find the classes that are asked for."""
        return ClassGoals(output, class_targets(targets), score=score, sigmoid=self._sigmoid)

    def total(self, output: Tensor, class_count: int) -> Tensor:
        """The sum of the logits."""
        return sum_of(output, class_count)
