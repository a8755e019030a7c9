import io
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from heatlens import Heatmap, InvalidArgumentError, PixelBox
from heatlens._results.images import decode_image, encode_jpeg, load_image, write_image
from heatlens._wire.requests import explain_request
from heatlens.v1 import explain_pb2


def png(pixels):
    return cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()


def with_orientation(jpeg, orientation):
    """Insert an EXIF segment that holds only the orientation."""
    tiff = b"II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00" + bytes([orientation, 0, 0, 0])
    tiff += b"\x00\x00\x00\x00"
    exif = b"Exif\x00\x00" + tiff
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


def test_file_bytes_are_untouched(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"abc")
    assert load_image(path) == load_image(str(path)) == b"abc"
    assert load_image(bytearray(b"abc")) == load_image(memoryview(b"abc")) == b"abc"


def test_pixels_become_contiguous(pixels):
    loaded = load_image(pixels[::-1])
    assert loaded.flags.c_contiguous
    np.testing.assert_array_equal(loaded, pixels[::-1])


def test_files_are_read_from_where_they_stand_and_can_be_read_again(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"xabc")
    with path.open("rb") as file:
        file.read(1)
        assert load_image(file) == load_image(file) == b"abc"
    assert load_image(io.BytesIO(b"abc")) == b"abc"
    # One that cannot go back.
    reading, writing = os.pipe()
    os.write(writing, b"abc")
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert load_image(file) == b"abc"
        with pytest.raises(InvalidArgumentError, match="is empty") as caught:
            load_image(file)
    assert caught.value.reason == "IMAGE_EMPTY"


def test_files_that_give_no_bytes_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc")
    with path.open() as file, pytest.raises(InvalidArgumentError, match=r"image: .* binary mode, .* returned str"):
        load_image(file)
    path.write_bytes(b"\xff\xd8")
    with path.open(encoding="utf-8") as file, pytest.raises(InvalidArgumentError, match="image: cannot be read"):
        load_image(file)
    with path.open("rb") as file:
        pass
    with pytest.raises(InvalidArgumentError, match=r"mask: cannot be read: .*closed") as caught:
        load_image(file, argument="mask")
    assert caught.value.reason == "IMAGE_UNREADABLE"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "YCbCr", "HSV"])
def test_images_of_pillow_are_rgb_pixels(pixels, mode):
    image = Image.fromarray(pixels).convert(mode)
    loaded = load_image(image)
    np.testing.assert_array_equal(loaded, np.asarray(image.convert("RGB")))
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(decode_image(image), loaded)
    assert image.mode == mode


def test_images_of_pillow_are_upright_as_their_files_are(pixels):
    large = np.kron(pixels, np.ones((8, 16, 1), np.uint8))
    encoded = with_orientation(cv2.imencode(".jpg", large)[1].tobytes(), 6)
    loaded = load_image(Image.open(io.BytesIO(encoded)))
    expected = decode_image(encoded)
    assert loaded.shape == expected.shape == (64, 32, 3)
    assert np.abs(loaded.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("deep", [np.full((2, 3), 3000, np.uint16), np.full((2, 3), 0.25, np.float32)])
def test_deep_images_of_pillow_keep_their_values(deep):
    np.testing.assert_array_equal(load_image(Image.fromarray(deep)), deep)


def test_big_endian_images_of_pillow():
    loaded = load_image(Image.frombytes("I;16B", (3, 2), np.full((2, 3), 3000, ">u2").tobytes()))
    assert loaded.dtype == np.uint16
    assert (loaded == 3000).all()


def test_images_of_pillow_with_whole_numbers_of_32_bits_are_refused():
    with pytest.raises(InvalidArgumentError, match="int32"):
        load_image(Image.fromarray(np.full((4, 4), 3000, np.int32)))


def test_a_broken_file_behind_an_image_of_pillow(chelsea_path):
    half = chelsea_path.read_bytes()[:50_000]
    with pytest.raises(OSError, match="truncated"):
        load_image(Image.open(io.BytesIO(half)))


def test_pillow_is_not_loaded_unless_it_is_used():
    program = (
        "import sys, numpy; from heatlens._results.images import load_image; "
        "load_image(numpy.zeros((2, 2, 3), 'u1')); print('PIL' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 3), bool),
        np.zeros(4, np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        b"",
        12,
        None,
    ],
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(InvalidArgumentError) as caught:
        load_image(image)
    assert caught.value.field_violations[0].field == "image"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 7)])
