"""What is kept of the answers, with a source and answers made by hand; and the lines of JSON."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from heatlens import Explanation, Heatmap, InternalError, PixelBox, ResourceExhaustedError, Result, Timing
from heatlens._results.answer_json import answer_json
from heatlens._results.results import FRAME_DROPPED, FrameResult
from heatlens._video.record import JsonLines, Record, Status
from heatlens._video.source import VideoFrame
from video_files import read_film

SIZE = (64, 48)
GRAY = 90


def result(label="cat"):
    heatmap = Heatmap(values=np.ones((2, 2), np.float32), scale=1, offset=0, region=PixelBox(0, 0, *SIZE), placed=False)
    return Result(
        explanations=(Explanation(class_id=3, label=label, logit=1.0, probability=0.5, heatmap=heatmap),),
        predictions=(),
        source_region=PixelBox(0, 0, *SIZE),
        source_size=SIZE,
        model="tiny",
        model_version="1",
        timing=Timing(queue_ms=1, preprocess_ms=2, compute_ms=3, batch_size=4),
    )


def answer(kind):
    """An answer of a kind: explained, skipped, dropped or failed."""
    errors = {
        "dropped": ResourceExhaustedError("too late", reason=FRAME_DROPPED),
        "failed": InternalError("oh", reason="OOPS"),
    }
    return FrameResult(
        frame_id=0,
        frame=None,
        result=result() if kind == "explained" else None,
        error=errors.get(kind),
        skipped=kind == "skipped",
        latency_ms=12.34567,
    )


def frame(frame_id, time_s=0.0):
    return VideoFrame(frame_id, time_s, np.full((SIZE[1], SIZE[0], 3), GRAY, np.uint8))


@pytest.fixture
def lines():
    return io.StringIO()


@pytest.fixture
def make_record(tmp_path, lines):
    def make(*, live=False, fps=10.0, film=True):
        source = SimpleNamespace(fps=fps, size=SIZE, live=live)
        path = tmp_path / "film.mp4" if film else None
        return Record(source, film=path, lines=lines, colormap="jet", alpha=0.5)

    return make


def is_red(picture):
    """Whether the (everywhere hot) map is drawn below the banner."""
    blue, _, red = picture[30:].mean((0, 1))
    return red > blue + 20


def test_every_answer_is_a_line(make_record, lines):
    record = make_record(film=False)
    kinds = ["explained", "skipped", "dropped", "failed"]
    statuses = [record.add(frame(index, index / 10), answer(kind)) for index, kind in enumerate(kinds)]
    assert statuses == kinds == list(Status)
    written = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [line["status"] for line in written] == kinds
    assert [line["frame_id"] for line in written] == [0, 1, 2, 3]
    assert [line["time_s"] for line in written] == [0.0, 0.1, 0.2, 0.3]
    expected = answer_json(result(), frame_id=0, time_s=0.0, latency_ms=12.34567)
    assert written[0] == json.loads(json.dumps(expected))
    assert written[0]["latency_ms"] == 12.346
    assert written[0]["explanations"][0]["label"] == "cat"
    assert written[0]["timing"] == {"queue_ms": 1, "preprocess_ms": 2, "compute_ms": 3, "batch_size": 4}
    assert [set(line) for line in written] == [set(written[0])] * 4
    assert written[3]["error"] == {"code": "INTERNAL", "reason": "OOPS", "message": "oh"}
    assert written[2]["error"]["reason"] == "FRAME_DROPPED"
    assert written[1]["explanations"] == []
    assert (record.frames, record.has_film) == (4, False)
    assert record.counts == dict.fromkeys(Status, 1)


def test_the_last_map_is_held_until_a_frame_fails(make_record, tmp_path):
    record = make_record()
    kinds = ["dropped", "explained", "skipped", "dropped", "failed", "skipped", "explained"]
    for index, kind in enumerate(kinds):
        record.add(frame(index, index / 10), answer(kind))
    record.close()
    record.close()
    assert [is_red(picture) for picture in read_film(tmp_path / "film.mp4")[1]] == [
        False,  # nothing was explained yet
        True,
        True,
        True,
        False,
        False,
        True,
    ]


def test_the_banner_of_a_failed_frame_says_so(make_record, tmp_path):
    record = make_record()
    for index, kind in enumerate(["skipped", "failed"]):
        record.add(frame(index, index / 10), answer(kind))
    record.close()
    plain, failed = read_film(tmp_path / "film.mp4")[1]
    assert plain[:12].max() < GRAY + 15
    assert failed[:12].max() > 150
    np.testing.assert_allclose(failed[30:], GRAY, atol=8)


def test_a_live_source_is_filmed_at_its_own_pace(make_record, tmp_path):
    record = make_record(live=True, fps=10.0)
    # One frame late, one early.
    for index, time_s in enumerate([0.0, 0.1, 0.52, 0.54, 0.6]):
        record.add(frame(index, time_s), answer("explained"))
    record.close()
    assert len(read_film(tmp_path / "film.mp4")[1]) == 7


def test_no_answer_no_file(make_record, tmp_path):
    make_record().close()
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_replaced_by_the_first_line_and_not_before(tmp_path):
    path = tmp_path / "precious.jsonl"
    path.write_text("precious")
    lines = JsonLines(path)
    assert path.read_text() == "precious"
    lines.write("ä\n")
    assert path.read_text(encoding="utf-8") == "ä\n"
    lines.write("b\n")
    lines.close()
    lines.close()
    assert path.read_text(encoding="utf-8") == "ä\nb\n"


def test_without_a_line_there_is_no_file(tmp_path):
    JsonLines(tmp_path / "lines.jsonl").close()
    assert list(tmp_path.iterdir()) == []


def test_stdout(capsys):
    lines = JsonLines(None)
    lines.write("a\n")
    lines.close()
    print("still open")
    assert capsys.readouterr().out == "a\nstill open\n"
    assert not lines.reader_left


def test_a_file_that_cannot_be_created_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        JsonLines(tmp_path / "missing" / "lines.jsonl").write("a\n")
    assert caught.value.filename == str(tmp_path / "missing" / "lines.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named():
    lines = JsonLines(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left") as caught:
        lines.write("a\n")
    assert caught.value.filename == "/dev/full"
    lines.close()
    assert not lines.reader_left


class ClosedPipe(io.StringIO):
    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_left(monkeypatch):
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    lines = JsonLines(None)
    with pytest.raises(BrokenPipeError):
        lines.write("a\n")
    assert lines.reader_left
