"""Images in requests, as far as they can be checked without decoding them."""

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.limits import Limits
from heatlens_server.api.violations import Violations
from heatlens_server.core.arrays import UInt8Array
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.preprocess import FittedImage, PreprocessSpec
from heatlens_server.imaging.decode import decode_image, pixels_from_tensor
from heatlens_server.imaging.preprocess import fit
from heatlens_server.transports.grpc.names import data_type_name

SourceImage = bytes | UInt8Array
"""An encoded file, or uint8 RGB pixels (H, W, 3)."""


def parse_image(image: pb.Image, limits: Limits, wrong: Violations, *, field: str = "image") -> SourceImage:
    """Check an image. It may be used if nothing was added to `wrong`.

    Args:
        image: of a request.
        limits: what it is checked against.
        wrong: takes what is wrong with it.
        field: where it lies in the request.
    """
    source = image.WhichOneof("source")
    if source == "pixels":
        pixels = image.pixels
        try:
            return pixels_from_tensor(
                data_type=data_type_name(pixels.data_type),
                shape=tuple(pixels.shape),
                data=pixels.data,
                max_pixels=limits.max_image_pixels,
            )
        except InvalidArgument as error:
            wrong.add_error(_within(error, field))
    elif source is None:
        wrong.add(field, "an image is required: set encoded or pixels", reason="IMAGE_MISSING")
    return image.encoded


def fit_image(image: SourceImage, preprocess: PreprocessSpec, limits: Limits, *, field: str = "image") -> FittedImage:
    """Decode an image that `parse_image` let pass, and make it the model's input. Takes milliseconds.

    Raises:
        InvalidArgument: it cannot be decoded, or is too large.
    """
    if isinstance(image, bytes):
        try:
            image = decode_image(image, max_pixels=limits.max_image_pixels)
        except InvalidArgument as error:
            raise _within(error, field) from error.__cause__
    return fit(image, preprocess)


def _within(error: InvalidArgument, field: str) -> InvalidArgument:
    """The same about an image at another place of the request."""
    return error if field == "image" else error.within(lambda path: field + path.removeprefix("image"))
