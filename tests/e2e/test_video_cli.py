"""The real `heatlens video` against a real server: films, lines of JSON, options, messages and exit codes."""

import importlib.util
import sys
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from cli_process import start_cli
from video_files import FPS, SIZE, break_off, lines_of, one_line, picture, read_film, statuses, write_clip, write_video

NOBODY = "127.0.0.1:1"
FRAMES = 20
QUICKLY_S = 60


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = write_clip(tmp_path_factory.mktemp("clip") / "clip.mov", FRAMES)
    assert read_film(path)[1][0].shape == (SIZE[1], SIZE[0], 3)
    return path


@pytest.fixture
def run(run):
    """Run `heatlens video` in this process."""
    return partial(run, "video")


@pytest.fixture
def run_on(run, server):
    return lambda *arguments, **options: run(*arguments, "--server", server.address, **options)


def test_a_film_and_its_lines_in_silence(server, clip, tmp_path):
    film, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    process = start_cli("video", clip, "-o", film, "--json", lines, "--server", server.address, "--smooth", 0.5)
    stdout, stderr = process.communicate(timeout=QUICKLY_S)
    assert process.returncode == 0, stderr
    assert stderr == ""
    assert stdout.startswith(f"{FRAMES} frames in ")
    assert f"{FRAMES} explained, wrote {film} (H.264)" in one_line(stdout)
    fps, frames = read_film(film)
    assert fps == pytest.approx(FPS)
    # An odd side gets a pixel more.
    assert [frame.shape for frame in frames] == [(50, 66, 3)] * FRAMES
    answers = lines_of(lines.read_text())
    assert [answer["frame_id"] for answer in answers] == list(range(FRAMES))
    assert [answer["time_s"] for answer in answers] == pytest.approx([index / FPS for index in range(FRAMES)])
    for answer in answers:
        assert answer["status"] == "explained"
        assert answer["error"] is None
        assert answer["latency_ms"] > 0
        assert answer["timing"]["batch_size"] >= 1
        (only,) = answer["explanations"]
        assert 0 <= only["class_id"] < 10
        assert 0 < only["probability"] <= 1


def test_every_frame_of_the_film_is_the_frame_of_the_clip(run_on, clip, tmp_path):
    run_on(clip, "-o", tmp_path / "film.mp4", "--alpha", 0)
    _, originals = read_film(clip)
    _, frames = read_film(tmp_path / "film.mp4")
    for original, frame in zip(originals, frames, strict=True):
        # Below the banner; the square moves by two pixels a frame.
        np.testing.assert_allclose(frame[20:49, :65].astype(float), original[20:], atol=60)
        assert np.abs(frame[20:49, :65].astype(float) - original[20:]).mean() < 6


def test_every(run_on, clip, tmp_path):
    film, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    done = run_on(clip, "-o", film, "--json", lines, "--every", 3)
    assert statuses(lines) == ["explained" if index % 3 == 0 else "skipped" for index in range(FRAMES)]
    assert len(read_film(film)[1]) == FRAMES
    assert "7 explained, 13 skipped" in done.stdout


