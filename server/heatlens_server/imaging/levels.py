"""From an image's own values to those of a model's input: 0 to 255, of as many channels as the model takes."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from heatlens_server.core.arrays import Float32Array, ImageArray
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.preprocess import PreprocessSpec

_GRAY, _RGB, _RGBA = 1, 3, 4
_HIGHEST_LEVEL = np.float32(255)
_HIGHEST_16_BIT = 65_535
_MOST_FLOAT32 = float(np.finfo(np.float32).max)

_FAR = 1 << 12
"""A window so many times its width from 0 is too fine for float32."""

_LOOKS_SHALLOW = 4
"""An image whose type ends below this part of a model's window is not of the kind that the window is for."""

_LOOKS_EMPTY = 1 << 14
"""A 16-bit image with no value from here on uses less than a quarter of its range."""


@dataclass(frozen=True, slots=True, eq=False)
class SourcePixels:
    """An upright image in its own values, before they are brought to a model's range and channels.

    Attributes:
        values: (H, W, S), S >= 1: numbers of any type. RGB, and RGBA of files with an alpha channel, in this order.
        field: the request's field that it came in, for errors.
        highest: the value that is the upper end of the range: 255 of uint8, 65535 of uint16 or less if the file says
            that it has fewer bits, 1.0 of floats; None if its type has no range that means anything.
        window: the values (low, high) that the file says are to be black and white; None if it does not.
        inverted: whether its low values are bright.
        warnings: what may be wrong with it, for people.
    """

    values: npt.NDArray[Any]
    field: str
    highest: float | None
    window: tuple[float, float] | None = None
    inverted: bool = False
    warnings: tuple[str, ...] = ()


def levels_of(source: SourcePixels, spec: PreprocessSpec) -> tuple[ImageArray, tuple[str, ...]]:
    """Bring an image to the values and channels of a model's input.

    Args:
        source: the image.
        spec: of the model: its channels and its window.

    Returns:
        uint8 (H, W, C) of 8-bit images without a window, or else float32 in 0 to 255; and what may be wrong, for
        people.

    Raises:
        InvalidArgument: IMAGE_CHANNELS_MISMATCH if it has other channels than the model takes; IMAGE_RANGE_UNKNOWN if
            its values say nothing without a window, or are not finite.
    """
    levels, warnings = _levels_of(source, spec)
    if levels.shape[2] == _GRAY and spec.channels == _RGB:
        levels = np.repeat(levels, _RGB, axis=2)
    return (_HIGHEST_LEVEL.astype(levels.dtype) - levels if source.inverted else levels), warnings


def _levels_of(source: SourcePixels, spec: PreprocessSpec) -> tuple[ImageArray, tuple[str, ...]]:
    warnings = source.warnings
    values = _of_channels(source, spec.channels)
    window = spec.window or source.window
    if spec.window_auto:
        window = _extent(values, source.field)
    if window is not None:
        return _in_window(values, window, source.field), (*warnings, *_about_window(source, spec, window))
    if values.dtype == np.uint8 and source.highest == _HIGHEST_LEVEL:
        return values, warnings
    if source.highest is None:
        raise _no_range(source.field, f"{values.dtype} values have no range of their own")
    if values.dtype.kind == "f":
        low, high = _extent(values, source.field)
        if low < 0.0 or high > source.highest:
            raise _no_range(source.field, f"must be in [0, 1], got values from {low:g} to {high:g}")
    elif source.highest == _HIGHEST_16_BIT and (most := int(values.max())) < _LOOKS_EMPTY:
        dark = (
            f"the image uses {most} of {_HIGHEST_16_BIT} values and is dark to the model: set window of "
            "[models.preprocess] if its values have fewer than 16 bits"
        )
        warnings = (*warnings, dark)
    return values.astype(np.float32) * np.float32(_HIGHEST_LEVEL / source.highest), warnings


def _of_channels(source: SourcePixels, channels: int) -> npt.NDArray[Any]:
    values = source.values
    own = values.shape[2]
    # Gray is made three channels at last: until then a third of the memory does.
    if own == channels or (own == _GRAY and channels == _RGB):
        return values
    if own == _RGBA and channels in {_GRAY, _RGB}:
        # Files only: a tensor of four channels for a model of three was refused before.
        values, own = values[:, :, :_RGB], _RGB
    if own == _RGB and channels == _GRAY:
        return gray_of(values)
    if own == channels:
        return values
    raise wrong_channels(source.field, channels, own)


def wrong_channels(field: str, channels: int, own: int) -> InvalidArgument:
    """The error of an image of other channels than the model takes."""
    return InvalidArgument.of(
        field,
        f"the model takes {channels} channels, and the image has {own}",
        reason="IMAGE_CHANNELS_MISMATCH",
        channels=channels,
        image_channels=own,
    )


def gray_of(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The luma of RGB (H, W, 3), as (H, W, 1) of the same type: ITU-R 601-2, as Pillow's "L", to within one level."""
    if values.dtype in {np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32)}:
        # OpenCV does not take strides that are negative.
        luma: npt.NDArray[Any] = cv2.cvtColor(np.ascontiguousarray(values), cv2.COLOR_RGB2GRAY)
    else:
        luma = values @ np.array([0.299, 0.587, 0.114])
    return luma[:, :, None]


def _extent(values: npt.NDArray[Any], field: str) -> tuple[float, float]:
    """The smallest and the largest value."""
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InvalidArgument.of(field, "every value must be finite", reason="IMAGE_RANGE_UNKNOWN")
    return low, high


def _about_window(source: SourcePixels, spec: PreprocessSpec, window: tuple[float, float]) -> tuple[str, ...]:
    """What is to be said where a model's window is for images of more bits than this one has."""
    low, high = window
    highest = source.highest
    if spec.window is None or highest is None or highest - low >= (high - low) / _LOOKS_SHALLOW:
        return ()
    reach = f"the image's values reach {highest:g} at most and the model's window is from {low:g} to {high:g}"
    return (f"{reach}: the image is dark to the model",)


def _in_window(values: npt.NDArray[Any], window: tuple[float, float], field: str) -> Float32Array:
    """Stretch a window to 0 to 255; what lies outside becomes its end."""
    low, high = window
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise InvalidArgument.of(field, "every value must be finite", reason="IMAGE_RANGE_UNKNOWN")
    if low == high:
        return np.zeros(values.shape, np.float32)
    scale = 255.0 / (high - low)
    if not (max(abs(low), abs(high), scale) <= _MOST_FLOAT32 and scale > 0):
        raise InvalidArgument.of(field, f"the window from {low:g} to {high:g} is none", reason="IMAGE_RANGE_UNKNOWN")
    # What is beyond the type's range is beyond the window.
    with np.errstate(over="ignore"):
        if max(abs(low), abs(high)) > _FAR * (high - low):
            scaled = (values - np.float64(low)).astype(np.float32)
        else:
            scaled = values.astype(np.float32)
            scaled -= np.float32(low)
        scaled *= np.float32(scale)
    return np.clip(scaled, 0.0, _HIGHEST_LEVEL, out=scaled)


def _no_range(field: str, what: str) -> InvalidArgument:
    return InvalidArgument.of(
        field,
        f"{what}: set window of the model's [models.preprocess] to the values that are to be black and white, or "
        'to "auto"',
        reason="IMAGE_RANGE_UNKNOWN",
    )
