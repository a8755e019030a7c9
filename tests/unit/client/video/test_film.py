"""Films are written, and read back by another reader and by PyAV."""

import subprocess
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from heatlens._video.film import Film
from video_files import read_film

SUFFIXES = [".mp4", ".m4v", ".mov", ".mkv"]


def picture(level, size=(64, 48)):
    return np.full((size[1], size[0], 3), (level, 255 - level, 40), np.uint8)


def write_film(path, *shown, fps=25, size=(64, 48), steady=False):
    """Write pictures of levels, each with its time."""
    film = Film(path, fps=fps, size=size, steady=steady)
    for level, time_s in shown:
        film.add(picture(level, size), time_s)
    film.close()
    film.close()
    return path


def read(path):
    """Frames per second, and the frames as RGB."""
    fps, frames = read_film(path)
    return fps, [cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) for frame in frames]


def times_of(path):
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


@pytest.mark.parametrize("fps", [25.0, 30000 / 1001, 12.5, 0.5, 100.0])
def test_what_is_written_is_read_back(tmp_path, capfd, fps):
    levels = [10, 90, 170, 240]
    path = write_film(tmp_path / "film.mp4", *((level, index / fps) for index, level in enumerate(levels)), fps=fps)
    written_fps, frames = read(path)
    assert written_fps == pytest.approx(fps, rel=1e-4)
    assert len(frames) == 4
    for level, frame in zip(levels, frames, strict=True):
        np.testing.assert_allclose(frame.mean((0, 1)), [level, 255 - level, 40], atol=6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("size", "stored"), [((63, 47), (64, 48)), ((64, 47), (64, 48)), ((17, 16), (18, 16))])
def test_odd_sizes_get_a_copy_of_the_last_pixel(tmp_path, size, stored):
    _, (frame,) = read(write_film(tmp_path / "film.mp4", (40, 0), fps=10, size=size))
    assert frame.shape == (stored[1], stored[0], 3)
    np.testing.assert_allclose(frame[-1, -1], picture(40, size)[-1, -1], atol=12)


def test_h264_is_what_browsers_play(tmp_path):
    path = write_film(tmp_path / "film.mp4", (100, 0))
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        # BT.601, as the pixels were converted.
        assert int(stream.codec_context.colorspace) == 6
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_a_file_that_cannot_be_written(tmp_path):
    path = tmp_path / "missing" / "film.mp4"
    with pytest.raises(FileNotFoundError) as caught:
        write_film(path, (100, 0))
    assert caught.value.filename == str(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_os_error(tmp_path):
    path = tmp_path / "film.mkv"
    path.symlink_to("/dev/full")
    film = Film(path, fps=25, size=(64, 48), steady=False)

    def write():
        for index in range(50):
            film.add(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8), index / 25)
        film.close()

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.filename == str(path)


@pytest.mark.parametrize(
    ("slots", "written"),
    [
        ([0, 1, 2], [10, 50, 90]),
        # Late: the frame before is held.
        ([0, 3, 4], [10, 10, 10, 50, 90]),
        # Early: two frames for one place, the first one stays.
        ([0, 0, 1, 1, 2], [10, 90, 170]),
        # A film that starts late starts with its first frame.
        ([2, 3], [10, 10, 10, 50]),
    ],
)
def test_a_steady_film_keeps_its_rate(tmp_path, slots, written):
    shown = [(10 + 40 * index, slot / 5) for index, slot in enumerate(slots)]
    path = write_film(tmp_path / "film.mp4", *shown, fps=5.0, steady=True)
    assert [frame[..., 0].mean() for frame in read(path)[1]] == pytest.approx(written, abs=6)
    assert times_of(path) == pytest.approx([index / 5 for index in range(len(written))])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_film_shows_every_frame_at_its_time(tmp_path, capfd, suffix):
    times = [index * 0.04 for index in range(15)] + [0.6 + index * 0.4 for index in range(15)]
    shown = [(8 * index, time_s) for index, time_s in enumerate(times)]
    path = write_film(tmp_path / f"film{suffix}", *shown, fps=30 / 6.6)
    assert times_of(path) == pytest.approx(times, abs=1e-3)
    with av.open(str(path)) as container:
        # The last frame is within the film's length.
        assert container.duration / 1e6 > times[-1]
    # No chatter of FFmpeg about options that a container does not know.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [(16_386, 4), (4, 16_386), (20_000, 64)])
def test_a_film_too_large_for_h264(tmp_path, size):
    path = tmp_path / "film.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(OSError, match=f"H.264 has no films of {size[0]}x{size[1]} pixels") as caught:
        write_film(path, fps=25, size=size)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"precious"


def test_the_command_line_starts_without_the_extra():
    program = "import sys, heatlens._cli.commands, heatlens._video.record; print('av' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
