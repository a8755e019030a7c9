"""How a camera was held, as files tell it."""

from typing import Any

import numpy as np
import numpy.typing as npt

ORIENTATION = 0x0112
"""The tag of EXIF and TIFF that says so."""


def upright(values: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn pixels (H, W, S) as their orientation says: 1 to 8 as in TIFF and EXIF, anything else means 1."""
    if orientation in {5, 6, 7, 8}:
        values = values.transpose(1, 0, 2)
    if orientation in {3, 4, 7, 8}:
        values = values[::-1]
    if orientation in {2, 3, 6, 7}:
        values = values[:, ::-1]
    return np.ascontiguousarray(values)
