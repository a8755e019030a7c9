"""How a layer's output lies on the image: as a feature map, or as something that becomes one. No torch in here."""

from dataclasses import dataclass
from enum import StrEnum


class Layout(StrEnum):
    """The form of a layer's output. The value is its name in configuration files."""

    MAP = "map"
    """(N, C, h, w)."""
    CHANNELS_LAST = "channels-last"
    """(N, h, w, C)."""
    TOKENS = "tokens"
    """(N, prefix + h * w, C), row by row after the prefix."""
    PYRAMID = "pyramid"
    """Maps (N, C_i, h_i, w_i) by name, finest first."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How to read a layer's output as a map.

    Attributes:
        layout: its form.
        prefix: tokens before the grid (class, distillation, registers); 0 but for tokens.
        height: rows of the grid; 0 but for tokens.
        width: columns of the grid; 0 but for tokens.
    """

    layout: Layout = Layout.MAP
    prefix: int = 0
    height: int = 0
    width: int = 0


MAP = Grid()
