from pathlib import Path

import cv2
import numpy as np
import pytest

from heatlens import Heatmap, InvalidArgumentError, PixelBox
from heatlens._results.images import decode_image, encode_jpeg, load_image, write_image


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


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
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
