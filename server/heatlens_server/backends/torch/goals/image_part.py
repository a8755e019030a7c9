"""Where an image lies in what a network's first layer gets: networks may resize, pad and crop images themselves."""

import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.saliency import WHOLE, Part

_log = logging.getLogger(__name__)

_Float64Array = npt.NDArray[np.float64]

_SNAP_PX = 1.0
"""Edges that are found this close to those of the pixels that change with the image are those."""

_LINEAR = 0.02
"""How far the places of the image that rows or columns show may be from a straight line, in parts of the image."""


class _Seen(BaseException):
    """Ends a run. No Exception, so that no network catches it."""


def find_part(run: Callable[[Tensor], object], module: nn.Module, shape: tuple[int, int, int]) -> Part:
    """Find the part of the first layer's input that is the image.

    A black image and a white one tell which pixels come from the image. Two images whose values are the height, or the
    width, of each pixel tell which place of the image they show.

    Args:
        run: runs the network on images (1, C, H, W) in [0, 1].
        module: the network. Left as it was.
        shape: (C, H, W) of the image.

    Returns:
        The part, in fractions of the first layer's input; beyond it where the network crops images. All of it if no
        layer with parameters gets one map (1, C, h, w), or if the image is not laid on it by scaling alone.
    """
    channels, height_px, width_px = shape
    like = next(module.parameters(), torch.zeros(()))
    probes = torch.zeros(4, 1, channels, height_px, width_px, device=like.device, dtype=like.dtype)
    probes[1] = 1.0
    probes[2] = ((torch.arange(height_px, device=like.device) + 0.5) / height_px)[:, None]
    probes[3] = (torch.arange(width_px, device=like.device) + 0.5) / width_px
    with torch.no_grad():
        seen = [values for probe in probes if (values := _first_input(run, module, probe)) is not None]
    if len(seen) < len(probes) or len({values.shape for values in seen}) > 1:
        return WHOLE
    black, white, down, across = seen
    span = white - black
    changing = np.abs(span) > 1e-3 * np.abs(span).max()
    if not changing.any():
        return WHOLE
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = np.where(changing, (down - black) / span, np.nan)
        columns = np.where(changing, (across - black) / span, np.nan)
    vertical, horizontal = _edges(rows, height_px), _edges(columns.swapaxes(-1, -2), width_px)
    if vertical is None or horizontal is None:
        _log.warning(
            "a network does not lay an image of %dx%d pixels on its input by scaling alone: maps are taken to cover "
            "all of its input",
            *(height_px, width_px),
        )
        return WHOLE
    (top, bottom), (left, right) = vertical, horizontal
    return Part(top=top, left=left, bottom=bottom, right=right)


def _first_input(run: Callable[[Tensor], object], module: nn.Module, image: Tensor) -> _Float64Array | None:
    """What the first module with parameters of its own gets, (C, h, w); None if that is not one map."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            found.append(args[0])
            raise _Seen

    layers = [child for child in module.modules() if next(child.parameters(recurse=False), None) is not None]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        run(image)
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not found or len(found[0]) != 1:
        return None
    values: _Float64Array = found[0][0].double().cpu().numpy()
    return values


def _edges(places: _Float64Array, length_px: int) -> tuple[float, float] | None:
    """Where the image begins and ends, in parts of the input's height.

    Args:
        places: (C, h, w): which height of the image each pixel shows, in [0, 1]; NaN where none.
        length_px: the image's height.

    Returns:
        The two; None if heights are not in proportion.
    """
    height = places.shape[1]
    shown = np.flatnonzero(np.isfinite(places).any(axis=(0, 2)))
    first, last = int(shown[0]), int(shown[-1]) + 1
    # What interpolation and padding make of the image's edges is no part of the line.
    margin = (last - first) // 4
    inner = np.arange(first + margin, last - margin)
    heights = np.array([np.nanmedian(places[:, row]) if np.isfinite(places[:, row]).any() else np.nan for row in inner])
    if len(inner) < 2 or length_px < 2:
        # Too few pixels to tell: those that change are the image.
        return first / height, last / height
    slope, start = np.polyfit(inner + 0.5, heights, 1)
    if not np.isfinite(heights).all() or np.abs(slope * (inner + 0.5) + start - heights).max() > _LINEAR or slope <= 0:
        return None
    begin, end = -start / slope, (1.0 - start) / slope
    if abs(begin - first) <= _SNAP_PX:
        begin = first
    if abs(end - last) <= _SNAP_PX:
        end = last
    return float(begin) / height, float(end) / height
