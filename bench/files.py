"""ONNX files: an explanation against the forward pass of the same file, and what it takes to become ready."""

import dataclasses
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from bench.engine import Target
from bench.measure import FairQueue, take_turns
from bench.models import INPUT_PX, efficientnet_lite0, noise_images, resnet50
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.providers import load_runtime, session_options
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import TopK

MODELS: tuple[Callable[[], LoadedModel], ...] = (efficientnet_lite0, resnet50)
FORWARD, EXPLAIN, FIVE, MIDDLE = "forward", "explain", "5 classes", "28x28 layer"
RATIOS = (
    Target("explain / forward, batch 8", EXPLAIN, FORWARD, most=1.05, batch_sizes=(8,)),
    Target("explain / forward, batch 1", EXPLAIN, FORWARD, most=1.08, batch_sizes=(1,)),
    Target("5 classes / forward", FIVE, FORWARD, most=1.10, batch_sizes=(8,)),
    Target("28x28 layer / forward", MIDDLE, FORWARD, most=2.4, batch_sizes=(8,)),
)
STARTS = 3
_MOST_START_S, _MOST_READY_CPU_S, _MOST_IMPORT_CPU_S, _MOST_PEAK = 3.0, 2.0, 0.8, 4.0

# Imports what a server imports, reads a file, answers once; tells seconds and memory.
_PROGRAM = """
import json, re, sys, time
def status_bytes(key):
    # Of this process alone: getrusage's begins with that of the one that started it.
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
begun_s = time.perf_counter()
import heatlens_server.app
imported_cpu_s = time.process_time()
assert "torch" not in sys.modules
from heatlens_server.config import ModelConfig
from heatlens_server.fleet.build import build
import heatlens_server.backends.onnx.source.load
imported_bytes = status_bytes("VmRSS")
built = build(ModelConfig(name="m", source="onnx:" + sys.argv[1]), cache_dir=None, report=lambda line: None)
assert "torch" not in sys.modules
print(json.dumps({
    "import_cpu_s": imported_cpu_s,
    "ready_cpu_s": time.process_time() - imported_cpu_s,
    "start_s": time.perf_counter() - begun_s,
    "peak_bytes": status_bytes("VmHWM") - imported_bytes,
}))
"""


def run(*, turns: int) -> list[Table]:
    """Measure and tabulate."""
    ratios = Table(
        title="ONNX files: wall time against the forward pass of the same file, same session options, medians"
    )
    starts = Table(title=f"ONNX files: a fresh process until the first answer, medians of {STARTS}")
    for column in ("model", *(f"{target.name} {target.bound}" for target in RATIOS)):
        ratios.add_column(column, justify="right")
    for column in (
        "model",
        "file MB",
        f"import <= {_MOST_IMPORT_CPU_S} CPU-s",
        f"file to ready <= {_MOST_READY_CPU_S} CPU-s",
        f"start to first answer <= {_MOST_START_S} s",
        f"peak above imports / file <= {_MOST_PEAK}",
    ):
        starts.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for make in MODELS:
            path = _export(make(), Path(folder, f"{make.__name__}.onnx"))
            measured = {batch_size: _measure(path, batch_size, turns=turns) for batch_size in (1, 8)}
            ratios.add_row(make.__name__, *(_ratio(target, measured) for target in RATIOS))
            starts.add_row(make.__name__, *_start(path))
    return [ratios, starts]


def _export(model: LoadedModel, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.module,
            (torch.zeros(1, 3, INPUT_PX, INPUT_PX),),
            str(path),
            input_names=["image"],
            dynamic_axes={"image": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    return path


def _measure(path: Path, batch_size: int, *, turns: int) -> FairQueue:
    loaded = load_file(path, ModelConfig(name="m", source=f"onnx:{path}", preprocess={"crop_px": INPUT_PX}))
    engine = NetworkEngine(loaded, device="cpu")
    runtime = load_runtime()
    session = runtime.InferenceSession(
        str(path), session_options(runtime, threads=None), providers=["CPUExecutionProvider"]
    )
    images = noise_images(batch_size)
    given = engine.inputs(images)
    middle = next(layer.name for layer in loaded.info.layers if layer.height == 28)
    spec = MapSpec(Method.GRAD_CAM, (loaded.info.layers[0].name,), upsample=False)
    by_middle = dataclasses.replace(spec, layers=(middle,))

    def explain(spec: MapSpec, classes: int) -> object:
        return engine.explain(images, [TopK(classes)] * batch_size, spec)

    repeats = max(1, 16 // batch_size)
    candidates: Mapping[str, Callable[[], object]] = {
        FORWARD: partial(session.run, None, {session.get_inputs()[0].name: given}),
        EXPLAIN: partial(explain, spec, 1),
        FIVE: partial(explain, spec, 5),
        MIDDLE: partial(explain, by_middle, 1),
    }
    return take_turns({name: _repeated(once, repeats) for name, once in candidates.items()}, turns=turns)


def _repeated(once: Callable[[], object], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            once()

    return run


def _ratio(target: Target, measured: Mapping[int, FairQueue]) -> str:
    ratio = measured[target.batch_sizes[0]].ratio(target.of, target.to)
    return f"{ratio:.3f} {'met' if target.met(ratio) else 'MISSED'}"


def _start(path: Path) -> list[str]:
    """Seconds and memory of fresh processes."""
    runs = []
    for _ in range(STARTS):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _PROGRAM, str(path)], check=True, capture_output=True, text=True
        )
        runs.append(json.loads(done.stdout))
    median = {name: sorted(run[name] for run in runs)[STARTS // 2] for name in runs[0]}
    size_bytes = path.stat().st_size

    def cell(value: float, most: float) -> str:
        return f"{value:.2f} {'met' if value <= most else 'MISSED'}"

    return [
        f"{size_bytes / 1e6:.0f}",
        cell(median["import_cpu_s"], _MOST_IMPORT_CPU_S),
        cell(median["ready_cpu_s"], _MOST_READY_CPU_S),
        cell(median["start_s"], _MOST_START_S),
        cell(median["peak_bytes"] / size_bytes, _MOST_PEAK),
    ]
