"""What every reader of images refuses: images that are too large, and those that cannot be read."""

from heatlens_server.core.errors import InvalidArgument

# OpenCV refuses longer sides (CV_IO_MAX_IMAGE_WIDTH, CV_IO_MAX_IMAGE_HEIGHT).
_MAX_SIDE_PX = 1 << 20


def check_size(width_px: int, height_px: int, max_pixels: int, *, field: str) -> None:
    """Check an image's size, as its header or shape tells it, before any pixel is decoded.

    Raises:
        InvalidArgument: IMAGE_TOO_LARGE, at `field`.
    """
    if width_px * height_px > max_pixels or max(width_px, height_px) > _MAX_SIDE_PX:
        raise InvalidArgument.of(
            field,
            f"{width_px}x{height_px} pixels; at most {max_pixels} are accepted, and {_MAX_SIDE_PX} per side",
            reason="IMAGE_TOO_LARGE",
            max_pixels=max_pixels,
            width_px=width_px,
            height_px=height_px,
        )


def undecodable(field: str, description: str) -> InvalidArgument:
    """The error of a file that cannot be read."""
    return InvalidArgument.of(field, description, reason="IMAGE_UNDECODABLE")
