"""DICOM files, by pydicom where it is installed. Everything here reads untrusted input."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.levels import SourcePixels
from heatlens_server.imaging.limits import check_size, undecodable

if TYPE_CHECKING:
    from pydicom import Dataset


def decode_dicom(encoded: bytes, *, max_pixels: int, field: str) -> SourcePixels:
    """Decode the first frame of a DICOM file.

    Values are those of the modality: rescaled by slope and intercept or the modality's table, so that CT is in
    Hounsfield units (PS3.3, C.11.1). Where the file has a window, it is the image's (C.11.2.1.2); or else all that its
    bits can hold. MONOCHROME1 is inverted, so that high values are bright.

    Args:
        encoded: the file's bytes.
        max_pixels: largest accepted width times height.
        field: the name of `encoded` in errors.

    Raises:
        InvalidArgument: IMAGE_UNDECODABLE or IMAGE_TOO_LARGE, at `field`.
    """
    try:
        import pydicom  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise undecodable(
            field, "a DICOM file, which this server does not read: install heatlens with the extra medical"
        ) from error
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        dataset = pydicom.dcmread(io.BytesIO(encoded))
        check_size(int(dataset.Columns), int(dataset.Rows), max_pixels, field=field)
        return _source(dataset, field)
    except (InvalidArgument, MemoryError):
        raise
    # pydicom raises whatever its struct and index operations raise on garbage, and more.
    except Exception as error:
        raise undecodable(field, "the DICOM file is truncated or corrupt, or holds no image") from error


def _source(dataset: "Dataset", field: str) -> SourcePixels:
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut  # noqa: PLC0415 - an extra
    from pydicom.pixels.utils import pixel_array  # noqa: PLC0415 - an extra

    stored = pixel_array(dataset, index=0)
    if sorted(stored.shape[:2]) != sorted((int(dataset.Rows), int(dataset.Columns))):
        raise undecodable(field, "the DICOM file is corrupt")
    kind = str(dataset.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, dataset)
    if stored.ndim == 3:
        highest = 255.0 if stored.dtype == np.uint8 else 65_535.0
        return SourcePixels(stored, field=field, highest=highest)
    values: npt.NDArray[Any] = apply_modality_lut(stored, dataset)
    window = _window(dataset)
    notes: tuple[str, ...] = ()
    if window is None:
        window = _range_of_bits(dataset)
        notes = (f"the file has no window: its values from {window[0]:g} to {window[1]:g} are black to white",)
    return SourcePixels(
        values[:, :, None], field=field, highest=None, window=window, inverted=kind == "MONOCHROME1", warnings=notes
    )


def _window(dataset: "Dataset") -> tuple[float, float] | None:
    """The first window of a file: PS3.3, C.11.2.1.2 and C.11.2.1.3.2; None if it has none that means anything."""
    center, width = (_first(dataset.get(name)) for name in ("WindowCenter", "WindowWidth"))
    if center is None or width is None:
        return None
    if dataset.get("VOILUTFunction", "LINEAR") == "LINEAR":
        center, width = center - 0.5, width - 1.0
    return (center - width / 2, center + width / 2) if width > 0 else None


def _range_of_bits(dataset: "Dataset") -> tuple[float, float]:
    """What the stored bits can hold, in the modality's values."""
    from pydicom.pixels.processing import apply_modality_lut  # noqa: PLC0415 - an extra

    bits, signed = int(dataset.BitsStored), bool(dataset.PixelRepresentation)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if "ModalityLUTSequence" in dataset:
        table = [int(value) for value in dataset.ModalityLUTSequence[0].LUTData]
        return float(min(table)), float(max(table))
    ends = apply_modality_lut(np.array([low, high], np.int64), dataset)
    return float(min(ends)), float(max(ends))


def _first(value: Any) -> float | None:  # noqa: ANN401 - one value of pydicom's, or several
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except TypeError:
        number = float(value[0])
    return number if np.isfinite(number) else None
