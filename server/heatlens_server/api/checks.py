"""What queries are checked against, what is found wrong, and the checks of images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heatlens_server.api.query import Image
from heatlens_server.core.errors import FieldViolation, InvalidArgument
from heatlens_server.core.preprocess import FittedImage, PreprocessSpec
from heatlens_server.imaging.decode import decode_plain, inspect_image
from heatlens_server.imaging.levels import SourcePixels
from heatlens_server.imaging.limits import MAX_PARTS, PASSES, TooComplex, too_complex
from heatlens_server.imaging.preprocess import fit_source
from heatlens_server.imaging.tensor import pixels_from_tensor
from heatlens_server.imaging.walk.plain import PlainFile
from heatlens_server.scheduling.entry import LargeImage

SourceImage = bytes | SourcePixels
"""An encoded file, or pixels."""

InspectedImage = PlainFile | SourcePixels
"""The same, once it is known what decoding it takes."""

# As long as a step of a model. A photo of 12 megapixels takes as long, in JPEG without its colours halved longer.
_SMALL_S = 0.05
_SMALL_BYTES = 128 << 20

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
        max_decoding_bytes: most memory for large images that are decoded or wait for it.
        max_bytes_in_flight: most bytes of requests and answers in flight.
        max_connection_bytes_in_flight: the same of one connection.
        max_model_runs: most runs of the model for one image, forward or backward.
    """

    max_message_bytes: int
    max_image_pixels: int
    max_queue_length: int
    max_targets: int
    max_streams: int
    max_in_flight: int
    max_decoding_bytes: int = 1 << 31
    max_bytes_in_flight: int = 2**30
    max_connection_bytes_in_flight: int = 2**29
    max_model_runs: int = 100_000

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


def inspected(
    image: SourceImage, preprocess: PreprocessSpec, limits: Limits, *, field: str = "image"
) -> InspectedImage:
    """Find out what decoding an image that `check_image` let pass will take. Takes milliseconds.

    Raises:
        InvalidArgument: it is no image, too large, or too complex.
    """
    if not isinstance(image, bytes):
        return image
    field = f"{field}.encoded"
    file = inspect_image(image, max_pixels=limits.max_image_pixels, channels=preprocess.channels, field=field)
    most = limits.max_decoding_bytes
    if file.decoded_bytes > most:
        why = f"decoding it takes {file.decoded_bytes} bytes of memory; at most {most} are used"
        raise too_complex(field, TooComplex(why, max_decoding_bytes=most))
    return file


def large_image(images: Sequence[InspectedImage], decode: Callable[[], FittedImage]) -> LargeImage | None:
    """What `decode` takes for the images of one request together; None if they are small, and decoded at once."""
    files = [image for image in images if isinstance(image, PlainFile)]
    decoded_bytes, decode_s = sum(file.decoded_bytes for file in files), sum(file.decode_s for file in files)
    takes_memory = decoded_bytes > _SMALL_BYTES
    if not takes_memory and decode_s <= _SMALL_S:
        return None
    return LargeImage(decoded_bytes if takes_memory else 0, decode_s, decode)


def fit_image(
    image: SourceImage | InspectedImage, preprocess: PreprocessSpec, limits: Limits, *, field: str = "image"
) -> FittedImage:
    """Decode an image that `check_image` let pass, and make it the model's input. Takes milliseconds, if it is small.

    Raises:
        InvalidArgument: it cannot be decoded, is too large, or its values or channels are not for this model.
    """
    source = inspected(image, preprocess, limits, field=field) if isinstance(image, bytes) else image
    if isinstance(source, PlainFile):
        source = decode_plain(
            source, max_pixels=limits.max_image_pixels, channels=preprocess.channels, field=f"{field}.encoded"
        )
    return fit_source(source, preprocess)
