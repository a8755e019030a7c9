"""`python -m bench.coverage.files`: every network of the list as an ONNX file of torch's, differentiated and judged."""

import json
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from bench.coverage.__main__ import PACKAGES, measured, read
from bench.coverage.models import inputs, make, names
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.backends.onnx.source.verify import USUAL_GRADIENT_ERROR, judge_layer
from heatlens_server.config import ModelConfig

LARGE_PX, LARGE_PARAMETERS = 300, 100_000_000
"""Networks beyond either are left out: exporting one takes minutes."""

_HEAD = """# ONNX files: which networks can be differentiated

Written by `python -m bench.coverage.files`: {versions}.

Every network has random weights and is exported as people do it, by `torch.onnx.export` to opset 17.
The file is found, differentiated and judged as a server does it with `source = "onnx:FILE"`.

- *layer*: the tensor that maps explain by default.
- *gradient*: how far the gradient by it is off from differences in float64, relative to its length.
- *logits*: how far the file's, in onnxruntime, are off from PyTorch's in float64, relative to the largest.
- *batches*: whether the file takes several images at once.
- *CPU s*: from the file to the judged gradient.

Networks of more than {parameters} million parameters or {px} pixels are left out.

{summary}

| network | layer | gradient | logits | batches | CPU s |
|---|---|---|---|---|---|
{rows}"""


def measure(source: str) -> dict[str, Any]:
    """Export one network, differentiate the file, judge the gradient."""
    warnings.simplefilter("ignore")
    try:
        model = make(source)
        parameters = sum(parameter.numel() for parameter in model.module.parameters())
        if parameters > LARGE_PARAMETERS or max(model.preprocess.input_px) > LARGE_PX:
            return {"source": source, "large": True}
        images = inputs(model, 1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            torch.onnx.export(
                model.module,
                (torch.from_numpy(images).float(),),
                str(path),
                input_names=["image"],
                dynamic_axes={"image": {0: "batch"}},
                opset_version=17,
                dynamo=False,
            )
            started = time.process_time()
            loaded = load_file(path, ModelConfig(name="m", source=f"onnx:{path}"))
            layer = loaded.info.layers[0]
            verdict = None if loaded.info.refusals else judge_layer(loaded, layer.name)
            seconds = time.process_time() - started
            logits = _logits(model.module, images, path)
    except Exception as error:  # whatever it is belongs in the table
        return {"source": source, "reason": f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0][:200]}
    return {
        "source": source,
        "layer": f"`{layer.name}` {layer.channels}x{layer.height}x{layer.width}",
        "refused": next(iter(loaded.info.refusals.values()), ""),
        "gradient": None if verdict is None else verdict.gradient_error,
        "logits": logits,
        "batches": loaded.info.takes_batches,
        "seconds": round(seconds, 1),
    }


def _logits(module: torch.nn.Module, images: np.ndarray, path: Path) -> float:
    import onnxruntime  # noqa: PLC0415 - forked processes import their own

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": images.astype(np.float32)})[0]
    with torch.inference_mode():
        expected = module.double()(torch.from_numpy(images).double()).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main(
    results: Annotated[
        Path, typer.Option(help="Where results are kept; networks that are in it are not run again.")
    ] = (Path("out/onnx-files.jsonl")),
    output: Annotated[Path, typer.Option(help="The table.")] = Path("docs/onnx-coverage.md"),
    timeout_s: Annotated[float, typer.Option(help="Longest time for one network, in seconds.")] = 600.0,
    table_only: Annotated[bool, typer.Option(help="Run nothing, write the table.")] = False,
) -> None:
    """Measure every network of the list, and write the table."""
    console = Console(stderr=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    known = read(results)
    for source in [] if table_only else names():
        if source not in known:
            known[source] = measured(source, timeout_s, measure)
            with results.open("a") as file:
                file.write(json.dumps(known[source]) + "\n")
            console.print(f"{len(known)} {known[source]}", soft_wrap=True)
    output.write_text(render([known[source] for source in names() if source in known]))
    console.print(f"wrote {output}")


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown."""
    from importlib.metadata import version  # noqa: PLC0415 - for one line

    shown = [result for result in results if not result.get("large")]
    judged = [result for result in shown if result.get("gradient") is not None]
    right = [result for result in judged if result["gradient"] <= USUAL_GRADIENT_ERROR]
    exported = [result for result in shown if "reason" not in result]
    summary = (
        f"{len(shown)} networks; {len(exported)} were exported by torch and read; {len(judged)} of them are "
        f"differentiated and judged, {len(right)} within {USUAL_GRADIENT_ERROR:g}."
    )
    return _HEAD.format(
        versions=", ".join(f"{name} {version(name)}" for name in PACKAGES),
        parameters=LARGE_PARAMETERS // 10**6,
        px=LARGE_PX,
        summary=summary,
        rows="".join(_row(result) for result in shown),
    )


def _row(result: Mapping[str, Any]) -> str:
    if "reason" in result:
        return f"| {result['source']} | {result['reason'].replace('|', '/')} | | | | |\n"
    gradient = result["refused"] if result["gradient"] is None else f"{result['gradient']:.0e}"
    batches = "yes" if result["batches"] else "one by one"
    return (
        f"| {result['source']} | {result['layer']} | {gradient} | {result['logits']:.0e} | {batches} "
        f"| {result['seconds']} |\n"
    )


if __name__ == "__main__":
    typer.run(main)
