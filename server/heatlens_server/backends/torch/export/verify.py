"""Whether an export says what the network says: measured on real photos, in the export's own runtime, from disk.

The reference is the network in float64, run with hooks and autograd and none of the exporter's code. The network in the
graph's own precision is measured against it as well: what rounding alone does to it, it may do to the graph too.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from heatlens_server.backends.onnx.manifest import Manifest
from heatlens_server.backends.torch.export.comparison import (
    PER_CLASS,
    TOLERANCES,
    WEIGHTS,
    Array,
    Expected,
    Tolerance,
    expected,
    outputs_of,
)
from heatlens_server.backends.torch.export.reference import Network, Reference, one_thread_for_grouped_convs
from heatlens_server.backends.torch.export.runtimes import RunFile, open_graph
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import InputKind, Output
from heatlens_server.core.methods import ABSENT, RANKED, Method
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Activation
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.preprocess import fit, normalise

PHOTOS = ("chelsea.jpg", "coffee.jpg", "astronaut.jpg", "rocket.jpg")
"""What exports are verified on: noise would not tell a good map from a bad one."""

_MAX_PHOTO_PIXELS = 1_000_000

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


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """What every graph of an export is run on.

    Attributes:
        manifest: of the export.
        folder: of the export.
        pixels: uint8 (N, H, W, C): photos, and mirrored.
        depth: classes per image that are compared.
        batches: by run, which of the images and how many of the classes; together all of the images.
    """

    manifest: Manifest
    folder: Path
    pixels: npt.NDArray[np.uint8]
    depth: int
    batches: tuple[tuple[slice, int], ...]

    @property
    def tolerance(self) -> Tolerance:
        """Of the graphs' precision."""
        return TOLERANCES[self.manifest.precision]

    @property
    def asked(self) -> npt.NDArray[np.bool_]:
        """Of which images (N) which compared classes (depth) the batches ask for."""
        asked = np.zeros((len(self.pixels), self.depth), np.bool_)
        for rows, count in self.batches:
            asked[rows, :count] = True
        return asked

    def image(self, rows: slice) -> Array:
        """The graphs' input."""
        pixels, spec = self.pixels[rows], self.manifest.preprocess
        if self.manifest.input is InputKind.UINT8:
            return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return np.stack([normalise(image, spec) for image in pixels])


