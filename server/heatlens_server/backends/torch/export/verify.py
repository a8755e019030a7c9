"""Whether an export says what the network says: measured on real photos, in the export's own runtime, from disk.

The judge is the network in float64, run with hooks and autograd and none of the exporter's code. The network in the
graph's own precision is measured against the same judge: what rounding alone does to it, it may do to the graph too.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from heatlens_server.backends.onnx.manifest import Manifest
from heatlens_server.backends.torch.export.comparison import PER_CLASS, WEIGHTS, Array, Truth, outputs_of, truth
from heatlens_server.backends.torch.export.evidence import Evidence, telling
from heatlens_server.backends.torch.export.photos import PHOTOS, load_photos
from heatlens_server.backends.torch.export.reference import Network, Reference, unhurried
from heatlens_server.backends.torch.export.runtimes import Run, open_graph
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import InputKind, Output
from heatlens_server.core.methods import ABSENT, RANKED, Method
from heatlens_server.core.tasks import Task
from heatlens_server.imaging.preprocess import normalise

TOLERANCES = {"fp32": 1e-4, "fp16": 0.02}
"""By precision: what any figure may differ from float64 by."""

ROUNDING_FACTOR = 4.0
"""A figure may also differ by so many times what the network itself does in the graph's precision, up to a cap."""

FORWARD_CAPS = {"fp32": 1e-3, "fp16": 0.1}
"""By precision: what rounding can excuse in logits and activations at most."""

CLASS_CAPS = {"fp32": 0.02, "fp16": 0.2}
"""By precision: the same for what comes of gradients, which jump where a ReLU or a maximum is about to switch."""

UNKNOWN = {"fp32": 0.01, "fp16": 0.1}
"""By precision: what the network itself misses by more, of an image and class, is not compared: no graph knows it."""

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Figure:
    """The worst of one output, over all graphs.

    Attributes:
        error: largest difference from float64: absolute for cam, relative to the image's largest magnitude for others.
        torch_error: the same of the network in the graph's precision; 0 if it cannot run there.
        bound: what `error` may be.
        graph: the file.
    """

    error: float
    torch_error: float
    bound: float
    graph: str

    @property
    def share(self) -> float:
        """How much of what is allowed the error takes up."""
        return self.error / self.bound


@dataclass(frozen=True, slots=True)
class _Batch:
    """One run of a graph.

    Attributes:
        rows: which of the images.
        columns: for each class explained, which of the judged ones it is.
    """

    rows: slice
    columns: npt.NDArray[np.intp]

    @property
    def size(self) -> int:
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What every graph of an export is run on.

    Attributes:
        manifest: of the export.
        folder: of the export.
        shown: how many of the photos.
        pixels: uint8 (N, H, W, 3): those photos, and mirrored.
        depth: classes per image that are judged.
        batches: in one order for all graphs; together all of the images.
    """

    manifest: Manifest
    folder: Path
    shown: int
    pixels: npt.NDArray[np.uint8]
    depth: int
    batches: tuple[_Batch, ...]

    @property
    def reached(self) -> npt.NDArray[np.bool_]:
        """Of which images (N) which judged classes (depth) the batches ask for."""
        reached = np.zeros((len(self.pixels), self.depth), np.bool_)
        for batch in self.batches:
            reached[batch.rows, batch.columns] = True
        return reached

    def image(self, rows: slice) -> Array:
        """The graphs' input."""
        pixels, spec = self.pixels[rows], self.manifest.preprocess
        if self.manifest.input is InputKind.UINT8:
            return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return np.stack([normalise(image, spec.mean, spec.std) for image in pixels])


