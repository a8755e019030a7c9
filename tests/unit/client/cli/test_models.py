"""The table of `heatlens models`."""

from heatlens import ModelInfo, ModelState
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
    lines = [line.split(None, 7) for line in _as_table((beside, alone, old)).splitlines()]
    assert lines[0] == ["NAME", "STATE", "TASK", "INPUT", "CLASSES", "ENGINE", "DEVICE", "METHODS"]
    assert lines[1][:6] == ["a*", "ready", "classification", "64x32", "10", "onnxruntime"]
    assert lines[1][7] == "fp32  cam grad-cam | torch: shapley-cam | torch, in steps: score-cam"
    assert lines[2][:4] == ["b", "ready", "segmentation", "any"]
    assert lines[2][7] == "fp32  cam shapley-cam grad-cam | in steps: score-cam"
    assert lines[3][7] == "fp32  cam shapley-cam score-cam grad-cam"
    guessed = info("e", assumptions=("one output: taken as binary classification; task overrides",))
    assert _as_table((alone, guessed)).splitlines()[3:] == [f"e: {guessed.assumptions[0]}"]
    assert _as_table((failed,)).splitlines()[1].split() == ["d", "failed:", "gone", *"------"]
