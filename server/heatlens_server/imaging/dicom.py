"""DICOM files, by pydicom where it is installed. Everything here reads untrusted input."""

import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.levels import SourcePixels
from heatlens_server.imaging.limits import check_size, undecodable

if TYPE_CHECKING:
    from pydicom import Dataset

_GRAY = frozenset({"MONOCHROME1", "MONOCHROME2"})
_PALETTE = "PALETTE COLOR"
# What pydicom makes RGB of. Others it passes on as they are.
_COLORS = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})

_MOST_TABLE_BITS = 16

# It logs what it finds odd in files, and warns of it; Python keeps each text that it was warned by.
logging.getLogger("pydicom").disabled = True
warnings.filterwarnings("ignore", module="pydicom")


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
    from pydicom.pixels.processing import apply_modality_lut  # noqa: PLC0415 - an extra
    from pydicom.pixels.utils import pixel_array  # noqa: PLC0415 - an extra

    stored = pixel_array(dataset, index=0)
    if sorted(stored.shape[:2]) != sorted((int(dataset.Rows), int(dataset.Columns))):
        raise undecodable(field, "the DICOM file is corrupt")
    kind, bits = str(dataset.PhotometricInterpretation), int(dataset.get("BitsStored", 0))
    if stored.ndim != (3 if kind in _COLORS else 2) or kind not in _GRAY | _COLORS | {_PALETTE}:
        raise undecodable(field, f"a DICOM file of {dataset.SamplesPerPixel} samples of {kind!r}, which is not read")
    notes: tuple[str, ...] = ()
    if (high_bit := int(dataset.get("HighBit", bits - 1))) != bits - 1:
        notes = (f"the file says that its {bits} bits end with bit {high_bit}: read as if it were {bits - 1}",)
    if kind == _PALETTE:
        stored = _of_palette(stored, dataset, field)
        return SourcePixels(stored, field=field, highest=float(np.iinfo(stored.dtype).max), warnings=notes)
    if kind in _COLORS:
        if stored.dtype.kind != "u" or bits > _MOST_TABLE_BITS:
            raise undecodable(field, "a DICOM file of colours that are signed or of more than 16 bits is not read")
        return SourcePixels(stored, field=field, highest=float((1 << bits) - 1), warnings=notes)
    values: npt.NDArray[Any] = apply_modality_lut(stored, dataset)
    window = _window(dataset)
    if window is None:
        window = _range_of_bits(dataset)
        notes = (
            *notes,
            f"the file has no window: its values from {window[0]:g} to {window[1]:g} are black to white",
        )
    return SourcePixels(
        values[:, :, None], field=field, highest=None, window=window, inverted=kind == "MONOCHROME1", warnings=notes
    )


def _of_palette(stored: npt.NDArray[Any], dataset: "Dataset", field: str) -> npt.NDArray[Any]:
    """The colours (H, W, 3) that a file's table has for its pixels."""
    from pydicom.pixels.processing import apply_color_lut  # noqa: PLC0415 - an extra

    if "RedPaletteColorLookupTableData" not in dataset:
        raise undecodable(field, "a DICOM file whose table of colours is in segments, or missing, is not read")
    entries, first, _ = dataset.RedPaletteColorLookupTableDescriptor
    # pydicom would wrap what lies beyond a table of 8 bits; the last entry stands for it (PS3.3, C.7.6.3.1.5).
    last = min(first + (entries or 1 << 16) - 1, int(np.iinfo(stored.dtype).max))
    return apply_color_lut(np.minimum(stored, last), dataset)


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
    ends = np.array([low, high], np.int64)
    if "ModalityLUTSequence" in dataset:
        if bits > _MOST_TABLE_BITS:
            raise ValueError("a table for more bits than tables have")
        ends = np.arange(low, high + 1, dtype=np.int64)
    values = apply_modality_lut(ends, dataset)
    return float(values.min()), float(values.max())


def _first(value: Any) -> float | None:  # noqa: ANN401 - one value of pydicom's, or several
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except TypeError:
        number = float(value[0])
    return number if np.isfinite(number) else None
