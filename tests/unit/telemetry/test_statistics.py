"""What models were asked: calls, frames, images and runs, by the model's name."""

import pytest

from heatlens_server.core.events import CallEnd
from heatlens_server.telemetry.statistics import ModelCounts, Statistics, Total


@pytest.fixture
def statistics():
    return Statistics(clock=lambda: 12.5)


def ended(duration_s, **fields):
    return CallEnd(method="/any/Call", request_id="7", peer="p", code="any", duration_s=duration_s, fields=fields)


def test_images_and_runs(statistics):
    for _ in range(2):
        statistics.decoded(model="m", duration_s=0.5, trace=None)
    statistics.batch_ended(model="m", device="cpu", size=2, failed=1, duration_s=3.0, traces=[])
    statistics.step_ended(model="m", device="cpu", duration_s=3.0, trace=None)
    statistics.explained(
        model="m", explanation="cam", queue_s=1.0, compute_s=2.0, encode_s=4.0, began_at=0.0, ended_at=0.0, trace=None
    )
    assert statistics.of("m") == ModelCounts(
        decoded=Total(2, 1.0), queued=Total(1, 1.0), computed=Total(1, 2.0), encoded=Total(1, 4.0), runs=2, last_at=12.5
    )
    assert statistics.of("other") == ModelCounts()


def test_calls_and_frames(statistics):
    statistics.answered(ended(1.0, model="m"))
    statistics.refused(ended(2.0, model="m"))
    for outcome in ("explained", "failed", "dropped", "skipped"):
        statistics.frame_answered(model="m", outcome=outcome, age_s=4.0, trace=None)
    assert statistics.of("m") == ModelCounts(answered=Total(2, 5.0), failed=Total(2, 6.0))


def test_a_stream_is_its_frames_and_calls_about_no_model_are_nobodys(statistics):
    statistics.answered(ended(1.0, model="m", frames_explained=3))
    statistics.refused(ended(1.0, model=""))
    statistics.answered(ended(1.0))
    statistics.frame_answered(model="", outcome="failed", age_s=4.0, trace=None)
    assert statistics.of("m") == statistics.of("") == ModelCounts()
