"""Reading a layer's output as a feature map, and putting one back.

Every method works on maps (N, C, h, w). Convolutions return those; windowed transformers return (N, h, w, C), others
tokens (N, T, C) of which the first few are no place of the image; feature pyramids return several maps at once.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from heatlens_server.core.grid import MAP, Grid, Layout

__all__ = ["MAP", "Grid", "LayerOutput", "Layout", "from_levels", "from_map", "levels_of", "to_map"]

LayerOutput = Tensor | Mapping[str, Tensor]
"""What a layer returns."""


def to_map(output: LayerOutput, grid: Grid) -> Tensor:
    """Read a layer's output as a map (N, C, h, w); a view of it wherever that is possible.

    A pyramid becomes one map of all levels' channels: each level's absolute values resized bilinearly to the coarsest
    level, as in the Faster R-CNN tutorial of the `grad-cam` package (`fasterrcnn_reshape_transform`).

    Args:
        output: what the layer returned.
        grid: its form.

    Raises:
        ValueError: the output is not of that form.
    """
    if grid.layout is Layout.PYRAMID:
        if isinstance(output, Tensor) or not output:
            raise ValueError("output: a pyramid must be maps by name")
        levels = [level.abs() for level in output.values()]
        coarsest = min(levels, key=lambda level: level.shape[-2] * level.shape[-1]).shape[-2:]
        return torch.cat([F.interpolate(level, size=coarsest, mode="bilinear") for level in levels], dim=1)
    if not isinstance(output, Tensor):
        raise ValueError(f"output: must be a tensor, not {type(output).__name__}")  # noqa: TRY004 - one error for all forms
    if grid.layout is Layout.TOKENS:
        if output.ndim != 3 or output.shape[1] != grid.prefix + grid.height * grid.width:
            raise ValueError(
                f"output: must be (N, {grid.prefix} + {grid.height} * {grid.width}, C), not {tuple(output.shape)}"
            )
        return torch.unflatten(output[:, grid.prefix :].transpose(1, 2), 2, (grid.height, grid.width))
    if output.ndim != 4:
        raise ValueError(f"output: must have 4 dimensions, not {tuple(output.shape)}")
    return output.permute(0, 3, 1, 2) if grid.layout is Layout.CHANNELS_LAST else output


def from_map(features: Tensor, output: Tensor, grid: Grid) -> Tensor:
    """Put a map back into the form of a layer's output: the inverse of `to_map`.

    Args:
        features: (R, C, h, w).
        output: what the layer returned, of 1 or R rows: its prefix tokens are kept.
        grid: its form; not a pyramid.

    Returns:
        A layer's output of R rows.

    Raises:
        ValueError: a pyramid has no inverse.
    """
    if grid.layout is Layout.PYRAMID:
        raise ValueError("grid: a pyramid cannot be put together again")
    if grid.layout is Layout.CHANNELS_LAST:
        return features.permute(0, 2, 3, 1)
    if grid.layout is Layout.TOKENS:
        tokens = features.flatten(2).transpose(1, 2)
        if not grid.prefix:
            return tokens
        return torch.cat([output[:, : grid.prefix].expand(features.shape[0], -1, -1), tokens], dim=1)
    return features


def levels_of(output: LayerOutput, grid: Grid) -> list[Tensor]:
    """The maps (N, C_i, h_i, w_i) that a layer's output is made of: one, or a pyramid's."""
    if grid.layout is Layout.PYRAMID and not isinstance(output, Tensor):
        return list(output.values())
    return [to_map(output, grid)]


def from_levels(levels: Sequence[Tensor], output: LayerOutput, grid: Grid) -> LayerOutput:
    """Put levels of R rows back into the form of a layer's output of 1 or R rows; see `from_map`."""
    if isinstance(output, Tensor):
        return from_map(levels[0], output, grid)
    return dict(zip(output, levels, strict=True))