def verify(model: LoadedModel, folder: Path, manifest: Manifest, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Run every graph of an export and compare what it returns with the network in float64.

    Compared are logits, activations, gradients averaged over each channel, and maps with their scales, for the most
    probable classes of real photos in batches of sizes that were not traced; also whether a graph ranks its classes by
    their logits, and gives an empty map where no class is wanted. First the network itself, in float32, has to give the
    same for the same photo twice and in other batches.

    A figure may differ by its tolerance (`TOLERANCES`), or by `ROUNDING_FACTOR` times what the network itself does in
    the graph's precision, but never by more than `FORWARD_CAPS` (logits, activations) or `CLASS_CAPS` (all others). A
    map that is flat in float64, as all are behind a head of zeros, or that the network itself misses by more than
    `UNKNOWN`, proves nothing: how many others were compared is part of the result. Of every layer whose maps are not
    all flat there has to be one.

    Args:
        model: what was exported; left as it was. Its copy in float64 is freed again.
        folder: of the export.
        manifest: of the export; its parity is not looked at.
        report: told each phase, and when all maps are flat.

    Returns:
        What `Manifest.parity` holds: "judge", "photos", "batch_sizes", "compared_maps", "informative_maps" and
        "figures", by output the fields of `Figure`.

    Raises:
        ExportError: the network is not the same in every run, a graph cannot be run, a figure is not finite or exceeds
            its bound (the message names figure, value and bound), or nothing of a layer could be compared.
    """
    with unhurried(model.module):
        return _verify(model, _plan(model, folder, manifest), report)


def _verify(model: LoadedModel, plan: _Plan, report: Callable[[str], None]) -> dict[str, Any]:
    manifest = plan.manifest
    report("running the network in float64")
    judged, rounded = _references(model, plan)
    worst: dict[str, Figure] = {}
    compared = informative = shaped = 0
    for layer in manifest.layers:
        report(f"verifying layer {layer}")
        # One forward and backward pass serves all layers and methods. Gradients of early layers are large: let go.
        truths = _truths(judged.pop(layer), rounded.pop(layer, None), layer, plan)
        evidence, counted = Evidence(), telling(list(truths))
        files = dict.fromkeys(graph.file for graph in manifest.graphs if graph.layer == layer)
        for position, file in enumerate(files):
            # What a layer's graphs make of class_index is one and the same subgraph.
            for method, figures in _measure(file, layer, truths, plan, special=position == 0):
                for name, figure in figures.items():
                    _check(name, figure, layer)
                    if name not in worst or figure.share > worst[name].share:
                        worst[name] = figure
                known = truths[method]
                if method in counted:
                    evidence.add(known, figures, plan.reached)
                if Output.CAM in figures:
                    compared += int(plan.reached.sum())
                    informative += int((known.informative & plan.reached).sum())
        evidence.check(", ".join(files), layer, precision=manifest.precision, unknown=UNKNOWN[manifest.precision])
        shaped += evidence.shaped
    if compared and not shaped:
        report("warning: no map could be compared, all are flat in float64 too: is the model trained?")
    return {
        "judge": "float64",
        "photos": list(PHOTOS[: plan.shown]),
        "batch_sizes": [batch.size for batch in plan.batches],
        "compared_maps": compared,
        "informative_maps": informative,
        "figures": {name: asdict(figure) for name, figure in worst.items()},
    }


def _plan(model: LoadedModel, folder: Path, manifest: Manifest) -> _Plan:
    # A server's export has dozens of graphs: fewer images each.
    single = len(manifest.graphs) == 1
    photos = load_photos(manifest.preprocess)[: 4 if single else 2]
    depth = min(3 if single else 2, model.class_count, manifest.classes or model.class_count)

    def batches() -> Iterator[_Batch]:
        start = 0
        for size, classes in ((1, 3), (3, 1), (4, 2)) if single else ((1, 2), (3, 1)):
            # A graph of any number of classes is asked for different numbers. Of more than are judged, some repeat.
            count = manifest.classes or min(classes, depth)
            yield _Batch(slice(start, start + size), np.arange(count) % depth)
            start += size

    pixels = np.concatenate([photos, photos[:, :, ::-1]])
    return _Plan(manifest, folder, len(photos), pixels, depth, tuple(batches()))


def _references(model: LoadedModel, plan: _Plan) -> tuple[dict[str, Reference], dict[str, Reference]]:
    """What the network says, by layer: in float64, and in the graphs' precision (nothing if it cannot)."""
    layers = plan.manifest.layers
    # Before anything is compared with it.
    Network(model.module, model.preprocess, torch.float32).check_steady(plan.pixels, layers)
    score, multi_label = plan.manifest.graphs[0].score, model.task is Task.MULTI_LABEL
    judged = Network(model.module, model.preprocess, torch.float64, model.grids).explain(
        plan.pixels, layers, plan.depth, score=score, multi_label=multi_label
    )
    for reference in judged.values():
        if not all(bool(tensor.isfinite().all()) for tensor in (reference.logits, reference.gradients)):
            raise ExportError("the network gives scores or gradients that are not finite: are its weights right?")
    own = Network(model.module, model.preprocess, _DTYPES[plan.manifest.precision], model.grids)
    try:
        found = own.explain(plan.pixels, layers, judged[layers[0]].class_ids, score=score, multi_label=multi_label)
    except ExportError:
        # Not every operator has a half precision kernel on CPUs.
        if plan.manifest.precision == "fp32":
            raise
        return judged, {}
    return judged, found


def _truths(judged: Reference, rounded: Reference | None, layer: str, plan: _Plan) -> dict[Method, Truth]:
    unknown = UNKNOWN[plan.manifest.precision]
    methods = [graph.method for graph in plan.manifest.graphs if graph.layer == layer]
    return {method: truth(judged, rounded, method, unknown=unknown) for method in methods}


def _measure(
    file: str, layer: str, truths: Mapping[Method, Truth], plan: _Plan, *, special: bool
) -> Iterator[tuple[Method, dict[str, Figure]]]:
    """Run a graph on every batch, and yield its figures for every method that it serves."""
    graphs = [graph for graph in plan.manifest.graphs if (graph.file, graph.layer) == (file, layer)]
    run = open_graph(plan.folder / file, plan.manifest.format, graphs[0].outputs)
    class_ids = truths[graphs[0].method].class_ids
    found = [_run(run, file, class_ids[batch.rows][:, batch.columns], batch, plan) for batch in plan.batches]
    for method in (graph.method for graph in graphs):
        errors: dict[str, float] = {}
        for batch, outputs in zip(plan.batches, found, strict=True):
            for name, error in truths[method].error(_with_map(outputs, method), batch.rows, batch.columns).items():
                # Not max(), which is blind to NaN.
                errors[name] = float(np.maximum(errors.get(name, 0.0), error))
        own = truths[method].own_error
        yield (
            method,
            {
                name: Figure(error, own.get(name, 0.0), _bound(name, own.get(name, 0.0), plan.manifest.precision), file)
                for name, error in errors.items()
            },
        )
    # Last: what is not finite is told by name before.
    if special:
        _check_special(run, file, plan)


def _bound(name: str, own_error: float, precision: str) -> float:
    """What a figure's error may be, given the network's own."""
    cap = (CLASS_CAPS if name in PER_CLASS else FORWARD_CAPS)[precision]
    return max(TOLERANCES[precision], min(ROUNDING_FACTOR * own_error, cap))


def _run(run: Run, file: str, class_ids: npt.NDArray[np.int64], batch: _Batch, plan: _Plan) -> Mapping[Output, Array]:
    outputs = run(plan.image(batch.rows), class_ids)
    if Output.CLASS_ID in outputs and not np.array_equal(outputs[Output.CLASS_ID], class_ids):
        raise ExportError(f"{file} does not explain the classes that it is asked for")
    # The manifest describes the first graph.
    if file == plan.manifest.graphs[0].file:
        names = {"batch": batch.size, "classes": len(batch.columns)}
        for info in plan.manifest.outputs:
            shape = tuple(names[size] if isinstance(size, str) else size for size in info.shape)
            values = outputs[Output(info.name)]
            if (values.shape, str(values.dtype)) != (shape, info.dtype):
                raise ExportError(
                    f"{file} returns {info.name} as {values.dtype} {values.shape}, not as {info.dtype} {shape}"
                )
    return outputs


def _check_special(run: Run, file: str, plan: _Plan) -> None:
    """Check what a graph makes of RANKED and ABSENT, in a batch that has both."""
    count = plan.manifest.classes or plan.depth
    wanted = np.full((3, count), RANKED, np.int64)
    wanted[0, -1] = ABSENT
    outputs = run(plan.image(slice(0, 3)), wanted)
    if Output.CLASS_ID in outputs and Output.LOGITS in outputs:
        expected = np.argsort(-outputs[Output.LOGITS], axis=1, kind="stable")[:, :count]
        expected[0, -1] = ABSENT
        if not np.array_equal(outputs[Output.CLASS_ID], expected):
            raise ExportError(f"{file} does not rank classes by their logits")
    for output in (Output.GRADIENTS, Output.CAM, Output.CAM_SCALE, Output.CAM_OFFSET):
        # NaN is not zero either.
        if output in outputs and np.any(outputs[output][0, -1] != 0):
            raise ExportError(f"{file}: {output} is not zero where no class is wanted")


def _with_map(outputs: Mapping[Output, Array], method: Method) -> Mapping[Output, Array]:
    """A graph's outputs; for one of activations and gradients alone with the map that an engine makes of them."""
    needed = (Output.LOGITS, Output.CLASS_ID, Output.ACTIVATIONS, Output.GRADIENTS)
    if Output.CAM in outputs or not all(output in outputs for output in needed):
        return outputs
    return outputs_of(Reference(*(torch.from_numpy(outputs[output]) for output in needed)), method)


def _check(name: str, figure: Figure, layer: str) -> None:
    if not math.isfinite(figure.error):
        shown = str(Output.GRADIENTS if name == WEIGHTS else name)
        verb = "are" if shown.endswith("s") else "is"
        raise ExportError(f"{figure.graph}, layer {layer}: {shown} {verb} not finite")
    if figure.error > figure.bound:
        raise ExportError(
            f"{figure.graph}, layer {layer}: {name} differs from float64 by {figure.error:.2g}, "
            f"more than the {figure.bound:.2g} allowed"
        )
