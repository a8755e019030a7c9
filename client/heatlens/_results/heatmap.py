"""A saliency map, and placing it on its image."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens._exceptions import InvalidArgumentError
from heatlens._results.geometry import Float32Array, PixelBox, place_map
from heatlens._results.images import ImageSource, UInt8Array, checked_path, decode_image, write_image
from heatlens._results.overlay import blend, color_map


# eq=False: arrays have no truth value; two heatmaps are the same only if they are one object.
@dataclass(frozen=True, slots=True, eq=False)
class Heatmap:
    """A saliency map and what it needs to be placed on its image.

    Attributes:
        values: float32 (height, width) in [0, 1], read-only.
        scale: the raw map's largest value minus its smallest; 0 if the map is flat.
        offset: the raw map's smallest value.
        region: the part of the source image that the model saw, in pixels of the upright source image.
        placed: whether `values` already has the source image's size (map_size="source").
        source_size: (width, height) of the upright source image, in pixels; None if the server is too old to say.
    """

    values: Float32Array
    scale: float
    offset: float
    region: PixelBox
    placed: bool
    source_size: tuple[int, int] | None = None

    def __repr__(self) -> str:
        height, width = self.values.shape
        return f"Heatmap({width}x{height}, region={self.region})"

    @property
    def is_flat(self) -> bool:
        """Whether the raw map has one value everywhere: no pixel matters more than another.

        `values` are then all 0. With an `offset` of 0, nothing speaks for what was explained.
        """
        return self.scale == 0

    def raw(self) -> Float32Array:
        """Return the map before normalisation, `values * scale + offset`, float32 (height, width).

        Unlike `values`, raw maps can be compared between classes and images, at the same `map_size`: the minimum and
        maximum are those of the map at the size that was asked for, and enlarging flattens peaks. Of a placed map,
        only pixels inside `region` mean anything.
        """
        return self.values * np.float32(self.scale) + np.float32(self.offset)

    def on(self, target: tuple[int, int] | npt.NDArray[Any] | None = None) -> Float32Array:
        """Return the map placed on its source image: float32 (H, W) in [0, 1], zero where the model did not look.

        Args:
            target: the upright source image's (width, height) in pixels, or the image itself, an array (H, W, ...).
                None: `source_size`.

        Returns:
            float32 (H, W); see `heatlens.place_map` for the exact definition.

        Raises:
            InvalidArgumentError: the target is no size or not that of the source image, or None without `source_size`.
        """
        return self._placed_on(self._size_of(target), argument="target")

    def _size_of(self, target: tuple[int, int] | npt.NDArray[Any] | None) -> tuple[int, int]:
        """Return the (width, height) that `on` was asked for."""
        if target is None:
            known = self._known_size()
            if known is None:
                raise InvalidArgumentError.of("target", "give the image's size: this server did not tell it")
            return known
        sides: Sequence[Any] = ()
        if isinstance(target, np.ndarray):
            sides = target.shape[1::-1]
        elif isinstance(target, Sequence) and not isinstance(target, str | bytes):
            sides = target
        try:
            width_px, height_px = (operator.index(side) for side in sides)
        except (TypeError, ValueError):
            width_px = height_px = 0
        if width_px < 1 or height_px < 1:
            got = f"an array of shape {target.shape}" if isinstance(target, np.ndarray) else repr(target)
            raise InvalidArgumentError.of("target", f"expected (width, height) >= 1 or an image, got {got}")
        return width_px, height_px

    def _known_size(self) -> tuple[int, int] | None:
        """Return the source image's (width, height) as far as this map knows it."""
        if self.placed:
            height_px, width_px = self.values.shape
            return width_px, height_px
        return self.source_size

    def _placed_on(self, size: tuple[int, int], *, argument: str) -> Float32Array:
        """Return the map on an image of `size` (width, height), which must be that of the source image."""
        known = self._known_size()
        if known is not None and known != size:
            raise InvalidArgumentError.of(
                argument,
                f"the map was made for an upright image of {known[0]}x{known[1]} pixels, got {size[0]}x{size[1]}",
            )
        return self.values if self.placed else place_map(self.values, self.region, size)

    def overlay(self, image: ImageSource, *, colormap: str = "jet", alpha: float = 0.5) -> UInt8Array:
        """Return the image with the map over it, in colours: uint8 (H, W, 3), RGB, upright.

        Pixels that the model did not see keep their colours. Under a flat map all do: an even tint would look like a
        result.

        Args:
            image: the explained image: a path, the bytes of a file, or pixels, as for `explain`.
            colormap: name of an OpenCV colour map: "jet", "viridis", "turbo", ...
            alpha: opacity of the colours, in [0, 1].

        Raises:
            InvalidArgumentError: not an image, not of the source image's size, no such colour map, or alpha out of
                range.
            FileNotFoundError: there is no such file.
        """
        pixels = decode_image(image)
        height_px, width_px = pixels.shape[:2]
        placed = self._placed_on((width_px, height_px), argument="image")
        return blend(pixels, None if self.is_flat else placed, self.region, colormap=colormap, alpha=alpha)

    def save(
        self,
        path: str | PathLike[str],
        image: ImageSource | None = None,
        *,
        colormap: str = "jet",
        alpha: float = 0.5,
    ) -> None:
        """Write the map to a file of the type that the suffix names.

        Args:
            path: .npy for `values` (whatever the other arguments); .png, .jpg, ... for a picture.
            image: the explained image: the picture is its overlay. None: the map alone, at its own size.
            colormap: as for `overlay`.
            alpha: as for `overlay`.

        Raises:
            InvalidArgumentError: not a path, the suffix is unknown, the picture is too large for its type, or as for
                `overlay`.
            OSError: the file cannot be written.
        """
        path = checked_path("path", path)
        if path.suffix == ".npy":
            np.save(path, self.values, allow_pickle=False)
        elif image is None:
            write_image(path, color_map(self.values, colormap))
        else:
            write_image(path, self.overlay(image, colormap=colormap, alpha=alpha))
