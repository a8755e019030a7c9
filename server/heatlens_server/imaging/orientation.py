"""How a camera was held, as files tell it."""

from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

ORIENTATION = 0x0112
"""The tag of EXIF and TIFF that says so."""

_SHORT, _LONG = 3, 4
# What OpenCV turns, four times as fast as numpy copies turned views.
_BY_OPENCV = frozenset(np.dtype(name) for name in ("uint8", "uint16", "float32"))
_ALONG_X, _ALONG_Y, _ALONG_BOTH = 1, 0, -1
_AXES = {_ALONG_X: (1,), _ALONG_Y: (0,), _ALONG_BOTH: (0, 1)}
_FLIPS = {2: _ALONG_X, 3: _ALONG_BOTH, 4: _ALONG_Y, 6: _ALONG_X, 7: _ALONG_BOTH, 8: _ALONG_Y}


def upright(values: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn pixels (H, W, S) as their orientation says: 1 to 8 as in TIFF and EXIF, anything else means 1."""
    values = np.ascontiguousarray(values)
    is_transposed, flip = orientation in {5, 6, 7, 8}, _FLIPS.get(orientation)
    samples = values.shape[2]
    if values.dtype in _BY_OPENCV and samples <= 4:
        turned: npt.NDArray[Any] = cv2.transpose(values) if is_transposed else values
        turned = turned if flip is None else cv2.flip(turned, flip)
        return turned.reshape(*turned.shape[:2], samples)
    if is_transposed:
        values = values.transpose(1, 0, 2)
    if flip is not None:
        values = np.flip(values, _AXES[flip])
    return np.ascontiguousarray(values)


def orientation_of(exif: bytes) -> int:
    """The orientation that EXIF data (TIFF 6.0: header, first directory) tell: 1 to 8; 1 if they tell none."""
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"
    sign = "<" if order == "little" else ">"
    if exif[:2] not in {b"II", b"MM"} or len(exif) < 8:
        return 1
    start = int.from_bytes(exif[4:8], order)
    entry = np.dtype([("tag", f"{sign}u2"), ("type", f"{sign}u2"), ("count", f"{sign}u4"), ("value", "V4")])
    count = min(int.from_bytes(exif[start : start + 2], order), max(0, len(exif) - start - 2) // entry.itemsize)
    if count == 0:
        return 1
    entries = np.frombuffer(exif, entry, count=count, offset=start + 2)
    for found in entries[entries["tag"] == ORIENTATION][:1]:
        value = found["value"].tobytes()[: {_SHORT: 2, _LONG: 4}.get(int(found["type"]), 0)]
        orientation = int.from_bytes(value, order)
        return orientation if orientation in range(1, 9) else 1
    return 1
