"""From models to messages: what they take and give, their states, and what they did."""

import dataclasses
import json

import pytest

from explain_requests import TINY
from heatlens_server.config import ModelConfig
from heatlens_server.fleet.served_model import ModelState, ModelStatus
from heatlens_server.telemetry.statistics import ModelCounts, Total
from heatlens_server.transports.grpc.v2 import inference_pb2 as pb
from heatlens_server.transports.grpc.v2.models import config_of, index_of, metadata_of, statistics_of

LABELED = dataclasses.replace(TINY, labels=("cat", "Bär\n2"), max_batch_size=7, max_delay_s=0.0025)


def test_metadata():
    told = metadata_of(TINY, ["0", "1"])
    assert (told.name, list(told.versions), told.platform) == ("tiny", ["0", "1"], "heatlens")
    assert [(one.name, one.datatype, list(one.shape)) for one in told.inputs] == [
        ("IMAGE", "UINT8", [-1, -1, -1, 3]),
        ("TARGET_CLASS", "INT64", [-1, -1]),
    ]
    assert [(one.name, one.datatype, list(one.shape)) for one in told.outputs] == [
        ("MAP", "FP32", [-1] * 4),
        ("CLASS_ID", "INT32", [-1] * 2),
        ("SCORE", "FP32", [-1] * 2),
        ("LABEL", "BYTES", [-1] * 2),
    ]


def test_a_configuration_lacks_the_side_of_the_images():
    told = config_of(LABELED)
    assert (told.name, told.platform, told.backend, told.max_batch_size) == ("tiny", "heatlens", "torch", 7)
    assert told.dynamic_batching.max_queue_delay_microseconds == 2500
    assert [(one.name, pb.DataType.Name(one.data_type), list(one.dims), one.optional) for one in told.input] == [
        ("IMAGE", "TYPE_UINT8", [-1, -1, 3], False),
        ("TARGET_CLASS", "TYPE_INT64", [-1], True),
    ]
    assert [one.format for one in told.input] == [pb.ModelInput.FORMAT_NHWC, pb.ModelInput.FORMAT_NONE]
    assert [(one.name, pb.DataType.Name(one.data_type), list(one.dims)) for one in told.output] == [
        ("MAP", "TYPE_FP32", [-1] * 3),
        ("CLASS_ID", "TYPE_INT32", [-1]),
        ("SCORE", "TYPE_FP32", [-1]),
        ("LABEL", "TYPE_STRING", [-1]),
    ]


def test_a_configuration_tells_what_is_known_of_the_model():
    told = {name: one.string_value for name, one in config_of(LABELED).parameters.items()}
    assert (told["task"], told["default_method"]) == ("classification", "grad-cam")
    assert json.loads(told["labels"]) == ["cat", "Bär\n2"]
    assert json.loads(told["layers"]) == ["body", "stem"]
    assert {"grad-cam", "layer-cam"} <= set(json.loads(told["methods"]))


def status(name, state, message=""):
    return ModelStatus(ModelConfig(name=name, source="torchvision:resnet18", version="7"), state, message=message)


FLEET = [
    status("loading", ModelState.LOADING),
    status("ready", ModelState.READY),
    status("failed", ModelState.FAILED, "why"),
    status("hung", ModelState.UNAVAILABLE, "it hangs"),
    status("idle", ModelState.IDLE),
    status("gone", ModelState.IDLE, "its file is gone"),
]


@pytest.mark.parametrize("ready", [False, True])
def test_an_index_tells_states_and_why(ready):
    found = [(one.name, one.version, one.state, one.reason) for one in index_of(FLEET, ready=ready).models]
    assert found == [
        one
        for one in (
            ("loading", "7", "LOADING", ""),
            ("ready", "7", "READY", ""),
            ("failed", "7", "UNAVAILABLE", "why"),
            ("hung", "7", "UNAVAILABLE", "it hangs"),
            ("idle", "7", "READY", "idle: the next request loads it"),
            ("gone", "7", "READY", "idle: the next request loads it; its file is gone"),
        )
        if one[2] == "READY" or not ready
    ]


def test_statistics_are_those_of_all_versions():
    counts = ModelCounts(
        answered=Total(3, 0.5), failed=Total(1, 0.25), decoded=Total(5, 0.001), queued=Total(4, 2.0),
        computed=Total(4, 1e-9), encoded=Total(4, 0.0), runs=2, last_at=1.5,
    )  # fmt: skip
    told = statistics_of("m", ["7"], counts)
    assert (told.name, told.version) == ("m", "7")
    assert (told.last_inference, told.inference_count, told.execution_count) == (1500, 4, 2)
    assert {field.name: (one.count, one.ns) for field, one in told.inference_stats.ListFields()} == {
        "success": (3, 500_000_000),
        "fail": (1, 250_000_000),
        "queue": (4, 2_000_000_000),
        "compute_input": (5, 1_000_000),
        "compute_infer": (4, 1),
        "compute_output": (4, 0),
    }
    assert statistics_of("m", ["7", "8"], counts).version == ""
