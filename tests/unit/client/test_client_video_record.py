"""What is kept of the answers, with a source and answers made by hand."""

import io
import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from heatlens import Explanation, Heatmap, InternalError, PixelBox, ResourceExhaustedError, Result, Timing
from heatlens._results.results import FRAME_DROPPED, FrameResult
from heatlens._video.quiet import silence
from heatlens._video.record import Record, Status
from heatlens._video.source import VideoFrame

silence()

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


def read(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (found := capture.read())[0]:
        frames.append(found[1])
    return frames


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
    assert written[0] == {
        "frame_id": 0,
        "time_s": 0.0,
        "status": "explained",
        "classes": [{"id": 3, "label": "cat", "probability": 0.5}],
        "error": None,
        "latency_ms": 12.346,
        "timing": {"queue_ms": 1, "preprocess_ms": 2, "compute_ms": 3, "batch_size": 4},
    }
    assert written[3]["error"] == {"code": "INTERNAL", "reason": "OOPS", "message": "oh"}
    assert written[2]["error"]["reason"] == "FRAME_DROPPED"
    assert written[1]["classes"] == []
    assert (record.frames, record.codec) == (4, None)
    assert record.counts == dict.fromkeys(Status, 1)


def test_the_last_map_is_held_until_a_frame_fails(make_record, tmp_path):
    record = make_record()
    kinds = ["dropped", "explained", "skipped", "dropped", "failed", "skipped", "explained"]
    for index, kind in enumerate(kinds):
        record.add(frame(index, index / 10), answer(kind))
    record.close()
    record.close()
    assert [is_red(picture) for picture in read(tmp_path / "film.mp4")] == [
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
    plain, failed = read(tmp_path / "film.mp4")
    assert plain[:12].max() < GRAY + 15
    assert failed[:12].max() > 150
    np.testing.assert_allclose(failed[30:], GRAY, atol=8)


def test_a_live_source_is_filmed_at_its_own_pace(make_record, tmp_path):
    record = make_record(live=True, fps=10.0)
    # One frame late, one early.
    for index, time_s in enumerate([0.0, 0.1, 0.52, 0.54, 0.6]):
        record.add(frame(index, time_s), answer("explained"))
    record.close()
    assert len(read(tmp_path / "film.mp4")) == 7


def test_no_answer_no_file(make_record, tmp_path):
    make_record().close()
    assert list(tmp_path.iterdir()) == []