def test_pixels_of_every_kind_are_sent_as_they_are(dtype, shape):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    assert load_image(values) is values
    request = explain_request(values)
    assert tuple(request.image.pixels.shape) == shape
    assert explain_pb2.DataType.Name(request.image.pixels.data_type) == f"DATA_TYPE_{np.dtype(dtype).name.upper()}"
    assert request.image.pixels.data == values.tobytes()


def test_doubles_are_sent_as_floats():
    loaded = load_image(np.full((2, 2), 0.25))
    assert loaded.dtype == np.float32
    assert (loaded == 0.25).all()


@pytest.mark.parametrize(
    ("pixels", "drawn"),
    [
        (np.array([[0, 255]], np.uint8), [0, 255]),
        (np.array([[[0, 9], [255, 9]]], np.uint8), [0, 255]),
        (np.array([[0, 65_535]], np.uint16), [0, 255]),
        (np.array([[0, 257 * 100]], np.uint16), [0, 100]),
        (np.array([[0, 2048, 4095]], np.uint16), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[-1000.0, 0.0, 1000.0]], np.float32), [0, 128, 255]),
    ],
)
def test_pixels_of_every_kind_can_be_drawn_on(pixels, drawn):
    result = decode_image(pixels)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, np.repeat(np.array(drawn)[None, :, None], 3, axis=2))


def test_the_first_three_of_many_channels_are_drawn_on(pixels):
    with_more = np.dstack([pixels, pixels[:, :, :2]])
    np.testing.assert_array_equal(decode_image(with_more), pixels)


def test_empty_file_is_refused(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    with pytest.raises(InvalidArgumentError, match="empty") as caught:
        load_image(path)
    assert caught.value.reason == "IMAGE_EMPTY"


@pytest.mark.parametrize("path", ["\0", "a\0.jpg", "\ud800", Path("a\0")])
def test_impossible_paths_are_refused(path):
    with pytest.raises(InvalidArgumentError, match="image: expected a path"):
        load_image(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "missing.png")


def test_decodes_to_rgb(pixels):
    np.testing.assert_array_equal(decode_image(png(pixels)), pixels)
    assert decode_image(pixels) is pixels


def test_applies_exif_orientation():
    wide = np.zeros((8, 16, 3), np.uint8)
    jpeg = cv2.imencode(".jpg", wide)[1].tobytes()
    assert decode_image(jpeg).shape == (8, 16, 3)
    assert decode_image(with_orientation(jpeg, 6)).shape == (16, 8, 3)


def test_alpha_is_dropped_and_gray_becomes_rgb():
    rgba = cv2.imencode(".png", np.full((3, 5, 4), 128, np.uint8))[1].tobytes()
    gray16 = cv2.imencode(".png", np.full((3, 5), 0x8080, np.uint16))[1].tobytes()
    assert decode_image(rgba).shape == decode_image(gray16).shape == (3, 5, 3)
    assert decode_image(gray16)[0, 0].tolist() == [128, 128, 128]


@pytest.mark.parametrize("garbage", [b"garbage", b"\xff\xd8\xff\xe0truncated", b"\x89PNG\r\n\x1a\n"])
def test_garbage_is_refused(garbage):
    with pytest.raises(InvalidArgumentError) as caught:
        decode_image(garbage)
    assert caught.value.reason == "IMAGE_UNDECODABLE"


def test_writes_what_the_suffix_says(tmp_path, pixels):
    write_image(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png"), pixels)
    write_image(tmp_path / "a.JPG", pixels)
    assert (tmp_path / "a.JPG").read_bytes()[:2] == b"\xff\xd8"
    with pytest.raises(InvalidArgumentError, match="suffix"):
        write_image(tmp_path / "a.xyz", pixels)


@pytest.mark.parametrize("shape", [(1, 65_501, 3), (65_501, 1, 3)])
def test_what_no_jpeg_can_hold_is_refused(shape):
    with pytest.raises(InvalidArgumentError, match=f"frame: cannot be a JPEG of {shape[1]}x{shape[0]} pixels"):
        encode_jpeg(np.zeros(shape, np.uint8), 90, argument="frame")


def test_other_faults_of_the_encoder_are_not_silenced():
    with pytest.raises((cv2.error, AttributeError)):
        encode_jpeg(None, 90, argument="frame")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_picture_too_large_for_its_type_is_refused_and_nothing_is_written(tmp_path, suffix):
    path = tmp_path / f"wide{suffix}"
    heatmap = Heatmap(np.zeros((1, 65_501), np.float32), 1.0, 0.0, PixelBox(0, 0, 65_501, 1), placed=False)
    with pytest.raises(InvalidArgumentError, match=r"path: no \.\w+ file can hold 65501x1 pixels"):
        heatmap.save(path)
    assert not path.exists()