def verify(model: LoadedModel, folder: Path, manifest: Manifest, *, report: Callable[[str], None]) -> dict[str, Any]:
    """Run every graph of an export and compare what it returns with the network in float64.

    The export is refused if

    - the network does not give the same logits and activations for the same photos twice, and in other batches;
    - of logits, activations, gradients averaged over each channel, maps or their scales, for the most probable classes
      of photos in batches of sizes that were not traced, one is not finite or off by more than `Tolerance.bound`;
    - classes are not ranked by the logits, or the map of no class is not empty;
    - a layer has maps that are not flat, and the network itself misses them all by more than `Tolerance.unknown`: then
      nothing was compared.

    A map that is flat in float64, as all are behind a head of zeros, proves nothing. Maps of activations alone are
    right even if the backward pass is wrong: where a layer has others, they do not count as compared.

    Args:
        model: what was exported; left as it was. Its copy in float64 is freed again.
        folder: of the export.
        manifest: of the export; its parity is not looked at.
        report: told each phase, and when all maps are flat.

    Returns:
        What `Manifest.parity` holds: "judge", "photos", "batch_sizes", "compared_maps", "informative_maps" and
        "figures", by output the fields of `Figure`.

    Raises:
        ExportError: the export is refused, or a graph cannot be run. The message names figure, value and bound.
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


def _plan(model: LoadedModel, folder: Path, manifest: Manifest) -> _Plan:
    # A server's export has dozens of graphs: fewer images each.
    single = len(manifest.graphs) == 1
    photos = load_photos(manifest.preprocess)[: 4 if single else 2]
    depth = min(3 if single else 2, model.class_count, manifest.classes or model.class_count)
    batches, start = [], 0
    for size, classes in ((1, 3), (3, 1), (4, 2)) if single else ((1, 2), (3, 1)):
        # A graph of any number of classes is asked for different numbers.
        batches.append((slice(start, start + size), depth if manifest.classes else min(classes, depth)))
        start += size
    return _Plan(manifest, folder, np.concatenate([photos, photos[:, :, ::-1]]), depth, tuple(batches))


def _verify(model: LoadedModel, plan: _Plan, report: Callable[[str], None]) -> dict[str, Any]:
    manifest, asked = plan.manifest, plan.asked
    report("running the network in float64")
    references, own = _references(model, plan)
    worst: dict[str, Figure] = {}
    compared = informative = shaped = 0
    for layer in manifest.layers:
        report(f"verifying layer {layer}")
        # One forward and backward pass serves all layers and methods. Gradients of early layers are large: let go.
        reference, of_own = references.pop(layer), own.pop(layer, None)
        methods = [graph.method for graph in manifest.graphs if graph.layer == layer]
        truths = {method: expected(reference, of_own, method, unknown=plan.tolerance.unknown) for method in methods}
        methods_that_prove = {method for method in methods if not method.traits.class_free} or set(methods)
        of_layer = proven = 0
        file_names = dict.fromkeys(graph.file for graph in manifest.graphs if graph.layer == layer)
        for position, file in enumerate(file_names):
            # What a layer's graphs make of class_index is one and the same subgraph.
            for method, figures in _measure(file, layer, truths, plan, check_special=position == 0):
                for name, figure in figures.items():
                    _check(name, figure, layer)
                    if name not in worst or figure.error / figure.bound > worst[name].error / worst[name].bound:
                        worst[name] = figure
                truth = truths[method]
                if Output.CAM in figures:
                    compared += int(asked.sum())
                    informative += int((truth.informative & asked).sum())
                # Of a graph without maps, what it has for every class stands in their place.
                names = [Output.CAM] if Output.CAM in figures else [name for name in PER_CLASS if name in figures]
                if names and method in methods_that_prove:
                    of_layer += int((truth.shaped & asked).sum())
                    proven += int((truth.shaped & asked & np.any([truth.known[name] for name in names], axis=0)).sum())
        if of_layer and not proven:
            raise ExportError(
                f"{', '.join(file_names)}, layer {layer}: no map could be compared: the network itself in "
                f"{manifest.precision} misses all {of_layer} that are not flat by more than {plan.tolerance.unknown:g}"
            )
        shaped += of_layer
    if compared and not shaped:
        report("warning: no map could be compared, all are flat in float64 too: is the model trained?")
    return {
        "judge": "float64",
        "photos": list(PHOTOS[: len(plan.pixels) // 2]),
        "batch_sizes": [rows.stop - rows.start for rows, _ in plan.batches],
        "compared_maps": compared,
        "informative_maps": informative,
        "figures": {name: asdict(figure) for name, figure in worst.items()},
    }


def _references(model: LoadedModel, plan: _Plan) -> tuple[dict[str, Reference], dict[str, Reference]]:
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


def _measure(
    file: str, layer: str, truths: Mapping[Method, Expected], plan: _Plan, *, check_special: bool
) -> Iterator[tuple[Method, dict[str, Figure]]]:
    """Run a graph on every batch, and yield its figures for every method that it serves."""
    graphs = [graph for graph in plan.manifest.graphs if (graph.file, graph.layer) == (file, layer)]
    run = open_graph(plan.folder / file, plan.manifest.format, graphs[0].outputs)
    class_ids = truths[graphs[0].method].class_ids
    found = [_run(run, file, class_ids[rows, :count], rows, plan) for rows, count in plan.batches]
    for method in (graph.method for graph in graphs):
        errors: dict[str, float] = {}
        for (rows, _), outputs in zip(plan.batches, found, strict=True):
            for name, error in truths[method].errors(_with_map(outputs, method), rows).items():
                # Not max(), which is blind to NaN.
                errors[name] = float(np.maximum(errors.get(name, 0.0), error))
        own = truths[method].own_error
        yield (
            method,
            {
                name: Figure(error, own.get(name, 0.0), plan.tolerance.bound(name, own.get(name, 0.0)), file)
                for name, error in errors.items()
            },
        )
    # Last: what is not finite is told by name before.
    if check_special:
        _check_special(run, file, plan)


def _run(run: RunFile, file: str, class_ids: npt.NDArray[np.int64], rows: slice, plan: _Plan) -> Mapping[Output, Array]:
    # A graph of more classes than are compared is asked for no others.
    missing = (plan.manifest.classes or class_ids.shape[1]) - class_ids.shape[1]
    class_ids = np.pad(class_ids, ((0, 0), (0, missing)), constant_values=ABSENT)
    outputs = run(plan.image(rows), class_ids)
    if Output.CLASS_ID in outputs and not np.array_equal(outputs[Output.CLASS_ID], class_ids):
        raise ExportError(f"{file} does not explain the classes that it is asked for")
    # The manifest describes the first graph.
    if file == plan.manifest.graphs[0].file:
        names = {"batch": class_ids.shape[0], "classes": class_ids.shape[1]}
        for info in plan.manifest.outputs:
            shape = tuple(names[size] if isinstance(size, str) else size for size in info.shape)
            values = outputs[Output(info.name)]
            if (values.shape, str(values.dtype)) != (shape, info.dtype):
                raise ExportError(
                    f"{file} returns {info.name} as {values.dtype} {values.shape}, not as {info.dtype} {shape}"
                )
    return outputs


def _check_special(run: RunFile, file: str, plan: _Plan) -> None:
    """Check what a graph makes of RANKED and ABSENT, in a batch that has both."""
    count = plan.manifest.classes or plan.depth
    wanted = np.full((3, count), RANKED, np.int64)
    wanted[0, -1] = ABSENT
    outputs = run(plan.image(slice(0, 3)), wanted)
    if Output.CLASS_ID in outputs and Output.LOGITS in outputs:
        ranked = np.argsort(-outputs[Output.LOGITS], axis=1, kind="stable")[:, :count]
        ranked[0, -1] = ABSENT
        if not np.array_equal(outputs[Output.CLASS_ID], ranked):
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
