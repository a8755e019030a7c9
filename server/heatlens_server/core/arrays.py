"""Numpy arrays by element type."""

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

ImageArray = npt.NDArray[np.uint8 | np.float32]
"""The pixels of an image (H, W, C), or of several (N, H, W, C): uint8, or float32 on the same scale, 0 to 255."""
