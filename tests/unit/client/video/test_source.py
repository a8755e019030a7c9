"""Image files as a source of frames, and how a picture fits another size."""

import cv2
import numpy as np
import pytest

from heatlens import InvalidArgumentError
from heatlens._video.inputs import open_source
from heatlens._video.source import letterbox


@pytest.fixture
def unreadable():
    return []


@pytest.fixture
def opened(unreadable):
    options = {"timeout_s": 5.0, "reconnect_timeout_s": 0.0, "on_unreadable": unreadable.append, "tell": pytest.fail}
    return lambda text, fps=None: open_source(str(text), fps=fps, **options)


def gray(level, size=(48, 32)):
    return np.full((size[1], size[0], 3), level, np.uint8)


def levels_of(frames):
    return [round(float(frame.pixels.mean())) for frame in frames]


@pytest.mark.parametrize("text", ["http://[", "9" * 20, "file:///tmp/clip.mp4"])
def test_what_is_no_input(opened, text):
    with pytest.raises(InvalidArgumentError, match="INPUT: "):
        opened(text)


def test_a_folder_of_images_in_natural_order(opened, tmp_path):
    for index in (10, 2, 1):
        cv2.imwrite(str(tmp_path / f"frame{index}.png"), gray(index * 20))
    (tmp_path / "notes.txt").write_text("no image")
    source = opened(tmp_path)
    assert (source.fps, source.size, source.live, source.total) == (25.0, (48, 32), False, 3)
    assert levels_of(source) == [20, 40, 200]


def test_a_glob(opened, tmp_path):
    for index in range(4):
        cv2.imwrite(str(tmp_path / f"{'ab'[index % 2]}{index}.png"), gray(index * 20))
    assert levels_of(opened(tmp_path / "a*.png", fps=5)) == [0, 40]


def test_a_single_image(opened, chelsea_path, chelsea):
    (frame,) = opened(chelsea_path)
    np.testing.assert_array_equal(frame.pixels, chelsea)


def test_images_of_other_sizes_are_letterboxed(opened, tmp_path):
    cv2.imwrite(str(tmp_path / "1.png"), gray(9, (60, 40)))
    cv2.imwrite(str(tmp_path / "2.png"), gray(200, (40, 80)))
    frames = list(opened(tmp_path))
    assert [frame.pixels.shape for frame in frames] == [(40, 60, 3)] * 2
    assert (frames[1].pixels[:, 20:40] == 200).all()
    assert (frames[1].pixels[:, :20] == 0).all()
    assert (frames[1].pixels[:, 40:] == 0).all()


@pytest.mark.parametrize(
    ("columns", "rows", "box"), [(100, 50, (0, 12, 50, 25)), (50, 100, (12, 0, 25, 50)), (1, 900, (24, 0, 1, 50))]
)
def test_letterbox(columns, rows, box):
    left, top, width, height = box
    result = letterbox(np.full((rows, columns, 3), 77, np.uint8), (50, 50))
    expected = np.zeros((50, 50, 3), np.uint8)
    expected[top : top + height, left : left + width] = 77
    np.testing.assert_array_equal(result, expected)


def test_images_that_cannot_be_read_are_told_and_left_out(opened, unreadable, tmp_path):
    for index in (1, 3):
        cv2.imwrite(str(tmp_path / f"{index}.png"), gray(index * 20))
    for index in (0, 2):
        (tmp_path / f"{index}.png").write_bytes(b"garbage")
    frames = list(opened(tmp_path))
    assert levels_of(frames) == [20, 60]
    assert [frame.frame_id for frame in frames] == [0, 1]
    assert unreadable == [tmp_path / "0.png", tmp_path / "2.png"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("folder", "no images there"),
        ("*.nothing", "no images there"),
        ("bad.png", "no image there can be read"),
    ],
)
def test_where_no_image_is(opened, tmp_path, capfd, name, words):
    (tmp_path / "bad.png").write_bytes(b"garbage")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=words) as caught:
        opened(tmp_path / name)
    assert caught.value.filename == str(tmp_path / name)
    assert capfd.readouterr() == ("", "")
