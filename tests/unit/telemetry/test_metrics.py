"""What metrics count of events that a test of a real server does not make at will."""

import pytest

from heatlens_server.core.events import CallEnd
from heatlens_server.telemetry.metrics import Metrics


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"heatlens_{name}", labels)


def test_images_that_fail_in_a_batch_are_counted_and_the_device_was_busy(metrics):
    for failed in (0, 2):
        metrics.batch_ended(model="m", device="cpu", size=4, failed=failed, duration_s=0.25, traces=())
    metrics.step_ended(model="m", device="cpu", duration_s=0.5, trace=None)
    assert value(metrics, "images_failed_total", model="m") == 2
    assert value(metrics, "batch_size_images_sum", model="m") == 8
    assert value(metrics, "device_busy_seconds_total", model="m", device="cpu") == 1.0
    assert value(metrics, "steps_total", model="m") == 1


def test_loads_are_timed_and_looked_up_only_where_there_is_an_export(metrics):
    for cached in (None, False, True, True):
        metrics.model_built(model="m", duration_s=2.0, cached=cached)
    assert value(metrics, "model_load_duration_seconds_sum", model="m") == 8.0
    assert value(metrics, "export_cache_lookups_total", model="m", result="miss") == 1
    assert value(metrics, "export_cache_lookups_total", model="m", result="hit") == 2


def test_only_explained_frames_have_an_age(metrics):
    for outcome in ("explained", "skipped", "dropped", "failed"):
        metrics.frame_answered(model="m", outcome=outcome, age_s=0.02, trace=None)
        assert value(metrics, "frames_total", model="m", outcome=outcome) == 1
    assert value(metrics, "frame_age_seconds_count", model="m") == 1
    assert value(metrics, "frame_age_seconds_bucket", model="m", le="0.01") == 0
    assert value(metrics, "frame_age_seconds_bucket", model="m", le="0.025") == 1


def test_a_call_that_names_no_model_has_empty_labels(metrics):
    metrics.refused(CallEnd("/heatlens.v1.ModelService/ListModels", "id", "peer", "UNAUTHENTICATED", 0.1))
    labels = {"rpc": "ListModels", "model": "", "explanation": "", "code": "UNAUTHENTICATED"}
    assert value(metrics, "calls_total", **labels) == 1
    assert value(metrics, "call_duration_seconds_sum", rpc="ListModels", model="") == 0.1
