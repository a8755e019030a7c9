"""The chart of an evaluation. The only module that loads matplotlib."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heatlens._evaluation.metrics import BETTER, FLOOR, Better

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("charts need matplotlib: pip install 'heatlens[plot]'") from error

_METHOD_COLOR = "#3b6fb6"
_NO_BETTER_COLOR = "#b4c8e4"
_FLOOR_COLOR = "#8a8a8a"
_ARROWS = {Better.LOWER: "\u2190 ", Better.HIGHER: "\u2192 ", Better.NEAR_ZERO: "", Better.NEITHER: "\u2192 "}
_PANEL_WIDTH_IN = 4.2
_BAR_HEIGHT_IN = 0.24
_AROUND_PANEL_IN = 1.0
_DPI = 110


@dataclass(frozen=True, slots=True)
class Bar:
    """One method in a panel.

    Attributes:
        method: its name.
        mean: its mean.
        standard_error: of the mean; nan: not known.
        beats_floor: whether it is better than Random-CAM; None: cannot be said.
    """

    method: str
    mean: float
    standard_error: float
    beats_floor: bool | None

    @property
    def color(self) -> str:
        """The bar's colour."""
        if self.method == FLOOR:
            return _FLOOR_COLOR
        return _NO_BETTER_COLOR if self.beats_floor is False else _METHOD_COLOR


@dataclass(frozen=True, slots=True)
class Panel:
    """One metric's part of the chart: its bars, the best method first."""

    metric: str
    bars: tuple[Bar, ...]


def draw(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Write the chart: the panels side by side, the best method on top; bars of standard errors.

    Args:
        title: what was evaluated.
        panels: one per metric, with the same methods each.
        path: the file; its suffix names its type.

    Raises:
        OSError: the file cannot be written.
    """
    count = len(panels)
    columns = count if count <= 3 else min(5, math.ceil(count / 2))
    rows = math.ceil(count / columns)
    height_in = _AROUND_PANEL_IN + _BAR_HEIGHT_IN * len(panels[0].bars)
    # Not pyplot: it keeps every figure, and asks for a display.
    figure = Figure(figsize=(_PANEL_WIDTH_IN * columns, height_in * rows + 0.6))
    figure.set_layout_engine("constrained", w_pad=0.12)
    every_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(every_axes, panels, strict=False):
        _draw_panel(axes, panel)
    for axes in every_axes[count:]:
        axes.set_visible(False)
    has_floor = any(bar.method == FLOOR for bar in panels[0].bars)
    floor = f"; gray: {FLOOR}, the floor; pale: no better" if has_floor else ""
    figure.suptitle(f"{title}: mean and standard error{floor}", fontsize=12)
    figure.savefig(path, dpi=_DPI)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    bars = panel.bars
    axes.barh(
        range(len(bars)),
        [bar.mean for bar in bars],
        xerr=[0.0 if math.isnan(bar.standard_error) else bar.standard_error for bar in bars],
        color=[bar.color for bar in bars],
        error_kw={"elinewidth": 1, "ecolor": "#222222"},
        height=0.75,
    )
    axes.set_yticks(range(len(bars)), [bar.method for bar in bars], fontsize=8)
    # The first on top.
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="y", length=0)
    for place, bar in enumerate(bars):
        # At the panel's right edge, clear of bars and their errors.
        axes.text(1.02, place, f"{bar.mean:.3f}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
        if bar.method == FLOOR:
            axes.axvline(bar.mean, color=_FLOOR_COLOR, linewidth=1, linestyle="--")
    if min(bar.mean for bar in bars) < 0:
        axes.axvline(0, color="#222222", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(panel.metric, fontsize=11, loc="left", fontweight="bold")
    better = BETTER[panel.metric]
    axes.set_xlabel(f"{_ARROWS[better]}{better}", fontsize=9)
