"""From a decoded image of any size to the model's input pixels, and where those pixels came from.

Resizing and cropping follow torchvision's `Resize` and `CenterCrop` on PIL images, which most models were trained
with, but only the crop is ever computed: an image of 20000x10 pixels costs no more than a normal one.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from heatlens_server.core.arrays import Float32Array, ImageArray
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.preprocess import ChannelOrder, FittedImage, Interpolation, PreprocessSpec
from heatlens_server.imaging.levels import SourcePixels, levels_of

_RGB_CHANNELS = 3
_BGR = [2, 1, 0, 3]
# The gray around images in a letterbox, as in Darknet's and Ultralytics' YOLO.
_LETTERBOX_LEVEL = 114
_HIGHEST = 255.0

# Pillow's filter, and the radius of its kernel in pixels at scale 1.
_FILTERS = {
    Interpolation.BILINEAR: (Image.Resampling.BILINEAR, 1.0),
    Interpolation.BICUBIC: (Image.Resampling.BICUBIC, 2.0),
    Interpolation.LANCZOS: (Image.Resampling.LANCZOS, 3.0),
}


def fit_source(source: SourcePixels, spec: PreprocessSpec) -> FittedImage:
    """Make an image in its own values the model's input.

    Raises:
        InvalidArgument: its values or channels are not for this model; see `levels_of`.
    """
    pixels, warnings = levels_of(source, spec)
    return dataclasses.replace(fit(pixels, spec), warnings=warnings)


def fit(image: ImageArray, spec: PreprocessSpec) -> FittedImage:
    """Resize and centre-crop an image to the model's input, colours in the model's order.

    The result equals torchvision's `Resize` followed by `CenterCrop` on a PIL image, to within one level (two on
    one value in 100,000). One exception: where an image shrinks much more in height than in width, Pillow 13
    resamples columns before rows; here rows always come first, as in earlier versions, which moves strong edges by
    a few levels. NEAREST reads the same source pixels, up to rounding at exact ties.

    With a letterbox, all of the image is resized, and lies in the middle of gray; the region reaches beyond the image
    then. Padding to a multiple is not done here: engines do that, so that maps and masks are of the image alone.

    Args:
        image: (height, width, C), upright, each side >= 1, of the model's channels, colours as RGB.
        spec: sizes and interpolation; mean and std are applied later, on the device.

    Returns:
        Pixels of shape (*spec.crop_px, C) and the image's type; without a crop, of the whole resized image.
    """
    if spec.letterbox:
        return _letterboxed(image, spec)
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
    if spec.channel_order is ChannelOrder.BGR:
        pixels = pixels[:, :, _BGR[: image.shape[2]]]
    return FittedImage(
        pixels=np.ascontiguousarray(pixels), region=region, source_width_px=width_px, source_height_px=height_px
    )


def _letterboxed(image: ImageArray, spec: PreprocessSpec) -> FittedImage:
    height_px, width_px = image.shape[:2]
    whole_height_px, whole_width_px = spec.input_px
    scale = min(whole_height_px / height_px, whole_width_px / width_px)
    inner_height_px, inner_width_px = max(1, round(height_px * scale)), max(1, round(width_px * scale))
    inner_px = (inner_height_px, inner_width_px)
    inner = fit(image, dataclasses.replace(spec, letterbox=False, resize_px=inner_px, crop_px=inner_px))
    top_px, left_px = (whole_height_px - inner_height_px) // 2, (whole_width_px - inner_width_px) // 2
    pixels = np.full((whole_height_px, whole_width_px, image.shape[2]), _LETTERBOX_LEVEL, image.dtype)
    pixels[top_px : top_px + inner_height_px, left_px : left_px + inner_width_px] = inner.pixels
    scale_y, scale_x = height_px / inner_height_px, width_px / inner_width_px
    region = PixelBox(
        left=-left_px * scale_x,
        top=-top_px * scale_y,
        right=(whole_width_px - left_px) * scale_x,
        bottom=(whole_height_px - top_px) * scale_y,
    )
    return dataclasses.replace(inner, pixels=pixels, region=region)


def normalise(pixels: ImageArray, spec: PreprocessSpec) -> Float32Array:
    """Return (value / 255 * scale - mean) / std as float32 (C, H, W): the reference for engines on their devices."""
    values = pixels.astype(np.float32) / np.float32(255) * np.float32(spec.scale)
    return np.ascontiguousarray(
        ((values - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)).transpose(2, 0, 1)
    )


def _resample(
    image: ImageArray, region: PixelBox, crop_px: tuple[int, int], interpolation: Interpolation
) -> ImageArray:
    """Resize `region` of `image` to the crop: along rows first, then along columns, uint8 in between, as in Pillow."""
    resampling, radius = _FILTERS[interpolation]
    height_px, width_px = image.shape[:2]
    crop_height_px, crop_width_px = crop_px
    # Only the pixels under the crop and its kernels are handed to Pillow, which copies what it is given.
    top, bottom = _window(region.top, region.bottom, crop_height_px, radius, height_px)
    left, right = _window(region.left, region.right, crop_width_px, radius, width_px)
    window = image[top:bottom, left:right]
    box = (region.left - left, region.top - top, region.right - left, region.bottom - top)
    if image.dtype == np.uint8 and image.shape[2] == _RGB_CHANNELS:
        # A writable copy: torch.from_numpy objects to Pillow's read-only view.
        return np.array(_resized(window, crop_px, resampling, box))
    # Pillow has no other images of several channels that are no colours, and none of float32.
    bands = (np.ascontiguousarray(window[:, :, channel]) for channel in range(image.shape[2]))
    fitted = np.stack([np.asarray(_resized(band, crop_px, resampling, box)) for band in bands], axis=2)
    # Kernels with negative lobes overshoot; of uint8, Pillow cuts that off itself.
    return fitted if image.dtype == np.uint8 else fitted.clip(0.0, _HIGHEST)


def _resized(
    window: ImageArray, size_px: tuple[int, int], resampling: Image.Resampling, box: tuple[float, float, float, float]
) -> Image.Image:
    """Resize a part of an image: uint8 RGB, or one channel of uint8 or float32."""
    left, top, right, bottom = box
    height_px, width_px = size_px
    image = Image.fromarray(window)
    # Two calls, as Pillow's choice of the first axis depends on the sizes it sees, and it sees the crop only.
    wide = image.resize((width_px, image.height), resampling, box=(left, 0, min(right, image.width), image.height))
    return wide.resize((width_px, height_px), resampling, box=(0, top, width_px, min(bottom, image.height)))


def _window(start: float, stop: float, count: int, radius: float, length_px: int) -> tuple[int, int]:
    """Return [first, last) of the source pixels that resampling [start, stop) to `count` pixels may read."""
    reach = radius * max((stop - start) / count, 1.0) + 1.0
    return max(math.floor(start - reach), 0), min(math.ceil(stop + reach), length_px)


def _nearest(offset_px: int, count: int, scale: float, length_px: int) -> npt.NDArray[np.intp]:
    """Return the source index of each of `count` output pixels from `offset_px` on."""
    centres = (np.arange(offset_px, offset_px + count, dtype=np.float64) + 0.5) * scale
    return np.minimum(centres.astype(np.intp), length_px - 1)
