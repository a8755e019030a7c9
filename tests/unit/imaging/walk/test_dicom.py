"""Walks over DICOM files: what describes pixels is kept, and what would take long is refused."""

import io
import struct

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from skimage import data

import hostile_images as hostile
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.decode import decode_image, inspect_image
from heatlens_server.imaging.walk.dicom import MAX_ELEMENTS, MAX_TABLE_BYTES, MAX_TABLE_ELEMENTS, MAX_VALUE_BYTES
from image_files import saved

CAT = Image.fromarray(data.chelsea()).resize((128, 96))
GRAY = np.asarray(CAT.convert("L")).astype(np.uint16) * 16
JPEG, JPEG_2000 = pydicom.uid.JPEGBaseline8Bit, pydicom.uid.JPEG2000Lossless


def dicom(pixels=None, *, syntax=pydicom.uid.ExplicitVRLittleEndian, frames=(), **elements):
    """Gray of 12 bits, or RGB of 8 bits in compressed frames."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset = FileDataset(
        "x",
        {},
        file_meta=meta,
        preamble=b"\0" * 128,
        is_implicit_VR=syntax.is_implicit_VR,
        is_little_endian=syntax.is_little_endian,
    )
    dataset.PatientName = "a name"
    dataset.Rows, dataset.Columns = CAT.height, CAT.width
    dataset.PixelRepresentation = 0
    if frames:
        dataset.SamplesPerPixel, dataset.PlanarConfiguration = 3, 0
        dataset.PhotometricInterpretation = "YBR_FULL_422" if syntax == JPEG else "RGB"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
        dataset.NumberOfFrames = len(frames)
        dataset.PixelData = encapsulate(list(frames))
        dataset["PixelData"].is_undefined_length = True
    else:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelData = (GRAY if pixels is None else pixels).tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def with_elements(encoded, elements):
    """Elements of explicit types, before those that describe the pixels."""
    at = encoded.index(struct.pack("<HH2s", 0x0028, 0x0002, b"US"))
    return encoded[:at] + elements + encoded[at:]


def element(number, value=b""):
    return struct.pack("<HH2sHI", 0x0009, number, b"UN", 0, len(value)) + value


def described(number, kind, value):
    """An element that describes the pixels."""
    if kind in {b"SQ", b"OW"}:
        return struct.pack("<HH2sHI", 0x0028, number, kind, 0, len(value)) + value
    return struct.pack("<HH2sH", 0x0028, number, kind, len(value)) + value


def items(*values):
    return b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value for value in values)


def inspect(encoded, max_pixels=1_000_000):
    return inspect_image(encoded, max_pixels=max_pixels)


def refused(encoded, **options):
    with pytest.raises(InvalidArgument) as caught:
        inspect(encoded, **options)
    return caught.value


@pytest.mark.parametrize(
    "syntax",
    [
        pydicom.uid.ImplicitVRLittleEndian,
        pydicom.uid.ExplicitVRLittleEndian,
        pydicom.uid.ExplicitVRBigEndian,
    ],
)
@pytest.mark.parametrize("undefined", [False, True])
def test_pixels_are_kept_and_people_left_out(syntax, undefined):
    inner = Dataset()
    inner.CodeValue = "1"
    inner.ConceptNameCodeSequence = Sequence([Dataset(), Dataset()])
    sequence = Sequence([inner, inner])
    pixels = GRAY.byteswap() if syntax == pydicom.uid.ExplicitVRBigEndian else GRAY
    encoded = dicom(pixels, syntax=syntax, AnatomicRegionSequence=sequence)
    if undefined:
        dataset = pydicom.dcmread(io.BytesIO(encoded))
        dataset["AnatomicRegionSequence"].is_undefined_length = True
        for item in dataset.AnatomicRegionSequence:
            item.is_undefined_length_sequence_item = True
        buffer = io.BytesIO()
        dataset.save_as(buffer)
        encoded = buffer.getvalue()
    file = inspect(encoded)
    assert (file.width_px, file.height_px, file.samples) == (128, 96, 128 * 96)
    assert b"a name" in encoded
    assert b"a name" not in file.encoded
    np.testing.assert_array_equal(decode_image(encoded, max_pixels=1_000_000).values[:, :, 0], GRAY)


@pytest.mark.parametrize(("syntax", "file_format"), [(JPEG, "JPEG"), (JPEG_2000, "JPEG2000")])
def test_the_first_compressed_frame_is_read(syntax, file_format):
    options = {"quality": 95} if file_format == "JPEG" else {"no_jp2": True}
    frames = [saved(image, file_format, **options) for image in (CAT, CAT.transpose(Image.Transpose.ROTATE_180))]
    values = decode_image(dicom(syntax=syntax, frames=frames), max_pixels=1_000_000).values
    assert np.abs(values.astype(int) - np.asarray(CAT)).mean() < 4


def test_elements_are_counted():
    many = b"".join(element(i % 60_000) for i in range(MAX_ELEMENTS + 1))
    error = refused(with_elements(dicom(), many))
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert "elements" in str(error)
    assert inspect(with_elements(dicom(), many[: 12 * 10_000]))


def test_depth_is_bounded():
    start = struct.pack("<HH2sHI", 0x0009, 1, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    end = struct.pack("<HHI", 0xFFFE, 0xE00D, 0) + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    assert inspect(with_elements(dicom(), start * 20 + end * 20))
    error = refused(with_elements(dicom(), start * 5000 + end * 5000))
    assert error.reason == "IMAGE_TOO_COMPLEX"


def test_long_descriptions_are_refused():
    encoded = dicom(syntax=pydicom.uid.ImplicitVRLittleEndian, WindowCenter=1, WindowWidth=2)
    at = encoded.index(struct.pack("<HH", 0x0028, 0x1050))
    (length,) = struct.unpack_from("<I", encoded, at + 4)
    numbers = b"1\\" * MAX_VALUE_BYTES
    long = encoded[: at + 4] + struct.pack("<I", len(numbers)) + numbers + encoded[at + 8 + length :]
    assert refused(long).reason == "IMAGE_TOO_COMPLEX"


def test_tables_are_long_at_most_and_of_few_elements():
    plain = described(0x3002, b"US", struct.pack("<HHH", 4096, 0, 16)) + described(0x3006, b"OW", bytes(8192))
    table = described(0x3000, b"SQ", items(plain))
    assert inspect(with_elements(dicom(), table))
    for hostile_table in (items(*[b""] * MAX_TABLE_ELEMENTS), items(described(0x3003, b"LO", b"a ") * 40)):
        error = refused(with_elements(dicom(), described(0x3000, b"SQ", hostile_table)))
        assert error.reason == "IMAGE_TOO_COMPLEX"
        assert "elements" in str(error)
    error = refused(with_elements(dicom(), described(0x1201, b"OW", bytes(MAX_TABLE_BYTES + 2))))
    assert error.reason == "IMAGE_TOO_COMPLEX"


def test_a_table_in_segments_which_unpacks_to_gigabytes_is_not_read():
    segments = struct.pack("<HHH", 0, 1, 7) + struct.pack("<HHH", 1, 65_535, 7) * 40_000
    table = b"".join(described(0x1221 + i, b"OW", segments) for i in range(3))
    sizes = b"".join(described(0x1101 + i, b"US", struct.pack("<HHH", 0, 0, 16)) for i in range(3))
    bomb = with_elements(dicom(PhotometricInterpretation="PALETTE COLOR"), sizes + table)
    assert len(inspect(bomb).encoded) < len(segments)
    with pytest.raises(InvalidArgument, match="in segments") as caught:
        decode_image(bomb, max_pixels=1_000_000)
    assert caught.value.reason == "IMAGE_UNDECODABLE"


def test_elements_that_readers_would_read_differently_are_refused():
    whole = dicom()
    twice = with_elements(whole, described(0x0010, b"US", struct.pack("<H", 8000)))
    assert refused(twice).reason == "IMAGE_UNDECODABLE"
    rows = described(0x0010, b"US", struct.pack("<H", CAT.height))
    assert rows in whole
    # In the first two bytes 96, to pydicom 8000.
    as_double = struct.pack("<Q", struct.unpack("<Q", struct.pack("<d", 8000.0))[0] & ~0xFFFF | CAT.height)
    assert refused(whole.replace(rows, described(0x0010, b"FD", as_double))).reason == "IMAGE_UNDECODABLE"


def test_compressed_pixels_of_a_length_are_refused_as_no_walk_sees_them():
    whole = dicom(syntax=JPEG, frames=[saved(CAT, "JPEG")])
    at = whole.index(struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)) + 8
    length = len(whole) - at - 4
    assert refused(whole[:at] + struct.pack("<I", length) + whole[at + 4 :]).reason == "IMAGE_UNDECODABLE"


@pytest.mark.parametrize(("syntax", "file_format"), [(JPEG, "JPEG"), (JPEG_2000, "JPEG2000")])
def test_a_frame_of_another_size_than_the_file_says_is_refused(syntax, file_format):
    options = {"no_jp2": True} if file_format == "JPEG2000" else {}
    frame = saved(CAT.resize((130, 96)), file_format, **options)
    assert "another size" in str(refused(dicom(syntax=syntax, frames=[frame])))


def test_small_blocks_of_jpeg_2000_count_as_the_memory_that_they_take():
    def counted(side):
        frame = saved(CAT, "JPEG2000", no_jp2=True, codeblock_size=(side, side))
        return inspect(dicom(syntax=JPEG_2000, frames=[frame])).decoded_bytes

    assert counted(4) > 2 * counted(64)


def test_scans_within_are_counted():
    bomb = hostile.jpeg_of_scans(CAT.width, CAT.height, 100)
    error = refused(dicom(syntax=JPEG, frames=[bomb]), max_pixels=CAT.width * CAT.height)
    assert error.reason == "IMAGE_TOO_COMPLEX"
    fill = hostile.jpeg_with(CAT, b"\xff" * 100_000)
    assert len(inspect(dicom(syntax=JPEG, frames=[fill])).encoded) < 20_000


def test_packets_and_tiles_of_jpeg_2000_are_counted():
    tiles = saved(CAT, "JPEG2000", no_jp2=True, tile_size=(2, 2))
    assert refused(dicom(syntax=JPEG_2000, frames=[tiles])).reason == "IMAGE_TOO_COMPLEX"
    plain = bytearray(saved(CAT, "JPEG2000", no_jp2=True))
    layers = plain.index(b"\xff\x52") + 6
    plain[layers : layers + 2] = b"\xff\xff"
    error = refused(dicom(syntax=JPEG_2000, frames=[bytes(plain)]))
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert "packets" in str(error)


def test_other_transfer_syntaxes_are_refused_by_name():
    error = refused(dicom(syntax=JPEG, frames=[saved(CAT, "JPEG")]).replace(b"1.2.4.50", b"1.2.4.57"))
    assert error.reason == "IMAGE_UNDECODABLE"
    assert "1.2.840.10008.1.2.4.57" in str(error)


def test_a_file_cut_or_changed_anywhere_is_refused_or_read_and_never_fails_otherwise():
    rng = np.random.default_rng(7)
    whole = dicom(syntax=JPEG, frames=[saved(CAT, "JPEG")])
    for _ in range(300):
        encoded = bytearray(whole[: rng.integers(132, len(whole) + 1)])
        for at in rng.integers(132, max(133, min(700, len(encoded))), rng.integers(0, 4)):
            if at < len(encoded):
                encoded[at] = rng.integers(0, 256)
        try:
            reason = ""
            inspect(bytes(encoded))
        except InvalidArgument as error:
            reason = error.reason
        assert reason in {"", "IMAGE_UNDECODABLE", "IMAGE_TOO_LARGE", "IMAGE_TOO_COMPLEX"}
