"""The chart of an evaluation. The only module that loads matplotlib."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from heatlens._evaluation import BETTER, FLOOR, Better

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("charts need matplotlib: pip install 'heatlens[plot]'") from error

if TYPE_CHECKING:
    from heatlens._evaluation import Evaluation, MethodScores

_METHOD_COLOR = "#3b6fb6"
_NO_BETTER_COLOR = "#b4c8e4"
_FLOOR_COLOR = "#8a8a8a"
_ARROWS = {Better.LOWER: "\u2190 ", Better.HIGHER: "\u2192 ", Better.NEAR_ZERO: "", Better.NEITHER: "\u2192 "}
_PANEL_WIDTH_IN = 4.2
_BAR_HEIGHT_IN = 0.24
_AROUND_PANEL_IN = 1.0
_DPI = 110


def draw(evaluation: "Evaluation", path: Path) -> None:
    """Write the chart: one panel per metric, its methods as bars, best on top; bars of standard errors.

    Args:
        evaluation: of at least one image.
        path: the file; its suffix names its type.

    Raises:
        OSError: the file cannot be written.
    """
    count = len(evaluation.metrics)
    columns = count if count <= 3 else min(5, math.ceil(count / 2))
    rows = math.ceil(count / columns)
    height_in = _AROUND_PANEL_IN + _BAR_HEIGHT_IN * len(evaluation.rows)
    # Not pyplot: it keeps every figure, and asks for a display.
    figure = Figure(figsize=(_PANEL_WIDTH_IN * columns, height_in * rows + 0.6))
    figure.set_layout_engine("constrained", w_pad=0.12)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, metric in zip(panels, evaluation.metrics, strict=False):
        _draw_panel(panel, evaluation, metric)
    for panel in panels[count:]:
        panel.set_visible(False)
    images = f"{len(evaluation.images)} image{'' if len(evaluation.images) == 1 else 's'}"
    floor = "" if evaluation.floor is None else f"; gray: {FLOOR}, the floor; pale: no better"
    figure.suptitle(f"{evaluation.model}, {images}: mean and standard error{floor}", fontsize=12)
    figure.savefig(path, dpi=_DPI)


def _color(evaluation: "Evaluation", metric: str, row: "MethodScores") -> str:
    if row.method == FLOOR:
        return _FLOOR_COLOR
    return _METHOD_COLOR if evaluation.beats_floor(row, metric) is not False else _NO_BETTER_COLOR


def _draw_panel(panel: Axes, evaluation: "Evaluation", metric: str) -> None:
    ranked = evaluation.ranked(metric)
    means = [row.means[metric] for row in ranked]
    errors = [0.0 if math.isnan(row.standard_errors[metric]) else row.standard_errors[metric] for row in ranked]
    panel.barh(
        range(len(ranked)),
        means,
        xerr=errors,
        color=[_color(evaluation, metric, row) for row in ranked],
        error_kw={"elinewidth": 1, "ecolor": "#222222"},
        height=0.75,
    )
    panel.set_yticks(range(len(ranked)), [row.method for row in ranked], fontsize=8)
    # The first on top.
    panel.set_ylim(len(ranked) - 0.5, -0.5)
    panel.tick_params(axis="x", labelsize=8)
    panel.locator_params(axis="x", nbins=5)
    panel.tick_params(axis="y", length=0)
    for place, mean in enumerate(means):
        # At the panel's right edge, clear of bars and their errors.
        panel.text(1.02, place, f"{mean:.3f}", transform=panel.get_yaxis_transform(), va="center", fontsize=8)
    if min(means) < 0:
        panel.axvline(0, color="#222222", linewidth=0.8)
    if evaluation.floor is not None:
        panel.axvline(evaluation.floor.means[metric], color=_FLOOR_COLOR, linewidth=1, linestyle="--")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.set_title(metric, fontsize=11, loc="left", fontweight="bold")
    panel.set_xlabel(f"{_ARROWS[BETTER[metric]]}{BETTER[metric]}", fontsize=9)
