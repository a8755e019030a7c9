"""Whether an export says what the network says: measured on real photos, in the export's own runtime, from disk.

The reference is the network in float64, run with hooks and autograd and none of the exporter's code. The network in the
graph's own precision is measured against it as well: what rounding alone does to it, it may do to the graph too.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from heatlens_server.backends.onnx.manifest import Manifest
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.stored import FORWARD_FILE, read_network
from heatlens_server.backends.torch.export.judge import Figure, LayerJudge, Plan
from heatlens_server.backends.torch.export.reference import (
    Network,
    Reference,
    moved_copies,
    one_thread_for_grouped_convs,
)
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.errors import ExportError, ModelLoadError
from heatlens_server.core.graph_spec import Output
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Activation
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.preprocess import fit

PHOTOS = ("chelsea.jpg", "coffee.jpg", "astronaut.jpg", "rocket.jpg")
"""What exports are verified on: noise would not tell a good map from a bad one."""

_MAX_PHOTO_PIXELS = 1_000_000

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def verify(model: LoadedModel, folder: Path, manifest: Manifest, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Run every graph of an export and compare what it returns with the network in float64.

    A graph is wrong if

    - it does not run;
    - of logits, activations, gradients averaged over each channel, maps or their scales, for the most probable classes
      of photos in batches of sizes that were not traced, one is not finite or off by more than `Tolerance.bound`;
    - classes are not ranked by the logits, or the map of no class is not empty;
    - the layer has maps that are not flat, and the network itself misses them all by more than `Tolerance.unknown`:
      then nothing was compared.

    A map that is flat in float64, as all are behind a head of zeros, proves nothing. Maps of activations alone are
    right even if the backward pass is wrong: where a layer has others, they do not count as compared.

    Where the only graph of an export is off by more than its bound, the network is asked again, with every weight moved
    by two units in the last place: the bound is by the most that it then misses, and what it misses by more than
    `Tolerance.unknown` is not compared.

    Args:
        model: what was exported; left as it was. Its copy in float64 is freed again.
        folder: of the export.
        manifest: of the export; its parity is not looked at.
        report: told each phase, what is left out, and when all maps are flat.

    Returns:
        What `Manifest.parity` holds: "judge", "photos", "batch_sizes", "compared_maps", "informative_maps", "figures",
        by output the fields of `Figure`, and "left_out", of each wrong graph "layer", "method" and "reason".

    Raises:
        ExportError: all graphs of the default layer are wrong, with the reason of the first: it names figure, value and
            bound. Or the network does not give the same logits and activations for the same photos twice, and in other
            batches.
    """
    with one_thread_for_grouped_convs(model.module):
        return _verify(model, _plan(model, folder, manifest), report)


def load_photos(preprocess: PreprocessSpec) -> npt.NDArray[np.uint8]:
    """Return four real photos at a model's input size: uint8 (4, H, W, C), of its channels, C-contiguous."""
    folder = files("heatlens_server.backends.torch.export") / "photos"
    images = [decode_image((folder / name).read_bytes(), max_pixels=_MAX_PHOTO_PIXELS) for name in PHOTOS]
    fitted = np.stack([fit(image.values, preprocess).pixels for image in images])
    # Networks of other channels get those of colours, in turn.
    return np.ascontiguousarray(fitted[..., np.arange(preprocess.channels) % fitted.shape[-1]])


def _plan(model: LoadedModel, folder: Path, manifest: Manifest) -> Plan:
    # A server's export has dozens of graphs: fewer images each.
    single = len(manifest.graphs) == 1
    photos = load_photos(manifest.preprocess)[: 4 if single else 2]
    depth = min(3 if single else 2, model.class_count, manifest.classes or model.class_count)
    batches, start = [], 0
    for size, classes in ((1, 3), (3, 1), (4, 2)) if single else ((1, 2), (3, 1)):
        # A graph of any number of classes is asked for different numbers.
        batches.append((slice(start, start + size), depth if manifest.classes else min(classes, depth)))
        start += size
    # What people export is a graph with its maps, and passes beside it.
    engine = _engine(folder, manifest) if manifest.graphs[0].file == FORWARD_FILE else None
    return Plan(manifest, folder, np.concatenate([photos, photos[:, :, ::-1]]), depth, tuple(batches), engine)


