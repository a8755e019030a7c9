"""What every reader of images refuses: images that are too large or too complex, and those that cannot be read."""

from heatlens_server.core.errors import InvalidArgument

MAX_PARTS = 1_000
"""Most segments, chunks, blocks, boxes or tags of a file, beside one for each `PART_BYTES` of it."""

PART_BYTES = 4_096
"""Files of many bytes may have more parts: programs cut the pixels of a PNG into chunks of some kilobytes."""

PASSES = 32
"""Most passes of a decoder over the largest image, in samples: a progressive JPEG without subsampling has 14."""

TRUNCATED = "the image is truncated or corrupt"

# OpenCV refuses longer sides (CV_IO_MAX_IMAGE_WIDTH, CV_IO_MAX_IMAGE_HEIGHT).
_MAX_SIDE_PX = 1 << 20


class Malformed(Exception):
    """A file cannot be read. The message is for its sender."""


class TooComplex(Exception):
    """A file would cost more than any plain one.

    Attributes:
        metadata: the limit, by its name.
    """

    def __init__(self, message: str, **metadata: int) -> None:
        super().__init__(message)
        self.metadata = metadata


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


def check_parts(count: int, file_bytes: int, what: str) -> None:
    """Check how many parts of a file were seen so far.

    Args:
        count: of the parts.
        file_bytes: size of the file.
        what: the parts' name, in the plural.

    Raises:
        TooComplex: they are too many.
    """
    most = MAX_PARTS + file_bytes // PART_BYTES
    if count > most:
        raise TooComplex(
            f"the file has more than {most} {what}: at most {MAX_PARTS}, and one per {PART_BYTES} bytes, are accepted",
            max_image_parts=MAX_PARTS,
        )


def check_work(samples: int, max_pixels: int) -> None:
    """Check how many samples a decoder would go over, each as often as it would.

    Raises:
        TooComplex: they are too many.
    """
    most = PASSES * max_pixels
    if samples > most:
        raise TooComplex(
            f"its passes, scans or tiles go over {samples} samples in all; at most {most} are accepted",
            max_image_samples=most,
        )


def too_complex(field: str, error: TooComplex) -> InvalidArgument:
    """The error of a file that would cost more than any plain one."""
    return InvalidArgument.of(field, str(error), reason="IMAGE_TOO_COMPLEX", **error.metadata)


def undecodable(field: str, description: str) -> InvalidArgument:
    """The error of a file that cannot be read."""
    return InvalidArgument.of(field, description, reason="IMAGE_UNDECODABLE")
