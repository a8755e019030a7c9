"""One layer's graphs, run from disk in their own runtime and compared with what the network says about the layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from heatlens_server.backends.onnx.manifest import GraphFile, Manifest
from heatlens_server.backends.onnx.network_engine import NetworkEngine
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
from heatlens_server.backends.torch.export.reference import MOVES, Reference
from heatlens_server.backends.torch.export.runtimes import RunFile, open_graph, running
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import MAP_OUTPUTS, InputKind, Output
from heatlens_server.core.methods import ABSENT, RANKED, Method
from heatlens_server.imaging.preprocess import normalise
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.normalization import normalize


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
class Plan:
    """What every graph of an export is run on.

    Attributes:
        manifest: of the export.
        folder: of the export.
        pixels: uint8 (N, H, W, C): photos, and mirrored.
        depth: classes per image that are compared.
        batches: by run, which of the images and how many of the classes; together all of the images.
        engine: what runs the export, if its graphs hold no maps.
    """

    manifest: Manifest
    folder: Path
    pixels: npt.NDArray[np.uint8]
    depth: int
    batches: tuple[tuple[slice, int], ...]
    engine: NetworkEngine | None = None

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
        """The input of graphs and engine."""
        pixels, spec = self.pixels[rows], self.manifest.preprocess
        if self.engine is not None:
            return pixels
        if self.manifest.input is InputKind.UINT8:
            return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        return np.stack([normalise(image, spec) for image in pixels])


@dataclass(frozen=True, slots=True, eq=False)
class JudgedGraph:
    """A graph that is right, as far as it could be compared.

    Attributes:
        truth: what it was compared with.
        figures: by output.
    """

    truth: Expected
    figures: Mapping[str, Figure]

    def shaped(self, asked: npt.NDArray[np.bool_]) -> int:
        """How many of its maps are not flat; of a graph without maps, of what it has for every class."""
        return int((self.truth.shaped & asked).sum()) if self._names else 0

    def proven(self, asked: npt.NDArray[np.bool_]) -> int:
        """How many of these could be compared."""
        if not self._names:
            return 0
        return int((self.truth.shaped & asked & np.any([self.truth.known[name] for name in self._names], axis=0)).sum())

    @property
    def _names(self) -> list[str]:
        return [Output.CAM] if Output.CAM in self.figures else [name for name in PER_CLASS if name in self.figures]


class LayerJudge:
    """Runs the graphs of one layer and compares them with what the network says."""

    def __init__(
        self,
        plan: Plan,
        layer: str,
        *,
        reference: Reference,
        own: Reference | None,
        run_moved: Callable[[Reference], Sequence[Reference]],
        report: Callable[[str], None],
    ) -> None:
        """Run nothing yet.

        Args:
            plan: what the graphs are run on.
            layer: which one.
            reference: what the network in float64 says about it.
            own: what the network in the graphs' precision says; None if it cannot run there.
            run_moved: what the network's `moved_copies` say about the reference's classes.
            report: told when these are run.
        """
        self._plan = plan
        self._layer = layer
        self._reference = reference
        self._own = own
        self._run_moved = run_moved
        self._report = report
        self._graphs = [graph for graph in plan.manifest.graphs if graph.layer == layer]

    def judged(self) -> tuple[dict[Method, JudgedGraph], dict[Method, str]]:
        """Judge every graph of the layer.

        Returns:
            The graphs that are right, and why the others are not.
        """
        right: dict[Method, JudgedGraph] = {}
        wrong: dict[Method, str] = {}
        knows_special = False
        for file in dict.fromkeys(graph.file for graph in self._graphs):
            graphs = [graph for graph in self._graphs if graph.file == file]
            try:
                run = self._judge_file(file, graphs, right, wrong)
            except ExportError as error:
                wrong |= dict.fromkeys((graph.method for graph in graphs), str(error))
                continue
            # Last, as what is not finite is told by name before; and once: what a layer's graphs make of class_index is
            # one and the same subgraph.
            if not (knows_special or self._plan.engine):
                try:
                    _check_special(run, file, self._plan)
                except ExportError as error:
                    return {}, {graph.method: wrong.get(graph.method, str(error)) for graph in self._graphs}
                knows_special = True
        proving = {method: one for method, one in right.items() if not method.traits.class_free} or right
        asked = self._plan.asked
        shaped = sum(one.shaped(asked) for one in proving.values())
        if shaped and not any(one.proven(asked) for one in proving.values()):
            reason = (
                f"{', '.join(dict.fromkeys(graph.file for graph in self._graphs))}, layer {self._layer}: no map could "
                f"be compared: the network itself in {self._plan.manifest.precision} misses all {shaped} that are not "
                f"flat by more than {self._plan.tolerance.unknown:g}"
            )
            return {}, {graph.method: wrong.get(graph.method, reason) for graph in self._graphs}
        return right, wrong

    def _judge_file(
        self, file: str, graphs: Sequence[GraphFile], right: dict[Method, JudgedGraph], wrong: dict[Method, str]
    ) -> RunFile:
        """Run a file on every batch, and judge every graph in it.

        Raises:
            ExportError: it does not run.
        """
        plan = self._plan
        if plan.engine is None:
            run = open_graph(plan.folder / file, plan.manifest.format, graphs[0].outputs)
        else:
            run = running(plan.engine, self._layer, file)
        class_ids = self._reference.class_ids.numpy()
        outputs = [_run(run, file, class_ids[rows, :count], rows, plan) for rows, count in plan.batches]
        for graph in graphs:
            try:
                right[graph.method] = self._judge_graph(graph, outputs)
            except ExportError as error:
                wrong[graph.method] = str(error)
        return run

    def _judge_graph(self, graph: GraphFile, outputs: Sequence[Mapping[Output, Array]]) -> JudgedGraph:
        """Compare what a graph returned.

        Raises:
            ExportError: it is wrong.
        """
        method, unknown = graph.method, self._plan.tolerance.unknown
        judged = self._compared(graph, outputs, expected(self._reference, self._own, method, unknown=unknown))
        try:
            _check(judged.figures, self._layer)
        except ExportError as error:
            is_finite = all(math.isfinite(figure.error) for figure in judged.figures.values())
            if len(self._plan.manifest.graphs) > 1 or self._plan.manifest.precision != "fp32" or not is_finite:
                raise
            # Nothing would be left: is it more than what float32 determines?
            self._report(f"{error}: running the network {MOVES} more times, its weights moved by two units")
            moved = self._run_moved(self._reference)
            truth = expected(self._reference, self._own, method, unknown=unknown, moved=moved)
            judged = self._compared(graph, outputs, truth)
            _check(judged.figures, self._layer)
        return judged

    def _compared(self, graph: GraphFile, outputs: Sequence[Mapping[Output, Array]], truth: Expected) -> JudgedGraph:
        errors: dict[str, float] = {}
        for (rows, _), found in zip(self._plan.batches, outputs, strict=True):
            mapped = _with_map(found, graph.method, in_torch=self._plan.engine is None)
            for name, error in truth.errors(mapped, rows).items():
                # Not max(), which is blind to NaN.
                errors[name] = float(np.maximum(errors.get(name, 0.0), error))
        own, bound = truth.own_error, self._plan.tolerance.bound
        return JudgedGraph(
            truth,
            {
                name: Figure(error, own.get(name, 0.0), bound(name, own.get(name, 0.0)), graph.file)
                for name, error in errors.items()
            },
        )


def _run(run: RunFile, file: str, class_ids: npt.NDArray[np.int64], rows: slice, plan: Plan) -> Mapping[Output, Array]:
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


def _check_special(run: RunFile, file: str, plan: Plan) -> None:
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


def _with_map(outputs: Mapping[Output, Array], method: Method, *, in_torch: bool) -> Mapping[Output, Array]:
    """A graph's outputs; for one of activations and gradients alone with the map that an engine makes of them."""
    needed = (Output.LOGITS, Output.CLASS_ID, Output.ACTIVATIONS, Output.GRADIENTS)
    if Output.CAM in outputs or not all(output in outputs for output in needed):
        return outputs
    if not in_torch:
        gradients = outputs[Output.GRADIENTS]
        factors = gradients.sum((-2, -1)) if method is Method.CAM else gradients
        finished = normalize(raw_map(method, outputs[Output.ACTIVATIONS], factors))
        # What is wrong about a gradient is wrong for those methods whose maps show it.
        shown = {output: values for output, values in outputs.items() if output is not Output.GRADIENTS}
        return shown | dict(zip(MAP_OUTPUTS, (finished.values, finished.scale, finished.offset), strict=True))
    return outputs_of(Reference(*(torch.from_numpy(outputs[output]) for output in needed)), method)


def _check(figures: Mapping[str, Figure], layer: str) -> None:
    for name, figure in figures.items():
        if not math.isfinite(figure.error):
            shown = str(Output.GRADIENTS if name == WEIGHTS else name)
            verb = "are" if shown.endswith("s") else "is"
            raise ExportError(f"{figure.graph}, layer {layer}: {shown} {verb} not finite")
        if figure.error > figure.bound:
            raise ExportError(
                f"{figure.graph}, layer {layer}: {name} differs from float64 by {figure.error:.2g}, "
                f"more than the {figure.bound:.2g} allowed"
            )
