"""The real `heatlens video` against a real server: films, lines of JSON, options, messages and exit codes."""

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from films import FPS, SIZE, lines_of, one_line, picture, read_film, start_video, statuses, write_clip
from heatlens._cli import app

NOBODY = "127.0.0.1:1"
FRAMES = 20
QUICKLY_S = 60


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = write_clip(tmp_path_factory.mktemp("clip") / "clip.mov", FRAMES)
    assert read_film(path)[1][0].shape == (SIZE[1], SIZE[0], 3)
    return path


@pytest.fixture
def run(monkeypatch):
    """Run the command in this process; stdout and stderr apart."""
    for name in ("HEATLENS_ADDRESS", "HEATLENS_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, exit_code=0):
        done = CliRunner().invoke(app, ["video", *(str(argument) for argument in arguments)])
        assert done.exit_code == exit_code, done.output
        return done

    return run


@pytest.fixture
def run_on(run, server):
    return lambda *arguments, **options: run(*arguments, "--server", server.address, **options)


def test_a_film_and_its_lines_in_silence(server, clip, tmp_path):
    film, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    process = start_video(clip, "-o", film, "--json", lines, "--server", server.address, "--smooth", 0.5)
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
        (only,) = answer["classes"]
        assert 0 <= only["id"] < 10
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
    assert [[item["id"] for item in answer["classes"]] for answer in answers] == [[3, 1]] * 3
    run_on(clip, "--json", lines, "--top-k", 4, "--max-frames", 3)
    assert [len(answer["classes"]) for answer in lines_of(lines.read_text())] == [4] * 3


def test_raw_pixels_are_exact(run_on, tmp_path, chelsea_path, chelsea):
    lines = tmp_path / "lines.jsonl"
    found = []
    for how in (["--raw"], ["--quality", 100], ["--quality", 5]):
        run_on(chelsea_path, "--json", lines, "--model", "tiny_mlp", *how)
        found.append(lines_of(lines.read_text())[0]["classes"][0]["probability"])
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
    ("arguments", "words"),
    [
        (["{folder}/nope.mp4", "-o", "{film}"], "No such file"),
        (["{garbage}", "-o", "{film}"], "cannot be opened as a video"),
        (["{folder}", "-o", "{film}"], "no images there"),
        (["{clip}", "-o", "{folder}/nope/film.mp4"], "there is no folder"),
        (["{clip}", "-o", "{clip}"], "is the input"),
        (["{clip}", "--json", "{clip}"], "is the input"),
        (["{clip}", "-o", "{film}", "--json", "{film}"], "is the film"),
        (["{clip}", "-o", "{folder}"], "is a folder"),
        (["{clip}", "-o", "{folder}/film.gif"], "ends in .mp4"),
        (["{clip}", "-o", "{film}", "--colormap", "nope"], "colormap: expected one of"),
        (["{clip}", "-o", "{film}", "--model", "nope"], "MODEL_NOT_FOUND"),
        (["{clip}", "-o", "{film}", "--model", "broken"], "MODEL_FAILED"),
        (["{clip}", "-o", "{film}", "--method", "nope"], "method: expected one of"),
        (["{clip}", "-o", "{film}", "--layer", "nope"], "unknown layer"),
        (["{clip}", "-o", "{film}", "--smooth", "1"], "smooth: expected"),
        (["{clip}", "-o", "{film}", "--timeout", "-1"], "timeout"),
    ],
)
def test_errors_are_one_line_and_write_nothing(run_on, clip, tmp_path, arguments, words):
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
    done = run_on(*arguments, exit_code=1)
    assert words in one_line(done.stderr)
    assert done.stdout == ""
    assert not names["film"].exists()
    assert clip.read_bytes() == before


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
