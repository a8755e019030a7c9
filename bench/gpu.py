"""The engines on an NVIDIA GPU: `python -m bench.gpu` writes docs/gpu-benchmarks.md."""

import copy
import dataclasses
import datetime
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from rich.console import Console

from bench.measure import FairQueue, take_turns
from bench.models import INPUT_PX, noise_images, resnet50
from heatlens_server.backends.onnx.manifest import read_manifest
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.stored import read_network
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.export.network import export_network
from heatlens_server.core.engine import Engine, MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import TopK

BATCH_SIZES = (1, 8, 32, 128)
DEVICE = "cuda:0"
GRAPHED, HALF_ORT = "torch forward fp16, CUDA graph", "onnxruntime engine fp16"
LEAST_OF_GRAPHED = {1: 1 / 1.1, 32: 1.0, 128: 1.2}
"""Throughput of the onnxruntime engine in fp16 over the CUDA graph's, by batch size: what is aimed at."""


def main(
    turns: Annotated[int, typer.Option(help="How often each candidate runs.")] = 20,
    output: Annotated[Path, typer.Option(help="The table.")] = Path("docs/gpu-benchmarks.md"),
) -> None:
    """Measure ResNet-50 on the first GPU and write the table."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no NVIDIA GPU that torch can use", param_hint="bench-gpu")
    with tempfile.TemporaryDirectory() as folder:
        engines = _engines(Path(folder))
        measured = {size: take_turns(_candidates(size, engines), turns=turns, warm_up=5) for size in BATCH_SIZES}
    page = _page(measured)
    output.write_text(page)
    Console().print(page)


def _engines(folder: Path) -> dict[str, Engine]:
    engines: dict[str, Engine] = {
        "torch engine fp16": TorchEngine(resnet50(), device=DEVICE, precision="fp16"),
    }
    for precision in ("fp32", "fp16"):
        of_precision = folder / precision
        of_precision.mkdir()
        manifest = export_network(
            dataclasses.replace(resnet50(), layers=("layer4",)),
            methods=(Method.GRAD_CAM,),
            precision=precision,
            source="bench",
            folder=of_precision,
            report=lambda _line: None,
        )
        manifest.write(of_precision)
        engines[f"onnxruntime engine {precision}"] = NetworkEngine(
            read_network(of_precision, read_manifest(of_precision)), device=DEVICE, provider="cuda"
        )
    return engines


def _candidates(batch_size: int, engines: Mapping[str, Engine]) -> dict[str, Callable[[], object]]:
    model = resnet50()
    half = copy.deepcopy(model.module).to(DEVICE, torch.float16).to(memory_format=torch.channels_last)
    inputs = torch.randn(batch_size, 3, INPUT_PX, INPUT_PX, device=DEVICE)
    half_inputs = inputs.half().to(memory_format=torch.channels_last)
    full = copy.deepcopy(model.module).to(DEVICE).requires_grad_(requires_grad=True)
    grad_cam = GradCAM(full, [full.layer4])
    images = noise_images(batch_size)
    spec = MapSpec(Method.GRAD_CAM, ("layer4",), upsample=False)

    def explain(engine: Engine) -> Callable[[], object]:
        return lambda: engine.explain(images, [TopK(1)] * batch_size, spec)

    def forward() -> None:
        with torch.inference_mode():
            half(half_inputs)
        torch.cuda.synchronize()

    return {
        "torch forward fp16, eager": forward,
        GRAPHED: _graphed(half, half_inputs),
        **{name: explain(engine) for name, engine in engines.items()},
        "grad-cam fp32": lambda: grad_cam(inputs, [ClassifierOutputTarget(0)] * batch_size),
    }


def _graphed(module: torch.nn.Module, inputs: torch.Tensor) -> Callable[[], None]:
    """A forward pass as one CUDA graph, warmed up on a side stream as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(3):
            module(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        module(inputs)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replay


def _page(measured: Mapping[int, FairQueue]) -> str:
    names = list(next(iter(measured.values())).seconds)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime-gpu", "grad-cam", "numpy"))
    today = datetime.date.today()  # noqa: DTZ011 - the reader's date
    lines = [
        "# On a GPU",
        "",
        f"Written by `make bench-gpu` on {today}: {torch.cuda.get_device_name(0)}, {versions}.",
        "",
        "ResNet-50, 224x224, images per second, medians of turns taken side by side. The engines take uint8 images",
        "from the host and return logits and Grad-CAM maps to it; the forward passes stay on the device.",
        "",
        "| batch | " + " | ".join(names) + " | onnxruntime fp16 / CUDA graph |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for size, turns in measured.items():
        speeds = [f"{size * 1e3 / turns.median_ms(name):,.0f}" for name in names]
        ratio = turns.ratio(GRAPHED, HALF_ORT)
        aim = LEAST_OF_GRAPHED.get(size)
        verdict = "" if aim is None else f" ({'met' if ratio >= aim else 'MISSED'} >= {aim:.2f})"
        lines.append(f"| {size} | " + " | ".join(speeds) + f" | {ratio:.2f}{verdict} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
