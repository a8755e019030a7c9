"""Raw pixels of requests. Everything here reads untrusted input."""

import math
from collections.abc import Sequence

import numpy as np

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.levels import SourcePixels
from heatlens_server.imaging.limits import check_size

# The element types, and the value of each that is the upper end of its range.
_TYPES = {"UINT8": ("|u1", 255.0), "UINT16": ("<u2", 65_535.0), "FLOAT32": ("<f4", 1.0)}

_GRAY, _RGB = 1, 3


def pixels_from_tensor(
    *,
    data_type: str,
    shape: Sequence[int],
    data: bytes,
    max_pixels: int,
    channels: int = _RGB,
    field: str = "image.pixels",
) -> SourcePixels:
    """View a request's raw pixels as an image, without copying.

    Args:
        data_type: the element type's name without its prefix: "UINT8", "UINT16" or "FLOAT32".
        shape: (height, width, S), or (height, width) for one channel; each side >= 1.
        data: exactly as many bytes, row-major and little-endian.
        max_pixels: largest accepted width times height.
        channels: of the model's input. S is as many; gray and RGB may stand for each other.
        field: the tensor's name in errors.

    Returns:
        The image; its values are read-only.

    Raises:
        InvalidArgument: TENSOR_TYPE_UNSUPPORTED, TENSOR_SIZE_MISMATCH or IMAGE_TOO_LARGE, at the wrong field.
    """
    if data_type not in _TYPES:
        raise InvalidArgument.of(
            f"{field}.data_type", f"must be {', '.join(_TYPES)}, got {data_type}", reason="TENSOR_TYPE_UNSUPPORTED"
        )
    dtype, highest = _TYPES[data_type]
    sides = [int(side) for side in shape]
    allowed = (_GRAY, _RGB) if channels in {_GRAY, _RGB} else (channels,)
    is_image = len(sides) == 3 and sides[2] in allowed
    if not (is_image or (len(sides) == 2 and _GRAY in allowed)) or min(sides) < 1:
        # A hostile shape can be long; the message need not be.
        shown = f"{sides}" if len(sides) <= 8 else f"{len(sides)} dimensions"
        also = ", (height, width, 1) or (height, width)" if _GRAY in allowed else ""
        raise InvalidArgument.of(
            f"{field}.shape",
            f"must be (height, width, {allowed[-1]}){also} with sides >= 1, got {shown}",
            reason="TENSOR_SIZE_MISMATCH",
        )
    check_size(sides[1], sides[0], max_pixels, field=f"{field}.shape")
    # Python's integers do not overflow.
    expected_bytes = math.prod(sides) * np.dtype(dtype).itemsize
    if len(data) != expected_bytes:
        raise InvalidArgument.of(
            f"{field}.data",
            f"shape {sides} of {data_type} needs {expected_bytes} bytes, got {len(data)}",
            reason="TENSOR_SIZE_MISMATCH",
            expected_bytes=expected_bytes,
            actual_bytes=len(data),
        )
    values = np.frombuffer(data, dtype).reshape(sides if len(sides) == 3 else (*sides, 1))
    return SourcePixels(values, field=f"{field}.data", highest=highest)
