"""Decoding: every kind of file that is accepted, and every kind that is refused."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.preprocess import MAX_PIXELS_LIMIT
from heatlens_server.imaging.decode import decode_image

LIMIT = 64_000_000


@pytest.fixture(scope="module")
def cat():
    return Image.fromarray(data.chelsea())


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels_of(encoded, max_pixels=LIMIT):
    return decode_image(encoded, max_pixels=max_pixels).values


def refused(encoded, reason, max_pixels=LIMIT):
    with pytest.raises(InvalidArgument) as caught:
        decode_image(encoded, max_pixels=max_pixels)
    assert caught.value.reason == reason
    assert caught.value.violations[0].field == "image.encoded"
    return caught.value


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    announced_data = struct.pack(">I", 1_000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + announced_data


@pytest.mark.parametrize(("file_format", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_are_exact(cat, file_format, options):
    np.testing.assert_array_equal(pixels_of(encode(cat, file_format, **options)), np.asarray(cat))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_equals_pillow(cat, options):
    encoded = encode(cat, "JPEG", quality=95, **options)
    pixels = pixels_of(encoded)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.asarray(Image.open(io.BytesIO(encoded)))).max() <= 2


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "undo"),
    [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)],
)
def test_exif_orientation_is_applied(cat, file_format, orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = cat if undo is None else cat.transpose(undo)
    pixels = pixels_of(encode(stored, file_format, exif=exif, quality=95))
    assert pixels.shape == (cat.height, cat.width, 3)
    assert np.abs(pixels.astype(int) - np.asarray(cat)).mean() < 6


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA"])
def test_png_of_every_mode_becomes_rgb(cat, mode):
    image = cat.convert("L").convert(mode) if mode == "LA" else cat.convert(mode)
    pixels = pixels_of(encode(image, "PNG"))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


def test_gray_jpeg_becomes_rgb(cat):
    pixels = pixels_of(encode(cat.convert("L"), "JPEG", quality=95))
    assert pixels.shape == (300, 451, 3)
    assert (pixels[..., 0] == pixels[..., 2]).all()


def test_cmyk_jpeg_becomes_rgb(cat):
    pixels = pixels_of(encode(cat.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - np.asarray(cat)).mean() < 3


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_alpha_is_dropped_not_blended(cat, file_format):
    image = cat.copy()
    image.putalpha(0)
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    pixels = pixels_of(encode(image, file_format, **options))
    np.testing.assert_array_equal(pixels, np.asarray(cat))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_files_keep_their_bits(cat, channels):
    values = np.asarray(cat)[..., :channels].astype(np.uint16) * 256 + 200
    encoded = cv2.imencode(".png", values[..., ::-1])[1].tobytes()
    decoded = decode_image(encoded, max_pixels=LIMIT)
    assert decoded.highest == 65_535
    np.testing.assert_array_equal(decoded.values, np.broadcast_to(values, (300, 451, 3)))


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.6, 0.95, 0.9999])
@pytest.mark.parametrize(
    ("file_format", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
def test_truncated_files_are_refused_without_a_word_on_stderr(cat, file_format, options, fraction, capfd):
    encoded = encode(cat, file_format, **options)
    refused(encoded[: min(int(len(encoded) * fraction), len(encoded) - 1)], "IMAGE_UNDECODABLE")
    assert capfd.readouterr().err == ""


def test_truncated_jpeg_with_a_whole_thumbnail_inside_is_refused(cat):
    # The thumbnail's end marker must not pass for the image's.
    thumbnail = encode(cat.resize((40, 30)), "JPEG")
    encoded = encode(cat, "JPEG", comment=thumbnail)
    refused(encoded[: len(encoded) * 3 // 4], "IMAGE_UNDECODABLE")


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_corrupt_files_are_refused(cat, file_format, capfd):
    encoded = bytearray(encode(cat, file_format))
    middle = len(encoded) // 2
    encoded[middle : middle + 40] = bytes(40)
    refused(bytes(encoded), "IMAGE_UNDECODABLE")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "encoded", [b"", b"\x00", b"hello", b"\xff\xd8\xff", b"\xff\xd8\xff\xd9", b"GIF89a" + bytes(90)]
)
def test_garbage_is_refused(encoded):
    refused(encoded, "IMAGE_UNDECODABLE")


def test_random_bytes_after_each_magic_number_are_refused():
    rng = np.random.default_rng(3)
    for magic in (b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x80\x00\x00\x00WEBPVP8 "):
        for _ in range(50):
            refused(magic + rng.bytes(200), "IMAGE_UNDECODABLE")


@pytest.mark.parametrize("file_format", ["ICO", "PPM", "TGA"])
def test_other_formats_are_refused(cat, file_format):
    refused(encode(cat, file_format), "IMAGE_UNDECODABLE")


def test_pixel_limit_is_inclusive(cat):
    encoded = encode(cat, "PNG")
    assert pixels_of(encoded, max_pixels=300 * 451).shape == (300, 451, 3)
    error = refused(encoded, "IMAGE_TOO_LARGE", max_pixels=300 * 451 - 1)
    assert error.metadata["width_px"] == "451"


@pytest.mark.parametrize("size", [(30_000, 3_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (2_000_000, 10)])
def test_bombs_are_refused_from_their_header(size):
    # No pixel follows the header: an attempt to decode would say IMAGE_UNDECODABLE.
    refused(png_header(*size), "IMAGE_TOO_LARGE", max_pixels=MAX_PIXELS_LIMIT)
