"""From a decoded image of any size to the model's input pixels, and where those pixels came from.

Resizing and cropping follow torchvision's `Resize` and `CenterCrop` on PIL images, which most models were trained
with, but only the crop is ever computed: an image of 20000x10 pixels costs no more than a normal one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from PIL import Image

from heatlens import PixelBox

UInt8Array = npt.NDArray[np.uint8]


class Interpolation(StrEnum):
    """How pixels are resampled. All but NEAREST are antialiased when shrinking, as in Pillow."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


# A side of an input that is made up, for models that take any: a multiple of what networks shrink images by.
_SAMPLE_PX = 256

# Pillow's filter, and the radius of its kernel in pixels at scale 1.
_FILTERS = {
    Interpolation.BILINEAR: (Image.Resampling.BILINEAR, 1.0),
    Interpolation.BICUBIC: (Image.Resampling.BICUBIC, 2.0),
    Interpolation.LANCZOS: (Image.Resampling.LANCZOS, 3.0),
}


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """How an image becomes a model's input: resize, crop the centre, then (value / 255 - mean) / std.

    Attributes:
        resize_px: the length of the shorter side after resizing, in pixels, or the exact (height, width). None: images
            keep their size, which takes a model of inputs of any size.
        crop_px: (height, width) of the centre crop, in pixels: the model's input size. None: the model takes inputs of
            any size, and the image is not cropped.
        mean: one per RGB channel, for values in [0, 1].
        std: one per RGB channel, for values in [0, 1], each > 0.
        interpolation: how pixels are resampled.
        max_side_px: of inputs of any size, the longest side: what would be longer is shrunk as a whole. None: no limit.

    Raises:
        ValueError: a value is out of range, does not go with another, or the resized image would be smaller than the
            crop.
    """

    resize_px: int | tuple[int, int] | None
    crop_px: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Interpolation
    max_side_px: int | None = None

    def __post_init__(self) -> None:
        if self.crop_px is None:
            self._check_any_size()
        else:
            self._check_crop(self.crop_px)
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ValueError("mean and std must be finite, and std positive")

    def _check_any_size(self) -> None:
        if isinstance(self.resize_px, tuple):
            raise ValueError(f"resize_px {self.resize_px} is an exact size: set crop_px as well")  # noqa: TRY004
        if any(side is not None and side < 1 for side in (self.resize_px, self.max_side_px)):
            raise ValueError("resize_px and max_side_px must be at least 1")

    def _check_crop(self, crop_px: tuple[int, int]) -> None:
        if self.resize_px is None:
            raise ValueError("crop_px needs resize_px")
        if self.max_side_px is not None:
            raise ValueError("max_side_px is for inputs of any size, without crop_px")
        sides = (self.resize_px, self.resize_px) if isinstance(self.resize_px, int) else self.resize_px
        if min(*crop_px, *sides) < 1:
            raise ValueError("resize_px and crop_px must be at least 1")
        if any(side < crop for side, crop in zip(sides, crop_px, strict=True)):
            raise ValueError(f"resize_px ({_size_text(self.resize_px)}) is smaller than crop_px ({crop_px})")

    @property
    def input_px(self) -> tuple[int, int]:
        """(height, width) of the model's input, for models of one size.

        Raises:
            ValueError: the model takes inputs of any size.
        """
        if self.crop_px is None:
            raise ValueError("the model takes inputs of any size")
        return self.crop_px

    @property
    def sample_px(self) -> tuple[int, int]:
        """(height, width) of an input to try the model with: its input size, or else a small one."""
        side_px = min(_SAMPLE_PX, self.max_side_px or _SAMPLE_PX)
        return self.crop_px or (side_px, side_px)

    def resized_size(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Return the (height, width) that an image of (height_px, width_px) is resized to, as torchvision does."""
        if isinstance(self.resize_px, tuple):
            return self.resize_px
        short_px, long_px = min(height_px, width_px), max(height_px, width_px)
        if self.resize_px is not None:
            # torchvision truncates the long side (_compute_resized_output_size).
            short_px, long_px = self.resize_px, int(self.resize_px * long_px / short_px)
        if self.max_side_px is not None and long_px > self.max_side_px:
            short_px, long_px = max(1, int(self.max_side_px * short_px / long_px)), self.max_side_px
        return (short_px, long_px) if height_px <= width_px else (long_px, short_px)


@dataclass(frozen=True, slots=True)
class FittedImage:
    """A model's input pixels and where they came from.

    Attributes:
        pixels: uint8 (H, W, 3), RGB, at the model's input size, C-contiguous.
        region: the part of the upright source image that `pixels` show, in source pixels.
        source_width_px: width of the upright source image.
        source_height_px: height of the upright source image.
    """

    pixels: UInt8Array
    region: PixelBox
    source_width_px: int
    source_height_px: int


def fit(image: UInt8Array, spec: PreprocessSpec) -> FittedImage:
    """Resize and centre-crop an image to the model's input.

    The result equals torchvision's `Resize` followed by `CenterCrop` on a PIL image, to within one level (two on
    one value in 100,000). One exception: where an image shrinks much more in height than in width, Pillow 13
    resamples columns before rows; here rows always come first, as in earlier versions, which moves strong edges by
    a few levels. NEAREST reads the same source pixels, up to rounding at exact ties.

    Args:
        image: uint8 (height, width, 3), RGB, upright, each side >= 1.
        spec: sizes and interpolation; mean and std are applied later, on the device.

    Returns:
        Pixels of shape (*spec.crop_px, 3); without a crop, of the whole resized image.
    """
    height_px, width_px = image.shape[:2]
    resized_height_px, resized_width_px = spec.resized_size(height_px, width_px)
    crop_height_px, crop_width_px = spec.crop_px or (resized_height_px, resized_width_px)
    # torchvision's CenterCrop; Python's round is half to even there too.
    top_px = round((resized_height_px - crop_height_px) / 2.0)
    left_px = round((resized_width_px - crop_width_px) / 2.0)
    scale_y, scale_x = height_px / resized_height_px, width_px / resized_width_px
    region = PixelBox(
        left=left_px * scale_x,
        top=top_px * scale_y,
        # Not past the image by rounding, where there is no crop.
        right=min((left_px + crop_width_px) * scale_x, float(width_px)),
        bottom=min((top_px + crop_height_px) * scale_y, float(height_px)),
    )
    if (resized_height_px, resized_width_px) == (height_px, width_px):
        pixels = image[top_px : top_px + crop_height_px, left_px : left_px + crop_width_px]
    elif spec.interpolation is Interpolation.NEAREST:
        rows = _nearest(top_px, crop_height_px, scale_y, height_px)
        columns = _nearest(left_px, crop_width_px, scale_x, width_px)
        pixels = image[rows[:, None], columns]
    else:
        pixels = _resample(image, region, (crop_height_px, crop_width_px), spec.interpolation)
    return FittedImage(
        pixels=np.ascontiguousarray(pixels), region=region, source_width_px=width_px, source_height_px=height_px
    )


def normalise(pixels: UInt8Array, mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """Return (value / 255 - mean) / std as float32 (3, H, W): the reference for what engines do on the device."""
    values = pixels.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(
        ((values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).transpose(2, 0, 1)
    )


def _resample(
    image: UInt8Array, region: PixelBox, crop_px: tuple[int, int], interpolation: Interpolation
) -> UInt8Array:
    """Resize `region` of `image` to the crop: along rows first, then along columns, uint8 in between, as in Pillow."""
    resampling, radius = _FILTERS[interpolation]
    height_px, width_px = image.shape[:2]
    crop_height_px, crop_width_px = crop_px
    # Only the pixels under the crop and its kernels are handed to Pillow, which copies what it is given.
    top, bottom = _window(region.top, region.bottom, crop_height_px, radius, height_px)
    left, right = _window(region.left, region.right, crop_width_px, radius, width_px)
    window = Image.fromarray(image[top:bottom, left:right])
    # Two calls, as Pillow's choice of the first axis depends on the sizes it sees, and it sees the crop only.
    wide = window.resize(
        (crop_width_px, window.height),
        resampling,
        box=(region.left - left, 0, min(region.right - left, window.width), window.height),
    )
    fitted = wide.resize(
        crop_px[::-1], resampling, box=(0, region.top - top, wide.width, min(region.bottom - top, wide.height))
    )
    # A writable copy: torch.from_numpy objects to Pillow's read-only view.
    return np.array(fitted)


def _window(start: float, stop: float, count: int, radius: float, length_px: int) -> tuple[int, int]:
    """Return [first, last) of the source pixels that resampling [start, stop) to `count` pixels may read."""
    reach = radius * max((stop - start) / count, 1.0) + 1.0
    return max(math.floor(start - reach), 0), min(math.ceil(stop + reach), length_px)


def _nearest(offset_px: int, count: int, scale: float, length_px: int) -> npt.NDArray[np.intp]:
    """Return the source index of each of `count` output pixels from `offset_px` on."""
    centres = (np.arange(offset_px, offset_px + count, dtype=np.float64) + 0.5) * scale
    return np.minimum(centres.astype(np.intp), length_px - 1)


def _size_text(size_px: int | tuple[int, int]) -> str:
    return f"shorter side {size_px}" if isinstance(size_px, int) else str(size_px)
