"""How an image becomes a model's input, and what came of it, as values. `imaging.preprocess` does it."""

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from enum import StrEnum

from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.geometry import PixelBox

MAX_PIXELS_LIMIT = 89_478_485
"""The largest `max_image_pixels`: Pillow's usual limit on what it opens without complaint."""

MAX_CHANNELS = 16
"""The most channels of a model's input."""

# RGB and RGBA.
_COLORED = frozenset({3, 4})

# A side of an input that is made up, for models that take any: a multiple of what networks shrink images by.
_SAMPLE_PX = 256


class Interpolation(StrEnum):
    """How pixels are resampled. All but NEAREST are antialiased when shrinking, as in Pillow."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


class ChannelOrder(StrEnum):
    """The order of a model's colours."""

    RGB = "rgb"
    BGR = "bgr"


@dataclass(frozen=True, slots=True)
class PreprocessSpec:
    """How an image becomes a model's input: resize, crop the centre, then (value / 255 * scale - mean) / std.

    Attributes:
        resize_px: the length of the shorter side after resizing, in pixels, or the exact (height, width). None: images
            keep their size, which takes a model of inputs of any size.
        crop_px: (height, width) of the centre crop, in pixels: the model's input size. None: the model takes inputs of
            any size, and the image is not cropped.
        mean: one per channel of the model's input, in the order of its channels, for values in [0, scale].
        std: as many, for values in [0, scale], each > 0.
        interpolation: how pixels are resampled.
        max_side_px: of inputs of any size, the longest side: what would be longer is shrunk as a whole. None: no limit.
        window: the values (low, high) of images that become 0 and 1, low < high. None: the range of the image's type.
        window_auto: whether the window is each image's own smallest and largest value; not with `window`.
        channel_order: of the model's colours; those of images are RGB.
        scale: what values in [0, 1] are multiplied by before mean and std, > 0: 255 for networks of Caffe's kind.
        letterbox: whether images keep their proportions and are padded to `crop_px`, which is `resize_px` then.
        pad_to_multiple: what sides of inputs of any size are padded to a multiple of, at the right and bottom.

    Raises:
        ValueError: a value is out of range, does not go with another, or the resized image would be smaller than the
            crop.
    """

    resize_px: int | tuple[int, int] | None
    crop_px: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation
    max_side_px: int | None = None
    window: tuple[float, float] | None = None
    window_auto: bool = False
    channel_order: ChannelOrder = ChannelOrder.RGB
    scale: float = 1.0
    letterbox: bool = False
    pad_to_multiple: int = 1

    def __post_init__(self) -> None:
        if self.crop_px is None:
            self._check_any_size()
        else:
            self._check_crop(self.crop_px)
        if len(self.mean) != len(self.std) or not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"mean and std must be of one length, from 1 to {MAX_CHANNELS}")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise ValueError("mean and std must be finite, and std positive")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError("scale must be finite and positive")
        if self.channel_order is ChannelOrder.BGR and not self.has_colors:
            raise ValueError(f'channel_order = "bgr" is for colours, and the input has {self.channels} channels')
        if self.letterbox and (self.crop_px is None or self.resize_px != self.crop_px):
            raise ValueError("letterbox pads images to one size: set crop_px, and resize_px to the same or not at all")
        if self.pad_to_multiple != 1 and (self.crop_px is not None or self.pad_to_multiple < 1):
            raise ValueError("pad_to_multiple is at least 1, and for inputs of any size: without crop_px")
        if self.window is not None:
            low, high = self.window
            if not (math.isfinite(low) and math.isfinite(high) and low < high) or self.window_auto:
                raise ValueError("window must be two finite values, the smaller first, or each image's own")

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
    def channels(self) -> int:
        """How many channels the model's input has: 1 is gray, 3 is RGB, 4 is RGBA."""
        return len(self.mean)

    @property
    def has_colors(self) -> bool:
        """Whether the channels are colours: RGB or RGBA, in the order that `channel_order` says."""
        return self.channels in _COLORED

    @property
    def gains(self) -> tuple[float, ...]:
        """What each channel of a pixel of 0 to 255 is multiplied by, before `biases` are added."""
        return tuple(self.scale / (255.0 * std) for std in self.std)

    @property
    def biases(self) -> tuple[float, ...]:
        """What is then added to each channel."""
        return tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))

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
        side_px = self.padded_px(min(_SAMPLE_PX, self.max_side_px or _SAMPLE_PX))
        return self.crop_px or (side_px, side_px)

    def padded_px(self, side_px: int) -> int:
        """The length of a side of an input of any size, padded as the network needs it."""
        return side_px + -side_px % self.pad_to_multiple

    def in_words(self, names: AbstractSet[str] | None = None) -> str:
        """The values in the words of the configuration's `[models.preprocess]`; what is not set is left out.

        Args:
            names: of the fields to tell; None for all.
        """
        values: dict[str, object] = {item.name: getattr(self, item.name) for item in fields(self)}
        if values.pop("window_auto"):
            values["window"] = "auto"
        if names is not None:
            values = {name: value for name, value in values.items() if name in names}
        return ", ".join(f"{name} = {_in_toml(value)}" for name, value in values.items() if value is not None)

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
        pixels: uint8 or float32 (H, W, C), at the model's input size, of its channels, C-contiguous.
        region: the part of the upright source image that `pixels` show, in source pixels.
        source_width_px: width of the upright source image.
        source_height_px: height of the upright source image.
        warnings: what may be wrong with the image, for people.
    """

    pixels: ImageArray
    region: PixelBox
    source_width_px: int
    source_height_px: int
    warnings: tuple[str, ...] = ()

    @property
    def pixel_count(self) -> int:
        """Height times width of `pixels`."""
        return int(self.pixels.shape[0] * self.pixels.shape[1])


def _in_toml(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(_in_toml(item) for item in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value}"


def _size_text(size_px: int | tuple[int, int]) -> str:
    return f"shorter side {size_px}" if isinstance(size_px, int) else str(size_px)