def _engine(folder: Path, manifest: Manifest) -> NetworkEngine:
    """The engine that a stored network is served by.

    Raises:
        ExportError: it cannot be run.
    """
    try:
        return NetworkEngine(read_network(folder, manifest), device="cpu")
    except ModelLoadError as error:
        raise ExportError(str(error)) from error


def _verify(model: LoadedModel, plan: Plan, report: Callable[[str], None]) -> dict[str, Any]:
    manifest, asked = plan.manifest, plan.asked
    report("running the network in float64")
    references, own = _references(model, plan)
    worst: dict[str, Figure] = {}
    left_out: list[dict[str, str]] = []
    compared = informative = shaped = 0
    for layer in manifest.layers:
        report(f"verifying layer {layer}")
        # One forward and backward pass serves all layers and methods. Gradients of early layers are large: let go.
        judge = LayerJudge(
            plan,
            layer,
            reference=references.pop(layer),
            own=own.pop(layer, None),
            run_moved=partial(_run_moved, model, plan, layer),
            report=report,
        )
        found, wrong = judge.judged()
        if layer == manifest.layers[0] and not found:
            raise ExportError(next(iter(wrong.values())))
        for method, reason in wrong.items():
            report(f"left out: {reason}")
            left_out.append({"layer": layer, "method": str(method), "reason": reason})
        for one in found.values():
            for name, figure in one.figures.items():
                if name not in worst or figure.error / figure.bound > worst[name].error / worst[name].bound:
                    worst[name] = figure
            if Output.CAM in one.figures:
                compared += int(asked.sum())
                informative += int((one.truth.informative & asked).sum())
            shaped += one.shaped(asked)
    if compared and not shaped:
        report("warning: no map could be compared, all are flat in float64 too: is the model trained?")
    return {
        "judge": "float64",
        "photos": list(PHOTOS[: len(plan.pixels) // 2]),
        "batch_sizes": [rows.stop - rows.start for rows, _ in plan.batches],
        "compared_maps": compared,
        "informative_maps": informative,
        "figures": {name: asdict(figure) for name, figure in worst.items()},
        "left_out": left_out,
    }


def _references(model: LoadedModel, plan: Plan) -> tuple[dict[str, Reference], dict[str, Reference]]:
    """What the network says, by layer: in float64, and in the graphs' precision (nothing if it cannot)."""
    layers = plan.manifest.layers
    # Before anything is compared with it.
    Network(model, torch.float32).check_steady(plan.pixels, layers)
    score, sigmoid = plan.manifest.graphs[0].score, model.task.traits.activation is Activation.SIGMOID
    references = Network(model, torch.float64).explain(plan.pixels, layers, plan.depth, score=score, sigmoid=sigmoid)
    for reference in references.values():
        if not all(bool(tensor.isfinite().all()) for tensor in (reference.logits, reference.gradients)):
            raise ExportError("the network gives scores or gradients that are not finite: are its weights right?")
    own = Network(model, _DTYPES[plan.manifest.precision])
    class_ids = references[layers[0]].class_ids
    try:
        return references, own.explain(plan.pixels, layers, class_ids, score=score, sigmoid=sigmoid)
    except ExportError:
        # Not every operator has a half precision kernel on CPUs.
        if plan.manifest.precision == "fp32":
            raise
        return references, {}


def _run_moved(model: LoadedModel, plan: Plan, layer: str, reference: Reference) -> list[Reference]:
    """What copies of the network with moved weights say about a layer and the reference's classes."""
    score, sigmoid = plan.manifest.graphs[0].score, model.task.traits.activation is Activation.SIGMOID
    return [
        Network(replace(model, module=module), torch.float32).explain(
            plan.pixels, [layer], reference.class_ids, score=score, sigmoid=sigmoid
        )[layer]
        for module in moved_copies(model.module)
    ]
