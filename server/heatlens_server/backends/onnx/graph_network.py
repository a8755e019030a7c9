"""A network's graphs, opened: one forward pass, a backward pass for each goal, maps by numpy; changed images."""

from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.goals import Goals, Scores, goals_of
from heatlens_server.backends.onnx.graph_rows import normalisation_table, normalised_planes
from heatlens_server.backends.onnx.graph_tail import OpenTail
from heatlens_server.backends.onnx.map_finish import Maps, finish
from heatlens_server.backends.onnx.network import NetworkGraphs, NetworkInfo
from heatlens_server.backends.onnx.packed import OpenGraph, PackedGraph, open_packed
from heatlens_server.backends.onnx.passes import Passes
from heatlens_server.backends.onnx.providers import Choice, Runtime
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.targets import Target
from heatlens_server.core.tasks import Task
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.normalization import NormalizedMap, normalize
from heatlens_server.maps.precision import FP16_GRADIENT_SCALE
from heatlens_server.maps.principal import check_places, principal_projection
from heatlens_server.maps.steps.job import Change, Job
from heatlens_server.maps.weights import weighted

Array = npt.NDArray[Any]

_MOST_SESSIONS = 4
"""Sets of sessions that are kept, of passes and of tails: each holds the weights laid out for its kernels."""

_T = TypeVar("_T")


class _Recent(Generic[_T]):
    """What was made last, by key."""

    def __init__(self) -> None:
        self._made: OrderedDict[Hashable, _T] = OrderedDict()
        self._lock = Lock()

    def forget(self) -> None:
        """Make everything anew."""
        with self._lock:
            self._made.clear()

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What was made for a key, or is made now."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
                if len(self._made) > _MOST_SESSIONS:
                    self._made.popitem(last=False)
            self._made.move_to_end(key)
            return self._made[key]


@dataclass(frozen=True, slots=True, eq=False)
class _Sessions:
    """The graphs of some layers, opened."""

    passes: Passes
    forward: OpenGraph
    backward: OpenGraph | None


@dataclass(frozen=True, slots=True, eq=False)
class GraphMaps:
    """Raw maps of N images. Implements `maps.steps.job.Explained`.

    Attributes:
        goals: what was explained.
        raw: one raw map (N, K, h, w) per layer.
    """

    goals: Goals
    raw: Sequence[Array]

    def maps(self, spec: MapSpec, size_px: tuple[int, int]) -> NormalizedMap[Array]:
        """Finish the maps."""
        layers = [Maps(found.values, found.scale, found.offset) for found in map(normalize, self.raw)]
        finished = finish(layers, size_px if spec.upsample else None, spec.aggregation)
        return NormalizedMap(finished.values, finished.scales, finished.offsets)


