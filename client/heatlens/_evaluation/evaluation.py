"""What an evaluation found, and how it is shown."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from os import PathLike
from typing import Any

from heatlens._evaluation.metrics import BETTER, FLOOR, Better
from heatlens._exceptions import FailedPreconditionError, HeatlensError
from heatlens._results.images import checked_path

_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class MethodScores:
    """How faithful one method's maps are.

    Attributes:
        method: its name.
        means: by metric, the mean over the images; nan if there are none.
        standard_errors: by metric, the standard error of that mean; nan for less than two images.
        values: by metric, the score of each image, in the order of `Evaluation.images`.
    """

    method: str
    means: Mapping[str, float]
    standard_errors: Mapping[str, float]
    values: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Failure:
    """An image that was left out.

    Attributes:
        image: its name.
        method: the method that failed first.
        error: how.
    """

    image: str
    method: str
    error: HeatlensError | OSError


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """How faithful methods are, on the same images. Made by `heatlens.evaluate`.

    Attributes:
        model: name of the model.
        model_version: its version.
        metrics: what was measured; see `heatlens.Faithfulness`.
        images: the images that every method explained: paths, or "image 3".
        rows: the methods, Random-CAM last.
        failures: the images that were left out.
        left_out: the methods that were left out since they refuse the options, and why.
    """

    model: str
    model_version: str
    metrics: tuple[str, ...]
    images: tuple[str, ...]
    rows: tuple[MethodScores, ...]
    failures: tuple[Failure, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Evaluation({len(self.rows)} methods on {len(self.images)} images, {len(self.failures)} failed)"

    @property
    def floor(self) -> MethodScores | None:
        """Random-CAM's scores; None if the model does not support it."""
        return next((row for row in self.rows if row.method == FLOOR), None)

    def ranked(self, metric: str) -> tuple[MethodScores, ...]:
        """Return the methods, best first by one metric; the sparsest first by sparseness."""
        return tuple(sorted(self.rows, key=lambda row: _sort_key(metric, row.means[metric])))

    def beats_floor(self, row: MethodScores, metric: str) -> bool | None:
        """Return whether a method's mean is better than Random-CAM's; None where nothing is better, or no floor."""
        if self.floor is None or BETTER[metric] is Better.NEITHER:
            return None
        # Equal up to rounding is not better.
        return _sort_key(metric, row.means[metric]) < _sort_key(metric, self.floor.means[metric]) - _ROUNDING

    def table(self, *, width: int | None = None) -> str:
        """Return mean and standard error of every method and metric as text.

        The best are marked with a star: those of the best mean, up to rounding, if it is better than Random-CAM's.

        Args:
            width: columns of the terminal; metrics that do not fit side by side go below. None: any number.
        """
        from rich.console import Console  # noqa: PLC0415 - not loaded by `import heatlens`
        from rich.table import Table  # noqa: PLC0415

        methods = max(len(row.method) for row in self.rows)
        cells = max(map(len, (*self.metrics, *BETTER.values(), "0.000 ± 0.000 *"))) + 3
        fitting = len(self.metrics) if width is None else max(1, (width - methods - 3) // cells)
        text = StringIO()
        console = Console(file=text, width=methods + 3 + fitting * cells, color_system=None, highlight=False)
        for start in range(0, len(self.metrics), fitting):
            table = Table(box=None, padding=(0, 3, 0, 0))
            table.add_column("", no_wrap=True)
            shown = self.metrics[start : start + fitting]
            for metric in shown:
                table.add_column(f"{metric}\n{BETTER[metric]}", no_wrap=True)
            for row in self.rows:
                table.add_row(row.method, *(self._cell(metric, row) for metric in shown))
            if start:
                console.print()
            console.print(table)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())

    def chart(self, path: str | PathLike[str]) -> None:
        """Write a chart: a panel per metric, methods best first, Random-CAM marked as the floor.

        Args:
            path: a .png file, or another type that matplotlib knows.

        Raises:
            ImportError: matplotlib is not installed: pip install 'heatlens[plot]'.
            FailedPreconditionError: every image failed.
            OSError: the file cannot be written.
        """
        from heatlens._evaluation.chart import Bar, Panel, draw  # noqa: PLC0415 - loads matplotlib

        if not self.images:
            raise FailedPreconditionError("every image failed: there is nothing to draw", reason="NO_IMAGES")
        panels = [
            Panel(
                metric,
                tuple(
                    Bar(row.method, row.means[metric], row.standard_errors[metric], self.beats_floor(row, metric))
                    for row in self.ranked(metric)
                ),
            )
            for metric in self.metrics
        ]
        images = f"{len(self.images)} image{'' if len(self.images) == 1 else 's'}"
        draw(f"{self.model}, {images}", panels, checked_path("path", path))

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON; nan becomes None."""
        return {
            "model": self.model,
            "model_version": self.model_version,
            "images": list(self.images),
            "methods": [
                {
                    "method": row.method,
                    "metrics": {
                        metric: {
                            "mean": _or_none(row.means[metric]),
                            "standard_error": _or_none(row.standard_errors[metric]),
                            "values": list(row.values[metric]),
                        }
                        for metric in self.metrics
                    },
                }
                for row in self.rows
            ],
            "failures": [
                {"image": failure.image, "method": failure.method, "error": str(failure.error)}
                for failure in self.failures
            ],
            "left_out": dict(self.left_out),
        }

    def _cell(self, metric: str, row: MethodScores) -> str:
        mean, error = row.means[metric], row.standard_errors[metric]
        if math.isnan(mean):
            return "-"
        spread = "" if math.isnan(error) else f" ± {error:.3f}"
        return f"{mean:.3f}{spread}{' *' if self._is_best(metric, row) else ''}"

    def _is_best(self, metric: str, row: MethodScores) -> bool:
        """Whether no method is better by more than rounding, and the floor is worse."""
        if row.method == FLOOR or BETTER[metric] is Better.NEITHER or self.beats_floor(row, metric) is False:
            return False
        best = _sort_key(metric, self.ranked(metric)[0].means[metric])
        return _sort_key(metric, row.means[metric]) <= best + _ROUNDING


def _sort_key(metric: str, mean: float) -> float:
    """Return a number that is lower for better means."""
    better = BETTER[metric]
    if better is Better.LOWER:
        return mean
    return abs(mean) if better is Better.NEAR_ZERO else -mean


def _or_none(number: float) -> float | None:
    return None if math.isnan(number) else number
