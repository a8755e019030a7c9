"""Pixels as graphs take them: from interleaved uint8 to planes. No torch in here."""

import cv2
import numpy as np

from heatlens_server.core.arrays import Float32Array, UInt8Array
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.imaging.preprocess import normalise


def planes(images: UInt8Array) -> UInt8Array:
    """Lay out uint8 (N, H, W, 3) as (N, 3, H, W), contiguous. OpenCV's split is 5 times as fast as numpy's copy."""
    count, height_px, width_px, _ = images.shape
    separated = np.empty((count, 3, height_px, width_px), np.uint8)
    for image, channels in zip(images, separated, strict=True):
        cv2.split(image, list(channels))
    return separated


def normalisation_table(spec: PreprocessSpec) -> Float32Array:
    """What `imaging.preprocess.normalise` makes of each of the 256 levels: float32 (3, 256)."""
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2)
    return normalise(levels, spec.mean, spec.std)[:, :, 0]


def normalised_planes(images: UInt8Array, table: Float32Array) -> Float32Array:
    """Normalise uint8 (N, H, W, 3) to float32 (N, 3, H, W), exactly as `normalise` does, by looking levels up."""
    count, height_px, width_px, _ = images.shape
    normalised = np.empty((count, 3, height_px, width_px), np.float32)
    for image, channels in zip(images, normalised, strict=True):
        for plane, levels, target in zip(cv2.split(image), table, channels, strict=True):
            cv2.LUT(plane, levels, target)
    return normalised