class GraphNetwork:
    """A network. Implements `maps.steps.network.Network`. Thread-safe, but for `use_threads`.

    Inputs are normalised images (N, C, H, W) in float32, however the network takes them.
    """

    def __init__(
        self,
        network: NetworkGraphs,
        runtime: Runtime,
        choice: Choice,
        *,
        threads: int | None,
        optimised: bool = True,
    ) -> None:
        """Open nothing yet.

        Args:
            network: what to run.
            runtime: onnxruntime.
            choice: where it runs.
            threads: for one run on a CPU; None for as many as there are cores for this process.
            optimised: whether onnxruntime may put other operators in the place of the graphs'.
        """
        self._network = network
        self._about = network.info
        self._runtime = runtime
        self._choice = choice
        self._threads = threads
        self._optimised = optimised
        self._table = normalisation_table(self._about.preprocess)
        self._grids = {layer.name: layer.grid for layer in self._about.layers}
        self._passes: _Recent[_Sessions] = _Recent()
        self._tails: _Recent[OpenTail] = _Recent()
        self._twin: GraphNetwork | None = None

    @property
    def device(self) -> str:
        """Where it runs."""
        return self._choice.device

    def use_threads(self, count: int | None) -> None:
        """Have so many threads from now on, for one run on a CPU: sessions are opened anew."""
        self._threads, self._twin = count, None
        self._passes.forget()
        self._tails.forget()

    def has_gradient(self, layer: str) -> bool:
        """Whether the scores can be differentiated by a layer; opens its sessions."""
        return self._sessions((layer,)).backward is not None

    def inputs(self, images: ImageArray) -> Array:
        """Images (N, H, W, C) as normalised inputs (N, C, H, W)."""
        return normalised_planes(images, self._about.preprocess, self._table)

    def given(self, inputs: Array) -> Array:
        """Inputs as the network takes them."""
        if self._about.channels_last:
            inputs = np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
        dtype = np.dtype(self._about.dtype)
        if dtype.kind not in "iu":
            return inputs.astype(dtype, copy=False)
        # Changed inputs may lie outside.
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        return np.rint(inputs).clip(least, most).astype(dtype)

    def explain(self, inputs: Array, targets: Sequence[Target], spec: MapSpec) -> Generator[None, None, GraphMaps]:
        """Explain inputs with a closed form; yields after each goal's gradients, and map."""
        sessions = self._sessions(spec.layers)
        if spec.method is Method.CAM:
            # Its weights are those of logits.
            spec = replace(spec, score=Score.LOGIT)
        found, goals = self._asked(sessions, inputs, targets, spec)
        activations = {layer: as_map(found[name], self._grids[layer]) for layer, name in sessions.passes.layers.items()}
        if spec.method.traits.class_free or spec.method is Method.RANDOM_CAM:
            any_factors = np.empty((len(inputs), goals.width, 0), np.float32)
            raw = []
            yield
            for place, layer in enumerate(spec.layers):
                check_places(spec.method, place, layer, activations[layer])
                raw.append(raw_map(spec.method, activations[layer], any_factors))
                yield
            return GraphMaps(goals, raw)
        maps: dict[str, list[Array]] = {layer: [] for layer in spec.layers}
        if len(maps) > 1:
            yield
        # Goal by goal, so that one goal's gradients are held at a time.
        for k in range(goals.width):
            gradients = self._gradients(sessions, found, goals.seed(k))
            if len(maps) > 1:
                yield
            for layer, of_layer in maps.items():
                factors = as_map(gradients[layer], self._grids[layer])[:, None]
                if spec.method is Method.CAM:
                    # Of a linear head over means: its weights are the gradients' sums over places.
                    factors = factors.sum((-2, -1))
                of_layer.append(_map(spec, activations[layer], factors))
                yield
        return GraphMaps(goals, [np.concatenate(maps[layer], axis=1) for layer in spec.layers])

    def factors(self, inputs: Array, targets: Sequence[Target], layer: str) -> tuple[Scores, Array, Array]:
        """What maps of logits are made of, for those who check them.

        Returns:
            What the network returned; the layer's activations (N, C, h, w); the gradients (N, K, C, h, w).
        """
        sessions, grid = self._sessions((layer,)), self._grids[layer]
        found, goals = self._asked(sessions, inputs, targets, MapSpec(Method.GRAD_CAM, (layer,), upsample=False))
        by_goal = [self._gradients(sessions, found, goals.seed(k))[layer] for k in range(goals.width)]
        scores = {name: found[name] for name in sessions.passes.scores}
        gradients = np.stack([as_map(gradient, grid) for gradient in by_goal], axis=1)
        return scores, as_map(found[sessions.passes.layers[layer]], grid), gradients

    def jobs(self, inputs: Array, target: Target, spec: MapSpec, *, rows: int) -> list["GraphJob"]:
        """Run the network on one image, for what explains it by each layer."""
        sessions = self._sessions(spec.layers)
        found, goals = self._asked(sessions, inputs, [target], spec, differentiate=False)
        return [
            GraphJob(inputs, goals, layer, self._grids[layer], rows, self, spec, found[sessions.passes.layers[layer]])
            for layer in spec.layers
        ]

    def scores(self, inputs: Array, layers: tuple[str, ...]) -> Scores:
        """What the network returns for inputs, by the graph that also returns some layers."""
        return self._scores(self._sessions(layers), inputs)

    def gradients(self, inputs: Array, target: Target, spec: MapSpec) -> Iterator[Mapping[str, Array]]:
        """For each goal of a target, by layer, its score's gradients (R, C, h, w) for R images."""
        sessions = self._sessions(spec.layers)
        found, goals = self._asked(sessions, inputs, [target] * len(inputs), spec)
        for k in range(goals.width):
            gradients = self._gradients(sessions, found, goals.seed(k))
            yield {layer: as_map(gradient, self._grids[layer]) for layer, gradient in gradients.items()}

    def tail(self, layer: str, given: Array, activations: Array) -> OpenTail:
        """What comes behind a layer; tried when it is first asked for, with one image and its activations."""

        def opened() -> OpenTail:
            tail = self._network.tail(layer)
            before = None if tail.before is None else self._open(tail.before)
            found = OpenTail(tail, self._open(tail.graph), before)
            return found.tried(activations, found.kept(given)) if self._about.takes_batches else found

        return self._tails.get(layer, opened)

    def twin(self) -> "GraphNetwork":
        """The same network with weights that mean nothing. Made when it is first asked for, and kept."""
        if self._twin is None:
            self._twin = GraphNetwork(
                self._network.twin(),
                self._runtime,
                self._choice,
                threads=self._threads,
                optimised=self._optimised,
            )
        return self._twin

    def _asked(
        self,
        sessions: _Sessions,
        inputs: Array,
        targets: Sequence[Target],
        spec: MapSpec,
        *,
        differentiate: bool = True,
    ) -> tuple[Mapping[str, Array], Goals]:
        """By name, the scores, the layers and what the backward pass reads; and the goals."""
        passes = sessions.passes
        names = (*passes.scores, *passes.layers.values(), *(passes.kept if differentiate else ()))
        found = self._run(sessions, names, inputs)

        def run(images: ImageArray) -> Scores:
            return self._scores(sessions, self.inputs(images))

        scores = {name: found[name] for name in passes.scores}
        return found, goals_of(scores, targets, about=self._about, score=spec.score, run=run)

    def _scores(self, sessions: _Sessions, inputs: Array) -> Scores:
        found = self._run(sessions, sessions.passes.scores, inputs)
        return {name: found[name] for name in sessions.passes.scores}

    def _run(self, sessions: _Sessions, names: Sequence[str], inputs: Array) -> dict[str, Array]:
        """By name, what the forward pass returns."""
        image, given = sessions.passes.image, self.given(inputs)
        computed = [name for name in dict.fromkeys(names) if name != image]
        found = dict(zip(computed, sessions.forward.run(computed, {image: given}), strict=True))
        return {**found, image: given}

    def _gradients(
        self, sessions: _Sessions, found: Mapping[str, Array], seeds: Mapping[str, Array]
    ) -> dict[str, Array]:
        """By layer, the derivative of one score of each image by the layer, in float32."""
        passes, backward = sessions.passes, sessions.backward
        if backward is None:
            raise ValueError("this network has no backward pass")
        feeds = {name: found[name] for name in passes.kept}
        scale = 1.0
        for name, seed in seeds.items():
            if seed.dtype == np.float16:
                scale = FP16_GRADIENT_SCALE
            feeds[passes.seeds[name]] = seed * seed.dtype.type(scale)
        # Several layers may have one tensor.
        names = list(dict.fromkeys(passes.gradients.values()))
        gradients = dict(zip(names, backward.run(names, feeds), strict=True))
        if scale != 1.0:
            gradients = {name: one.astype(np.float32) / np.float32(scale) for name, one in gradients.items()}
        return {layer: gradients[name] for layer, name in passes.gradients.items()}

    def _sessions(self, layers: tuple[str, ...]) -> _Sessions:
        """The graphs of some layers: opened now, or kept from before."""

        def opened() -> _Sessions:
            passes = self._network.passes(layers)
            forward = self._open(passes.forward)
            _check_shapes(self._about, passes, forward)
            return _Sessions(passes, forward, None if passes.backward is None else self._open(passes.backward))

        return self._passes.get(layers, opened)

    def _open(self, graph: PackedGraph) -> OpenGraph:
        opened, self._choice = open_packed(
            self._runtime, graph, self._choice, threads=self._threads, runs_once=not self._optimised
        )
        return opened