def test_max_fps_counts_film_and_not_time(run_on, clip, tmp_path):
    lines = tmp_path / "lines.jsonl"
    run_on(clip, "--json", lines, "--max-fps", FPS / 2)
    assert statuses(lines) == ["explained", "skipped"] * (FRAMES // 2)


def test_options_reach_the_server(run_on, clip, tmp_path):
    lines = tmp_path / "lines.jsonl"
    what = ["--model", "tiny_mlp", "--method", "grad-cam", "--layer", "body", "--class", 3, "--class", 1]
    run_on(clip, "--json", lines, *what, "--max-frames", 3, "--max-in-flight", 1)
    answers = lines_of(lines.read_text())
    assert [[item["class_id"] for item in answer["explanations"]] for answer in answers] == [[3, 1]] * 3
    run_on(clip, "--json", lines, "--top-k", 4, "--max-frames", 3)
    assert [len(answer["explanations"]) for answer in lines_of(lines.read_text())] == [4] * 3


def test_raw_pixels_are_exact(run_on, tmp_path, chelsea_path, chelsea):
    lines = tmp_path / "lines.jsonl"
    found = []
    for how in (["--raw"], ["--quality", 100], ["--quality", 5]):
        run_on(chelsea_path, "--json", lines, "--model", "tiny_mlp", *how)
        found.append(lines_of(lines.read_text())[0]["explanations"][0]["probability"])
    raw, fine, coarse = found
    assert abs(fine - raw) < abs(coarse - raw)


def test_limits(run_on, clip, tmp_path):
    lines = tmp_path / "lines.jsonl"
    run_on(clip, "--json", lines, "--max-frames", 7)
    assert len(statuses(lines)) == 7
    run_on(clip, "--json", lines, "--duration", 0.5)
    # 0, 0.08, ... 0.48.
    assert len(statuses(lines)) == 7


def test_lines_on_stdout(run_on, clip):
    done = run_on(clip, "--json", "-", "--max-frames", 4)
    assert len(lines_of(done.stdout)) == 4
    assert one_line(done.stderr).startswith("4 frames in ")


def test_images_and_one_that_is_none(run_on, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(1, 12):
        cv2.imwrite(str(folder / f"{index}.png"), picture(index, (64, 48) if index < 11 else (48, 64)))
    (folder / "5.png").write_bytes(b"garbage")
    film = tmp_path / "film.mp4"
    done = run_on(folder, "-o", film, "--fps", 5, exit_code=1)
    assert one_line(done.stderr) == f"heatlens: error: {folder / '5.png'}: cannot be read as an image; left out"
    fps, frames = read_film(film)
    assert fps == 5
    assert len(frames) == 10
    (folder / "5.png").unlink()
    run_on(folder / "*.png", "-o", film)
    fps, frames = read_film(film)
    assert (fps, len(frames)) == (25, 10)


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["{folder}/nope.mp4", "-o", "{film}"], 1, "No such file"),
        (["{garbage}", "-o", "{film}"], 1, "cannot be opened as a video"),
        (["{folder}", "-o", "{film}"], 1, "no images there"),
        (["{clip}", "-o", "{folder}/nope/film.mp4"], 2, "there is no folder"),
        (["{clip}", "-o", "{clip}"], 2, "is the input"),
        (["{clip}", "--json", "{clip}"], 2, "is the input"),
        (["{clip}", "-o", "{film}", "--json", "{film}"], 2, "is the film"),
        (["{clip}", "-o", "{folder}"], 2, "is a folder"),
        (["{clip}", "-o", "{folder}/film.gif"], 2, "ends in .mp4"),
        (["{clip}", "-o", "{film}", "--colormap", "nope"], 2, "colormap: expected one of"),
        (["{clip}", "-o", "{film}", "--model", "nope"], 1, "MODEL_NOT_FOUND"),
        (["{clip}", "-o", "{film}", "--model", "broken"], 1, "MODEL_FAILED"),
        (["{clip}", "-o", "{film}", "--method", "nope"], 2, "method: expected one of"),
        (["{clip}", "-o", "{film}", "--layer", "nope"], 1, "unknown layer"),
        (["{clip}", "-o", "{film}", "--smooth", "1"], 2, "smooth: expected"),
        (["{clip}", "-o", "{film}", "--timeout", "-1"], 2, "timeout"),
        (["", "-o", "{film}"], 2, "INPUT: is empty"),
        (["http://[", "-o", "{film}"], 2, "INPUT: is not a URL"),
        (["99999999999999999999", "-o", "{film}"], 2, "INPUT: expected a camera's number"),
        (["file://{clip}", "-o", "{clip}"], 2, "INPUT: expected a URL"),
    ],
)
def test_errors_are_one_line_and_write_nothing(run_on, clip, tmp_path, arguments, exit_code, words):
    (tmp_path / "garbage.avi").write_bytes(b"garbage" * 100)
    (tmp_path / "folder").mkdir()
    names = {
        "folder": tmp_path / "folder",
        "film": tmp_path / "film.mp4",
        "garbage": tmp_path / "garbage.avi",
        "clip": clip,
    }
    before = clip.read_bytes()
    arguments = [argument.format(**names) for argument in arguments]
    done = run_on(*arguments, exit_code=exit_code)
    assert words in one_line(done.stderr)
    assert done.stdout == ""
    assert not names["film"].exists()
    assert clip.read_bytes() == before


@pytest.mark.parametrize("option", ["-o", "--json"])
@pytest.mark.parametrize("source", ["images", "images/*", "images/a*.png"])
def test_outputs_are_none_of_the_inputs(run_on, tmp_path, monkeypatch, option, source):
    (tmp_path / "images").mkdir()
    for index in range(3):
        cv2.imwrite(str(tmp_path / "images" / f"a{index}.png"), picture(index))
    precious = tmp_path / "images" / "a2.png"
    # By another name, too.
    (tmp_path / "link.mp4").symlink_to(precious)
    (tmp_path / "hard.mp4").hardlink_to(precious)
    monkeypatch.chdir(tmp_path)
    before = precious.read_bytes()
    for name in ("images/../images/a2.png", precious, "link.mp4", "hard.mp4"):
        done = run_on(source, option, name, exit_code=2)
        assert one_line(done.stderr).endswith("is one of the inputs")
        assert precious.read_bytes() == before


def test_old_lines_are_kept_until_there_are_new_ones(run, clip, tmp_path):
    lines = tmp_path / "precious.jsonl"
    lines.write_text("precious")
    run(tmp_path / "nope.mp4", "--json", lines, exit_code=1)
    run(clip, "--json", lines, "--server", NOBODY, "--timeout", 5, exit_code=1)
    assert lines.read_text() == "precious"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named(run_on, clip):
    assert one_line(run_on(clip, "--json", "/dev/full", exit_code=1).stderr).endswith(
        "/dev/full: No space left on device"
    )


