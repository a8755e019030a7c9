"""The table of `heatlens models`."""

import re

from heatlens import DeviceInfo, ModelInfo, ModelState
from heatlens._cli.models import _as_table


def info(name: str, **changes) -> ModelInfo:
    fields = {
        "name": name,
        "version": "1",
        "is_default": False,
        "state": ModelState.READY,
        "state_message": "",
        "task": "classification",
        "input_height_px": 32,
        "input_width_px": 64,
        "class_count": 10,
        "methods": ("cam", "shapley-cam", "score-cam", "grad-cam"),
        "default_method": "grad-cam",
        "layers": ("body",),
        "engine": "onnxruntime",
        "device": "cpu",
        "precision": "fp32",
        "max_batch_size": 1,
        "max_queue_delay_ms": 0.0,
    }
    return ModelInfo(**{**fields, **changes})


def test_the_table_says_what_a_model_does_and_what_runs_each_method_and_how():
    engines = {"cam": "onnxruntime", "grad-cam": "onnxruntime", "shapley-cam": "torch", "score-cam": "torch"}
    beside = info("a", is_default=True, method_engines=engines, methods_in_steps=("score-cam",))
    torch = {"engine": "torch", "method_engines": dict.fromkeys(engines, "torch"), "methods_in_steps": ("score-cam",)}
    alone = info("b", task="segmentation", input_height_px=0, input_width_px=0, **torch)
    old = info("c")
    unknown = {"task": "", "input_height_px": 0, "input_width_px": 0, "class_count": 0, "methods": (), "engine": ""}
    failed = info("d", state=ModelState.FAILED, state_message="gone", device="", precision="", **unknown)
    lines = [line.split(None, 8) for line in _as_table((beside, alone, old)).splitlines()]
    assert lines[0] == ["NAME", "VERSION", "STATE", "TASK", "INPUT", "CLASSES", "ENGINE", "DEVICE", "METHODS"]
    assert lines[1][:7] == ["a*", "1", "ready", "classification", "64x32", "10", "onnxruntime"]
    assert lines[1][8] == "fp32  cam grad-cam | torch: shapley-cam | torch, in steps: score-cam"
    assert lines[2][:5] == ["b", "1", "ready", "segmentation", "any"]
    assert lines[2][8] == "fp32  cam shapley-cam grad-cam | in steps: score-cam"
    assert lines[3][8] == "fp32  cam shapley-cam score-cam grad-cam"
    guessed = info("e", assumptions=("one output: taken as binary classification; task overrides",))
    assert _as_table((alone, guessed)).splitlines()[3:] == [f"e: {guessed.assumptions[0]}"]
    assert _as_table((failed,)).splitlines()[1].split() == ["d", "1", "failed:", "gone", *"------"]


def test_versions_are_listed_with_the_default_one_and_the_shares_of_others():
    old, new = info("a", is_default=True), info("a", version="2", is_default_version=False, weight=0.1)
    lines = _as_table((old, new, info("b", version=""))).splitlines()
    assert [re.split("  +", line)[:2] for line in lines[1:]] == [["a*", "1*"], ["a", "2 10%"], ["b", "-"]]


def test_the_table_says_which_devices_are_out():
    devices = DeviceInfo("cuda:0", in_service=True), DeviceInfo("cuda:1", in_service=False, message="its runs fail")
    row = _as_table((info("a", devices=devices),)).splitlines()[1]
    assert row.split()[2:10] == ["ready,", "degraded:", "cuda:1", "is", "out:", "its", "runs", "fail"]
    assert "cuda:0, cuda:1 fp32" in row
    assert "degraded" not in _as_table((info("a", devices=devices[:1]),))
