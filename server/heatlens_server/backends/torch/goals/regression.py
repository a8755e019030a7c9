"""Regression: the goals are values, each of which something in the image makes larger or smaller."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.goals.base import Goals, RunImages, TaskModel, sum_of
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import ABSENT, Score
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import Direction, Target, Values
from heatlens_server.maps.precision import at_least_float32


class ValueGoals(Goals):
    """Values of N images. The score of one is itself, or its negative where a decrease is explained."""

    def __init__(self, values: Tensor, targets: Sequence[Values]) -> None:
        """Take the values.

        Args:
            values: (N, C).
            targets: N targets.
        """
        self._values = values
        self._targets = targets

    @property
    def width(self) -> int:
        """The most values that are explained of an image."""
        return max(target.count for target in self._targets)

    @property
    def class_ids(self) -> Tensor:
        """int64 (N, width): which output each value is."""
        rows = [[*target.ids] + [ABSENT] * (self.width - target.count) for target in self._targets]
        return torch.tensor(rows, dtype=torch.int64, device=self._values.device)

    def score(self, k: int) -> Tensor:
        """The sum of every image's k-th value, or of its negative."""
        found = [
            self.scores_of(n, row[None])[0, k]
            for n, (row, target) in enumerate(zip(self._values, self._targets, strict=True))
            if k < target.count
        ]
        return torch.stack(found).sum()

    def scores_of(self, n: int, output: Tensor) -> Tensor:
        """Image n's values (R, K), or their negatives, in an output (R, C)."""
        target = self._targets[n]
        values = at_least_float32(output)[:, list(target.ids)]
        return -values if target.direction is Direction.DECREASE else values

    def probabilities(self, n: int, output: Tensor) -> Tensor:
        """The same as `scores_of`: values have no probabilities, and those measures that need none ask for this."""
        return self.scores_of(n, output)

    def by_name(self, n: int) -> Values:
        """Image n's target, which names its values."""
        return self._targets[n]

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's values and maps."""
        target = self._targets[n]
        values = self._values[n].detach().float().cpu().numpy()
        return ImageResult(
            logits=np.empty(0, np.float32),
            class_ids=target.ids,
            maps=maps[: target.count],
            scales=scales[: target.count],
            offsets=offsets[: target.count],
            findings=tuple(Finding(output, 0.0, 0.0, value=float(values[output])) for output in target.ids),
            values=values,
        )


class Regression(TaskModel):
    """Runs networks that return values (N, C)."""

    def __init__(self, reading: OutputReading) -> None:
        """Say how what the network returns becomes values."""
        self._reading = reading

    def run(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Values (R, C) of inputs (R, channels, H, W)."""
        return self._reading(module, inputs)

    def goals(self, output: Tensor, targets: Sequence[Target], *, score: Score, run: RunImages) -> ValueGoals:  # noqa: ARG002
        """Take the values that are asked for.

        Raises:
            TypeError: a target is of another task.
        """
        chosen = [target for target in targets if isinstance(target, Values)]
        if len(chosen) < len(targets):
            raise TypeError("a model for regression explains values")
        return ValueGoals(output, chosen)

    def total(self, output: Tensor, class_count: int) -> Tensor:
        """The sum of the values."""
        return sum_of(output, class_count)
