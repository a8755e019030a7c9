"""Files of the kinds that cameras, microscopes and clinics write: TIFF, BMP, GIF, AVIF and DICOM."""

import io

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from skimage import data

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.levels import levels_of

LIMIT = 1_000_000
CAT = data.chelsea()[:90, :120]
GRAY = CAT[:, :, 1]
DEEP = GRAY.astype(np.uint16) * 200


def spec(channels=3, **changes):
    options = {"resize_px": 64, "crop_px": (64, 64), "interpolation": Interpolation.BILINEAR}
    return PreprocessSpec(mean=(0.5,) * channels, std=(0.25,) * channels, **options, **changes)


def levels(encoded, channels=1, **changes):
    source = decode_image(encoded, max_pixels=LIMIT, channels=channels)
    return levels_of(source, spec(channels, **changes))


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def tiff(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def refused(encoded, channels=3):
    with pytest.raises(InvalidArgument) as caught:
        levels(encoded, channels)
    assert caught.value.violations[0].field == "image.encoded"
    return caught.value


@pytest.mark.parametrize("file_format", ["BMP", "TIFF"])
def test_lossless_files_of_8_bits_are_exact(file_format):
    values, warnings = levels(saved(Image.fromarray(CAT), file_format), 3)
    np.testing.assert_array_equal(values, CAT)
    assert (values.dtype, warnings) == (np.uint8, ())


@pytest.mark.parametrize("file_format", ["AVIF", "GIF", "HEIF"])
def test_files_of_few_colours_or_with_losses_are_the_photo(file_format):
    values, _warnings = levels(saved(Image.fromarray(CAT), file_format), 3)
    assert values.shape == CAT.shape
    assert np.abs(values.astype(int) - CAT).mean() < 12


def test_of_an_animation_and_of_pages_the_first_is_read():
    other = Image.fromarray(255 - CAT)
    for file_format in ("GIF", "TIFF"):
        one = saved(Image.fromarray(CAT), file_format)
        both = saved(Image.fromarray(CAT), file_format, save_all=True, append_images=[other])
        np.testing.assert_array_equal(levels(both, 3)[0], levels(one, 3)[0])


def test_a_tiff_of_16_bits_keeps_them():
    values, warnings = levels(tiff(DEEP))
    np.testing.assert_allclose(values[:, :, 0], DEEP / 257.0, rtol=1e-6)
    assert warnings == ()
    compressed, _warnings = levels(tiff(DEEP, compression="zlib"))
    np.testing.assert_array_equal(compressed, values)


def test_a_tiff_that_says_how_many_bits_it_uses_is_read_by_them():
    twelve = (GRAY.astype(np.uint16)) * 16
    encoded = tiff(twelve, extratags=[(281, 3, 1, 4095, True)])
    values, _warnings = levels(encoded)
    np.testing.assert_allclose(values[:, :, 0], twelve * 255.0 / 4095.0, rtol=1e-6)


def test_a_tiff_of_floats_is_read_from_0_to_1_or_by_a_window():
    unit = (GRAY / 255.0).astype(np.float32)
    np.testing.assert_allclose(levels(tiff(unit))[0][:, :, 0], GRAY, atol=1e-4)
    hounsfield = unit * 2000 - 1000
    assert refused(tiff(hounsfield), channels=1).reason == "IMAGE_RANGE_UNKNOWN"
    np.testing.assert_allclose(levels(tiff(hounsfield), window=(-1000.0, 1000.0))[0][:, :, 0], GRAY, atol=1e-3)


def test_a_tiff_in_which_white_is_0_is_turned_round():
    encoded = tiff(65_535 - DEEP, photometric="miniswhite")
    np.testing.assert_allclose(levels(encoded)[0][:, :, 0], DEEP / 257.0, rtol=1e-6)


def test_pages_or_bands_are_the_channels_of_a_model_of_that_many():
    bands = np.stack([DEEP, DEEP // 2, DEEP // 3, DEEP // 4, DEEP // 5])
    pages = tiff(bands, photometric="minisblack")
    together = tiff(np.moveaxis(bands, 0, 2), photometric="minisblack", planarconfig="contig")
    for encoded in (pages, together):
        values, _warnings = levels(encoded, 5)
        np.testing.assert_allclose(values, np.moveaxis(bands, 0, 2) / 257.0, rtol=1e-6)
    assert refused(pages, channels=6).reason == "IMAGE_CHANNELS_MISMATCH"


def test_a_tiff_that_is_not_whole_or_too_large_is_refused():
    whole = tiff(DEEP)
    assert refused(whole[: len(whole) // 2]).reason == "IMAGE_UNDECODABLE"
    assert refused(b"II*\0" + b"\xff" * 40).reason == "IMAGE_UNDECODABLE"
    assert refused(tiff(np.zeros((2000, 2000), np.uint8))).reason == "IMAGE_TOO_LARGE"


def test_a_small_file_that_claims_much_is_refused_before_it_is_unpacked():
    bomb = tiff(np.zeros((4000, 4000), np.uint16), compression="zlib")
    assert len(bomb) < 100_000
    assert refused(bomb, channels=1).reason == "IMAGE_TOO_LARGE"


# DICOM.


def dicom(values, *, interpretation="MONOCHROME2", bits=12, **elements):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset("x", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, interpretation
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


STORED = GRAY.astype(np.uint16) * 16
CT = {"RescaleSlope": 1, "RescaleIntercept": -1024}


def test_dicom_is_rescaled_and_windowed_as_it_says():
    """PS3.3, C.11.2.1.2.1: the linear window of centre c and width w is from c - 0.5 - (w - 1) / 2 on, w - 1 wide."""
    encoded = dicom(STORED, WindowCenter=40, WindowWidth=400, **CT)
    values, warnings = levels(encoded)
    hounsfield = STORED.astype(float) - 1024
    expected = np.clip((hounsfield - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1) * 255
    np.testing.assert_allclose(values[:, :, 0], expected, atol=1e-3)
    assert warnings == ()
    own, _warnings = levels(encoded, window=(-1024.0, 3071.0))
    np.testing.assert_allclose(own[:, :, 0], STORED * 255.0 / 4095.0, atol=1e-3)


def test_dicom_without_a_window_is_read_by_its_bits_and_says_so():
    values, (warning,) = levels(dicom(STORED, **CT))
    np.testing.assert_allclose(values[:, :, 0], STORED * 255.0 / 4095.0, atol=1e-3)
    assert "no window" in warning
    assert "from -1024 to 3071" in warning


def test_monochrome1_is_turned_round():
    dark = levels(dicom(STORED))[0]
    np.testing.assert_allclose(levels(dicom(STORED, interpretation="MONOCHROME1"))[0], 255.0 - dark, atol=1e-3)


def test_gray_dicom_becomes_rgb_for_a_model_of_colours():
    values, _warnings = levels(dicom(STORED), 3)
    assert values.shape == (90, 120, 3)
    np.testing.assert_array_equal(values[:, :, 0], values[:, :, 2])


def test_dicom_without_a_window_is_read_by_what_its_table_can_say():
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4096, 0, 16], "US"
    table.add_new("LUTData", "OW", (np.arange(4096, dtype="<u2") * 16).tobytes())
    values, (warning,) = levels(dicom(STORED, ModalityLUTSequence=Sequence([table])))
    np.testing.assert_allclose(values[:, :, 0], STORED * 255.0 / 4095.0, atol=1e-3)
    assert "from 0 to 65520" in warning


@pytest.mark.parametrize("stored_bits", [8, 16])
def test_a_palette_ends_with_its_last_colour(stored_bits):
    ramp = np.arange(256, dtype=f"<u{stored_bits // 8}") * (1 if stored_bits == 8 else 257)
    sizes = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, stored_bits] for name in ("Red", "Green", "Blue")}
    tables = {f"{name}PaletteColorLookupTableData": ramp.tobytes() for name in ("Red", "Green", "Blue")}
    stored = np.arange(1024, dtype=np.uint16).reshape(32, 32)
    values, _ = levels(dicom(stored, interpretation="PALETTE COLOR", bits=16, **sizes, **tables), 3)
    np.testing.assert_allclose(values[:, :, 1], np.minimum(stored, 255), atol=1e-3)


def colours(values, interpretation="RGB", bits=16, **elements):
    options = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PixelData": values.tobytes()}
    return dicom(values[:, :, 0], interpretation=interpretation, bits=bits, **options, **elements)


def test_colours_of_fewer_bits_than_their_type_are_as_bright():
    values, _ = levels(colours(CAT.astype(np.uint16) * 16, bits=12), 3)
    np.testing.assert_allclose(values, CAT.astype(float) * 16 * 255.0 / 4095.0, atol=1e-3)


@pytest.mark.parametrize("interpretation", ["HSV", "CMYK", "MONOCHROME2", "YBR_PARTIAL_422"])
def test_colours_of_another_kind_are_refused_by_name(interpretation):
    why = refused(colours(CAT.astype(np.uint16), interpretation)).violations[0].description
    assert interpretation in why or "corrupt" in why
    assert refused(colours(CAT.astype(np.int16))).reason == "IMAGE_UNDECODABLE"


def test_bits_that_lie_elsewhere_are_said():
    _, warnings = levels(dicom(STORED, HighBit=15, WindowCenter=40, WindowWidth=400))
    assert any("bit 15" in warning for warning in warnings)


@pytest.mark.filterwarnings("ignore")  # pydicom's and numpy's, which the server does not keep
@pytest.mark.parametrize(
    "elements",
    [
        {"RescaleSlope": "1e303", "RescaleIntercept": "0"},
        {"RescaleSlope": "inf", "RescaleIntercept": "0"},
        {"RescaleSlope": "1", "RescaleIntercept": "nan"},
        {"WindowCenter": "0", "WindowWidth": "1e308"},
        {"WindowCenter": "5e-41", "WindowWidth": "1e-40", "VOILUTFunction": "LINEAR_EXACT"},
    ],
)
def test_numbers_that_leave_no_values_are_refused(elements):
    with pydicom.config.disable_value_validation():
        encoded = dicom(STORED, **elements)
    assert refused(encoded).reason == "IMAGE_RANGE_UNKNOWN"


@pytest.mark.filterwarnings("ignore")
def test_what_is_odd_in_a_dicom_file_is_not_logged(caplog):
    for extra in range(1, 20):
        levels(dicom(STORED, PixelData=STORED.tobytes() + bytes(2 * extra), WindowCenter=40, WindowWidth=400))
    assert not caplog.records


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (dicom(STORED)[:-1000], "IMAGE_UNDECODABLE"),
        (dicom(STORED)[:200], "IMAGE_UNDECODABLE"),
        (b"\0" * 128 + b"DICM" + b"\xff" * 64, "IMAGE_UNDECODABLE"),
        (dicom(STORED, Rows=60_000, Columns=60_000), "IMAGE_TOO_LARGE"),
    ],
)
def test_a_dicom_file_that_is_wrong_is_refused(encoded, reason):
    assert refused(encoded).reason == reason


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read():
    assert "DICOM" in refused(b"%PDF-1.7 and so on").violations[0].description