def _check_shapes(about: NetworkInfo, passes: Passes, forward: OpenGraph) -> None:
    """Check what a graph says of its image and scores against what is known: of an export, by its manifest.

    Raises:
        ModelLoadError: they differ; the message names the field of the manifest.
    """
    shapes = {value.name: value.shape for value in (*forward.get_inputs(), *forward.get_outputs())}
    checks: list[tuple[str, str, tuple[int, ...]]] = []
    if about.preprocess.crop_px is not None:
        size, channels = about.preprocess.crop_px, about.preprocess.channels
        lengths: tuple[int, ...] = (*size, channels) if about.channels_last else (channels, *size)
        checks.append(("preprocess.crop_px", passes.image, lengths))
    if about.task in {Task.CLASSIFICATION, Task.MULTI_LABEL}:
        checks.append(("class_count", passes.scores[0], (about.class_count,)))
    for field, name, lengths in checks:
        shape = shapes[name]
        # What is no number may vary.
        if any(isinstance(one, int) and one != wanted for one, wanted in zip(shape[1:], lengths, strict=False)):
            said = lengths[0] if len(lengths) == 1 else lengths
            raise ModelLoadError(f"the graph's {name} is of shape {tuple(shape)}, which {field} {said} does not fit")


@dataclass(frozen=True, eq=False)
class GraphJob(Job):
    """One image that is explained in steps. Implements `maps.steps.job.Job`.

    Attributes:
        network: the network.
        spec: how it is explained.
        output: what the layer returned for the image.
    """

    goals: Goals
    network: GraphNetwork
    spec: MapSpec
    output: Array

    @cached_property
    def features(self) -> Array:
        """The layer's output as a map (1, C, h, w)."""
        return as_map(self.output, self.grid)

    @property
    def levels(self) -> Sequence[Array]:
        """The one map that the layer's output is made of."""
        return [self.features]

    def on_image(self, features: Array) -> Array:
        """All of the layer's map: images are not padded."""
        return features

    def scores_of_inputs(self, inputs: Array) -> Array:
        """The scores of changed images."""
        return self.goals.scores_of(0, self.network.scores(inputs, self.spec.layers))

    def probabilities_of_inputs(self, inputs: Array) -> Array:
        """The probabilities of changed images."""
        return self.goals.probabilities(0, self.network.scores(inputs, self.spec.layers))

    def scores_of_levels(self, change: Change, rows: int) -> Array:  # noqa: ARG002 - told by what is changed
        """The scores of the image with the layer's output changed."""
        (changed,) = change(self.levels)
        return self.goals.scores_of(0, self._tail.run(from_map(changed, self.output, self.grid), self._kept))

    def gradients(self, inputs: Array) -> Iterator[Array]:
        """For each goal its score's gradients for changed images."""
        for gradients in self.network.gradients(inputs, self.goals.by_name(0), self.spec):
            yield gradients[self.layer]

    def explained(self, raw: Sequence[Array]) -> GraphMaps:
        """The image, explained by raw maps, one per layer."""
        return GraphMaps(self.goals, raw)

    @cached_property
    def _tail(self) -> OpenTail:
        return self.network.tail(self.layer, self.network.given(self.inputs), self.output)

    @cached_property
    def _kept(self) -> Mapping[str, Array]:
        return self._tail.kept(self.network.given(self.inputs))


