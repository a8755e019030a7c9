"""Walks over AVIF and HEIC: what is decoded for the primary image, and what hides beside it."""

import struct

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from skimage import data

import hostile_images as hostile
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.decode import decode_image, inspect_image
from heatlens_server.imaging.limits import MAX_PARTS, TooComplex
from heatlens_server.imaging.walk.coded import av1_frames
from image_files import ORIENTATION, saved

CAT = Image.fromarray(data.chelsea()).resize((200, 130))
LIMIT = 1_000_000
FORMATS = ["AVIF", "HEIF"]


@pytest.fixture(autouse=True, scope="module")
def _opener():
    pillow_heif.register_heif_opener()


def inspect(encoded, max_pixels=LIMIT):
    return inspect_image(encoded, max_pixels=max_pixels)


def refused(encoded, **options):
    with pytest.raises(InvalidArgument) as caught:
        inspect(encoded, **options)
    return caught.value


def off(values, image):
    return np.abs(values.astype(int) - np.asarray(image)).mean()


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(("mode", "images"), [("RGB", 1), ("RGBA", 2), ("L", 1)])
def test_the_pixels_of_what_is_shown_are_counted(file_format, mode, images):
    image = CAT.convert(mode)
    if mode == "RGBA":
        image.putalpha(CAT.convert("L"))
    encoded = saved(image, file_format)
    file = inspect(encoded)
    assert (file.file_format, file.width_px, file.height_px) == (file_format, 200, 130)
    least = 8 * images * 200 * 130
    # Codings have whole blocks.
    assert least <= file.samples <= 1.2 * least
    assert off(decode_image(encoded, max_pixels=LIMIT).values, image.convert("RGB")) < 8


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_though_decoders_do_not_see_exif(file_format, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    encoded = saved(CAT, file_format, exif=exif, quality=90)
    assert b"Exif" not in inspect(encoded).encoded[:1000].replace(b"Exif\0\0", b"")
    wanted = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    wanted |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
    # EXIF says nothing of a HEIC (ISO/IEC 23008-12, A.2); Pillow writes an AVIF's as a property of the image.
    upright = CAT if orientation == 1 or file_format == "HEIF" else CAT.transpose(Image.Transpose[wanted[orientation]])
    values = decode_image(encoded, max_pixels=LIMIT).values
    assert values.shape[:2] == upright.size[::-1]
    assert off(values, upright) < 8


@pytest.mark.parametrize("file_format", FORMATS)
def test_further_images_and_frames_are_not_decoded(file_format):
    encoded = hostile.animation(CAT, file_format, 4)
    # Frames of AVIF's sequences may have any size of as many bits: 256x256.
    assert inspect(encoded).samples <= 8 * 256 * 256
    assert off(decode_image(encoded, max_pixels=LIMIT).values, CAT) < 12


def test_hidden_frames_are_counted():
    assert av1_frames(b"\x12\0" + b"\x32\1\0" * 7).count == 7
    error = refused(hostile.avif_of_frames(CAT, 20), max_pixels=200 * 130)
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert set(error.metadata) == {"max_image_samples"}
    assert inspect(hostile.avif_of_frames(CAT, 2), max_pixels=200 * 130)


def test_units_are_counted():
    with pytest.raises(TooComplex, match="units"):
        av1_frames(b"\x12\0" * 3 * MAX_PARTS)


def test_items_may_not_overlap_though_they_reach_to_the_end_of_the_file():
    encoded = saved(CAT, "AVIF")
    start = encoded.index(b"iloc") + 12
    # Version 0: items, then an id, a reference to data, and extents of offset and length.
    (extents,) = struct.unpack_from(">H", encoded, start + 4)
    offset, length = struct.unpack_from(">II", encoded, start + 6)
    assert (extents, offset + length) == (1, len(encoded))
    whole = struct.pack(">II", 0, 0)
    changed = encoded[: start + 6] + whole + encoded[start + 14 :]
    assert refused(changed).reason == "IMAGE_UNDECODABLE"
    box = encoded.index(b"iloc") - 4
    grown = bytearray(encoded)
    for at in (box, encoded.index(b"meta") - 4):
        grown[at : at + 4] = struct.pack(">I", struct.unpack_from(">I", encoded, at)[0] + 80)
    grown[start + 4 : start + 14] = struct.pack(">H", 11) + whole * 11
    assert refused(bytes(grown)).reason == "IMAGE_TOO_COMPLEX"


def test_a_frame_larger_than_the_file_says_counts_as_it_is():
    encoded = saved(CAT, "AVIF")
    small = encoded.replace(struct.pack(">II", 200, 130), struct.pack(">II", 8, 8))
    assert inspect(small).samples >= 8 * 200 * 130


@pytest.mark.parametrize("file_format", FORMATS)
def test_parts_are_counted(file_format):
    encoded = saved(CAT, file_format)
    many = struct.pack(">I", 8) + b"free"
    error = refused(encoded + many * 3 * MAX_PARTS)
    assert error.reason == "IMAGE_TOO_COMPLEX"
    assert set(error.metadata) == {"max_image_parts"}
    assert inspect(encoded + many * 500)


@pytest.mark.parametrize("file_format", FORMATS)
def test_size_is_checked_before_anything_is_decoded(file_format):
    assert refused(saved(CAT, file_format), max_pixels=200 * 130 - 1).reason == "IMAGE_TOO_LARGE"


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_cut_or_changed_anywhere_is_refused_or_read_and_never_fails_otherwise(file_format):
    rng = np.random.default_rng(6)
    whole = saved(CAT, file_format, quality=20)
    head = whole.index(b"mdat")
    for _ in range(300):
        encoded = bytearray(whole[: rng.integers(12, len(whole) + 1)])
        for at in rng.integers(0, min(head, len(encoded)), rng.integers(0, 4)):
            encoded[at] = rng.integers(0, 256)
        try:
            reason = ""
            inspect(bytes(encoded))
        except InvalidArgument as error:
            reason = error.reason
        assert reason in {"", "IMAGE_UNDECODABLE", "IMAGE_TOO_LARGE", "IMAGE_TOO_COMPLEX"}