def test_a_film_too_large_for_h264(run_on, tmp_path):
    image, film = tmp_path / "wide.png", tmp_path / "film.mp4"
    cv2.imwrite(str(image), np.zeros((4, 20_000, 3), np.uint8))
    done = run_on(image, "-o", film, exit_code=1)
    assert "film.mp4: H.264 has no films of 20000x4 pixels" in one_line(done.stderr)
    assert not film.exists()


def test_a_frame_too_large_for_a_jpeg_fails_alone(run_on, tmp_path):
    image, lines = tmp_path / "wide.png", tmp_path / "lines.jsonl"
    cv2.imwrite(str(image), np.zeros((1, 70_000, 3), np.uint8))
    done = run_on(image, "--json", lines, exit_code=1)
    (line,) = lines_of(lines.read_text())
    assert line["status"] == "failed"
    assert "70000x1" in line["error"]["message"]
    assert "1 failed" in one_line(done.stdout)


def test_a_film_that_breaks_off_is_told(run_on, tmp_path):
    path, lines = tmp_path / "clip.avi", tmp_path / "lines.jsonl"
    write_video(path, [picture(index, (64, 48)) for index in range(40)], codec="mjpeg", pix_fmt="yuvj420p")
    break_off(path, 0.5)
    done = run_on(path, "--json", lines, exit_code=1)
    count = len(statuses(lines))
    assert 10 < count < 30
    assert one_line(done.stderr).endswith(f"INPUT ended after {count} frames of 40: it is damaged or cut off")
    # Who asks for fewer does not miss them.
    assert run_on(path, "--json", lines, "--max-frames", 5).stderr == ""


def test_a_variable_frame_rate(run_on, tmp_path):
    path, film, lines = tmp_path / "clip.mov", tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    times = [index * 0.04 for index in range(10)] + [0.4 + index * 0.4 for index in range(5)]
    write_video(path, [picture(index) for index in range(15)], codec="png", pix_fmt="rgb24", times_s=times)
    run_on(path, "-o", film, "--json", lines, "--max-fps", 5)
    answers = lines_of(lines.read_text())
    assert [answer["time_s"] for answer in answers] == pytest.approx(times, abs=1e-3)
    # 0, 0.2 and, from 0.4 on, all.
    explained = [index for index, answer in enumerate(answers) if answer["status"] == "explained"]
    assert explained == [0, 5, 10, 11, 12, 13, 14]
    with av.open(str(film)) as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx(times, abs=1e-3)
    run_on(path, "--json", lines, "--duration", 0.79)
    assert len(statuses(lines)) == 11


@pytest.mark.parametrize(("option", "value"), [("--max-fps", 0), ("--duration", 0), ("--fps", 0)])
def test_the_right_option_is_named(run_on, clip, option, value):
    done = run_on(clip, "-o", "film.mp4", option, value, exit_code=2)
    others = {"--max-fps", "--duration", "--fps"} - {option}
    assert option in done.stderr
    assert not any(f"{other}:" in done.stderr or f"{other} " in done.stderr for other in others)


@pytest.mark.parametrize(("source", "option"), [("clip", "--json"), ("image", "-o")])
def test_without_the_extra_it_is_named(run, clip, tmp_path, chelsea_path, monkeypatch, source, option):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail(name) if name != "av" else None)
    output = tmp_path / "output.mp4"
    done = run(clip if source == "clip" else chelsea_path, option, output, exit_code=2)
    assert one_line(done.stderr) == "heatlens: error: videos need PyAV: pip install 'heatlens[video]'"
    assert not output.exists()


def test_lines_of_images_need_no_extra(run_on, chelsea_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "heatlens._video.pyav", raising=False)
    assert len(lines_of(run_on(chelsea_path, "--json", "-").stdout)) == 1


def test_nobody_there(run, clip, tmp_path):
    done = run(clip, "-o", tmp_path / "film.mp4", "--server", NOBODY, "--timeout", 5, exit_code=1)
    assert "[UNAVAILABLE" in one_line(done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-o", "film.mp4", "--raw", "--quality", 90],
        ["-o", "film.mp4", "--quality", 0],
        ["-o", "film.mp4", "--every", 0],
        ["-o", "film.mp4", "--max-fps", "nan"],
        ["-o", "film.mp4", "--duration", -1],
        ["-o", "film.mp4", "--fps", 0],
        ["-o", "film.mp4", "--alpha", 1.5],
        ["-o", "film.mp4", "--overflow", "wait"],
    ],
)
def test_usage(run_on, clip, arguments):
    run_on(clip, *arguments, exit_code=2)