def as_map(output: Array, grid: Grid) -> Array:
    """Read a layer's output as a map (N, C, h, w), float32 or wider; a view of it wherever that is possible."""
    if grid.layout is Layout.TOKENS:
        tokens = output[:, grid.prefix :]
        output = tokens.transpose(0, 2, 1).reshape(len(output), -1, grid.height, grid.width)
    elif grid.layout is Layout.CHANNELS_LAST:
        output = output.transpose(0, 3, 1, 2)
    return output.astype(np.float32) if output.dtype == np.float16 else output


def from_map(features: Array, output: Array, grid: Grid) -> Array:
    """Put a map (R, C, h, w) back into the form of a layer's output of one image, whose prefix tokens are kept."""
    features = features.astype(output.dtype, copy=False)
    if grid.layout is Layout.TOKENS:
        tokens = features.reshape(*features.shape[:2], -1).transpose(0, 2, 1)
        prefix = np.repeat(output[:, : grid.prefix], len(tokens), axis=0)
        return np.concatenate([prefix, tokens], axis=1)
    return features.transpose(0, 2, 3, 1) if grid.layout is Layout.CHANNELS_LAST else features


def _map(spec: MapSpec, activations: Array, factors: Array) -> Array:
    """The raw map (N, K, h, w) of activations and what they are weighted by; see `maps.methods.raw_map`."""
    if spec.principal:
        return principal_projection(weighted(spec.method, activations, factors))
    return raw_map(spec.method, activations, factors)
