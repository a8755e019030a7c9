"""Whether a graph lays its input on its first layer as it is, told by running what comes before that layer."""

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.find import FoundLayer, ImageInput
from heatlens_server.backends.onnx.gradient.tape import Array
from heatlens_server.backends.onnx.source.inside import first_layers_input, part_before
from heatlens_server.core.errors import ModelLoadError

_RANGES = (1.0, 255.0)
"""What white may be for a graph: values beyond those that it takes may be clipped, and those below rounded."""

_LEAST_SPAN = 1e-3
"""The share of the largest difference between black and white from which on a place shows the image."""

_MOST_BEND = 0.02
"""How far grey may be from the middle of black and white where a place is linear in the image."""


def about_placement(model: ir.Model, image: ImageInput, size_px: tuple[int, int], layer: FoundLayer) -> str:
    """What is to be said if a file crops, mirrors, turns or pads its input before its first layer.

    Maps are laid on the input as if each layer covered it all. Ramps down and across the input show which of its
    places each place of the first layer's input comes from.

    Args:
        model: from `read_file`.
        image: its input.
        size_px: (height, width) of the image.
        layer: that is explained: places that are off by less than half a cell of it are not said.

    Returns:
        A sentence; empty if places are where maps show them, or where they cannot be told in this way.
    """
    first = first_layers_input(model, image.value)
    if first is None or first is image.value:
        return ""
    try:
        places = _places(model, image, size_px, first)
    except ModelLoadError:
        return ""
    if places is None:
        return ""
    down, across = places
    rows, columns = ((np.arange(length) + 0.5) / length for length in down.shape)
    # Resizing mixes places at the edges.
    margin = 1.0 / min(*down.shape, *size_px)
    off = max(_largest(down - rows[:, None]) * layer.height, _largest(across - columns) * layer.width)
    if not off > 0.5 + margin * max(layer.height, layer.width):
        return ""
    done = _done(down, across, tolerance=0.5 / max(layer.height, layer.width))
    return (
        f"The file {done} its input before its first layer, and maps are laid on the input as if it did not: they are "
        f"off by up to {off:.1f} cells of the layer. No key overrides that: export the network without that step."
    )


def _places(
    model: ir.Model, image: ImageInput, size_px: tuple[int, int], first: ir.Value
) -> tuple[Array, Array] | None:
    """For each place (h, w) of a value the height and the width of the image that it shows, in [0, 1]; NaN for none.

    None if the value is no map, or not linear in the image.
    """
    run = part_before(model, first, image)
    height, width = size_px
    dtype = (image.value.dtype or ir.DataType.FLOAT).numpy()
    ramp_down = np.repeat((np.arange(height)[:, None] + 0.5) / height, width, axis=1)
    ramp_across = np.repeat((np.arange(width)[None] + 0.5) / width, height, axis=0)
    for white in _RANGES:
        shades = np.zeros(size_px), np.ones(size_px), np.full(size_px, 0.5), ramp_down, ramp_across
        given = (np.broadcast_to(shade[:, :, None], (*size_px, image.channels)) * white for shade in shades)
        values = [run((one if image.channels_last else np.moveaxis(one, 2, 0))[None].astype(dtype)) for one in given]
        if values[0].ndim != 4:
            return None
        black, span = values[0][0], values[1][0] - values[0][0]
        is_shown = np.abs(span) > _LEAST_SPAN * np.abs(span).max(initial=0.0)
        if not is_shown.any():
            continue
        grey, down, across = (
            np.where(is_shown, one[0] - black, np.nan) / np.where(is_shown, span, 1.0) for one in values[2:]
        )
        if _largest(grey - 0.5) <= _MOST_BEND:
            return _over_channels(down), _over_channels(across)
    return None


def _done(down: Array, across: Array, *, tolerance: float) -> str:
    """What is done to the image, in words."""
    is_turned = abs(_slope(down, 1)) > abs(_slope(down, 0))
    is_mirrored = not is_turned and min(_slope(down, 0), _slope(across, 1)) < 0
    is_cropped = any(np.nanmin(one) > tolerance or np.nanmax(one) < 1 - tolerance for one in (down, across))
    words = {"turns": is_turned, "mirrors": is_mirrored, "crops": is_cropped, "pads": bool(np.isnan(down).any())}
    return " and ".join(word for word, is_done in words.items() if is_done) or "moves"


def _over_channels(places: Array) -> Array:
    """The mean (h, w) of (C, h, w) over what is no NaN; NaN where all is."""
    count = np.isfinite(places).sum(axis=0)
    mean: Array = np.where(count, np.nansum(places, axis=0) / np.maximum(count, 1), np.nan)
    return mean


def _slope(places: Array, axis: int) -> float:
    """How places go on along an axis, on average."""
    steps = np.diff(places, axis=axis)
    return float(np.nanmean(steps)) if np.isfinite(steps).any() else 0.0


def _largest(differences: Array) -> float:
    return float(np.nanmax(np.abs(differences)))
