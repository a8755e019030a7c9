"""What the INPUT of `heatlens video` names."""

import pytest

from heatlens import InvalidArgumentError
from heatlens._video.inputs import camera_of, checked_url, files_of, images_of, is_url, natural_key, public_name


def test_public_name():
    assert public_name("rtsp://user:p@ss@cam.example:554/a?b=1") == "rtsp://cam.example:554/a?b=1"
    assert public_name("http://cam.example/a") == "http://cam.example/a"


def test_natural_order(tmp_path):
    names = ["b1", "a10", "a9", "A2", "a", "10", "9", "a1b2"]
    assert sorted((tmp_path / name for name in names), key=natural_key) == [
        tmp_path / name for name in ["9", "10", "a", "a1b2", "A2", "a9", "a10", "b1"]
    ]


@pytest.mark.parametrize("url", ["http://h/a.mp4", "HTTPS://h/a", "rtsp://u:p@h/a", "udp://127.0.0.1:5"])
def test_urls_of_networks(url):
    assert is_url(url)
    assert checked_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "file:///tmp/clip.mp4",
        "FILE:///tmp/clip.mp4",
        "cache:file:///tmp/clip.mp4",
        "async:file:///tmp/clip.mp4",
        "subfile,,start,0,end,9,,:///tmp/clip.mp4",
        "://me:secret@nowhere",
        "http://me:secret@[",
    ],
)
def test_urls_that_read_files_or_are_none(url):
    assert is_url(url)
    with pytest.raises(InvalidArgumentError, match="INPUT: ") as caught:
        checked_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("007", 7), (f"{2**31 - 1}", 2**31 - 1), ("x", None), ("", None), ("²", None)]
)
def test_cameras(text, number):
    assert camera_of(text) == number


@pytest.mark.parametrize("text", [f"{2**31}", "9" * 20, "9" * 200])
def test_numbers_that_are_no_camera(text):
    with pytest.raises(InvalidArgumentError, match="INPUT: expected a camera's number"):
        camera_of(text)


def test_files_that_are_read(tmp_path):
    for name in ("a1.png", "a2.PNG", "b.png", "clip.mp4"):
        (tmp_path / name).touch()
    images = [tmp_path / "a1.png", tmp_path / "a2.PNG", tmp_path / "b.png"]
    assert files_of(str(tmp_path)) == images_of(str(tmp_path)) == images
    assert files_of(str(tmp_path / "a*")) == images[:2]
    assert files_of(str(images[0])) == images[:1]
    assert files_of(str(tmp_path / "clip.mp4")) == [tmp_path / "clip.mp4"]
    assert files_of(str(tmp_path / "missing.mp4")) == []
    assert files_of("http://127.0.0.1/a.mp4") == []


def test_nothing_is_no_input():
    with pytest.raises(InvalidArgumentError, match="INPUT: is empty"):
        files_of("")
