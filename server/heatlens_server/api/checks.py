"""What queries are checked against, what is found wrong, and the checks of images."""

from dataclasses import dataclass

from heatlens_server.api.query import Image
from heatlens_server.core.errors import FieldViolation, InvalidArgument
from heatlens_server.core.preprocess import FittedImage, PreprocessSpec
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.levels import SourcePixels
from heatlens_server.imaging.limits import MAX_PARTS, PASSES
from heatlens_server.imaging.preprocess import fit_source
from heatlens_server.imaging.tensor import pixels_from_tensor

SourceImage = bytes | SourcePixels
"""An encoded file, or pixels."""

_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits in force, as GetServerInfo reports them.

    Attributes:
        max_message_bytes: largest message accepted and sent.
        max_image_pixels: largest image accepted, width times height.
        max_queue_length: most Explain calls admitted per model and not running.
        max_targets: most classes explained in one request.
        max_streams: most streams open at a time.
        max_in_flight: largest window of a stream, in frames.
    """

    max_message_bytes: int
    max_image_pixels: int
    max_queue_length: int
    max_targets: int
    max_streams: int
    max_in_flight: int

    @property
    def max_image_parts(self) -> int:
        """Most segments, chunks, blocks or tags of an image file, beside one for each `PART_BYTES` of it."""
        return MAX_PARTS

    @property
    def max_image_samples(self) -> int:
        """Most samples that decoding an image file may go over."""
        return PASSES * self.max_image_pixels


class Violations:
    """Collects what is wrong with a query, so that a caller learns everything at once."""

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self._violations: list[FieldViolation] = []
        self._reason = ""
        self._metadata: dict[str, str] = {}

    def add(self, field: str, description: str, *, reason: str = "INVALID_OPTION") -> None:
        """A field is wrong. The error's reason is the first one given."""
        self._violations.append(FieldViolation(field, description))
        self._reason = self._reason or reason

    def add_error(self, error: InvalidArgument) -> None:
        """All fields of an error are wrong."""
        self._violations.extend(error.violations)
        self._reason = self._reason or error.reason
        self._metadata |= error.metadata

    def raise_if_any(self) -> None:
        """Raise InvalidArgument with everything that was added, if anything was."""
        if self._violations:
            raise InvalidArgument(self._violations, reason=self._reason, metadata=self._metadata)


def quoted(text: str) -> str:
    """A caller's text, as it may be repeated in an error: short, and quoted."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")


def check_image(
    image: Image | None, preprocess: PreprocessSpec, limits: Limits, wrong: Violations, *, field: str = "image"
) -> SourceImage:
    """Check an image as far as that is possible without decoding it. It may be used if `wrong` got nothing.

    Args:
        image: of a query.
        preprocess: of the model that is asked.
        limits: what it is checked against.
        wrong: takes what is wrong with it.
        field: its name in the query.
    """
    if image is not None and image.pixels is not None:
        pixels = image.pixels
        try:
            return pixels_from_tensor(
                data_type=pixels.data_type,
                shape=pixels.shape,
                data=pixels.data,
                max_pixels=limits.max_image_pixels,
                channels=preprocess.channels,
                field=f"{field}.pixels",
            )
        except InvalidArgument as error:
            wrong.add_error(error)
    elif image is None or image.encoded is None:
        wrong.add(field, "an image is required: set encoded or pixels", reason="IMAGE_MISSING")
    else:
        return image.encoded
    return b""


def fit_image(image: SourceImage, preprocess: PreprocessSpec, limits: Limits, *, field: str = "image") -> FittedImage:
    """Decode an image that `check_image` let pass, and make it the model's input. Takes milliseconds.

    Raises:
        InvalidArgument: it cannot be decoded, is too large, or its values or channels are not for this model.
    """
    if isinstance(image, bytes):
        image = decode_image(
            image,
            max_pixels=limits.max_image_pixels,
            channels=preprocess.channels,
            field=f"{field}.encoded",
        )
    return fit_source(image, preprocess)
