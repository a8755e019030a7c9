"""The engine for networks that are given as graphs: a forward pass, a backward pass for each goal, maps by numpy.

It runs what was an ONNX file of anybody's, and needs neither torch nor, once graphs are written, onnx.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.goals import Goals, goals_of
from heatlens_server.backends.onnx.graph_rows import normalisation_table, normalised_planes
from heatlens_server.backends.onnx.map_finish import Maps, finish
from heatlens_server.backends.onnx.network import NetworkGraphs, NetworkInfo
from heatlens_server.backends.onnx.packed import OpenGraph, open_packed
from heatlens_server.backends.onnx.passes import Passes
from heatlens_server.backends.onnx.providers import choose_for, is_out_of_memory, load_runtime
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.methods import CLOSED_FORMS, Method, Score
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.normalization import normalize

Array = npt.NDArray[Any]

_FP16_GRADIENT_SCALE = 2.0**8
"""What seeds in float16 are multiplied by, and gradients divided by, in float32: exact."""

_MOST_SESSIONS = 4
"""Pairs of sessions that are kept: each holds the weights laid out for its kernels."""


@dataclass(frozen=True, slots=True, eq=False)
class _Sessions:
    """The graphs of some layers, opened."""

    passes: Passes
    forward: OpenGraph
    backward: OpenGraph | None


class NetworkEngine:
    """Explains with a network's graphs, on a CPU or an NVIDIA GPU. Implements `core.engine.Engine`."""

    def __init__(
        self, network: NetworkGraphs, *, device: str = "auto", provider: str = "auto", threads: int | None = None
    ) -> None:
        """Open the default layer's sessions; other layers' are opened when they are first asked for.

        Args:
            network: what to run.
            device: "auto", "cpu", "cuda" or "cuda:N".
            provider: "auto", "cpu", "cuda" or "tensorrt".
            threads: for one run on a CPU; None for as many as there are cores for this process.

        Raises:
            ModelLoadError: onnxruntime does not run the graphs, or not where it should.
        """
        self._runtime = load_runtime()
        self._network: NetworkGraphs | None = network
        self._about = network.info
        precision = "fp16" if network.info.dtype == "float16" else "fp32"
        self._choice = choose_for(self._runtime, device=device, provider=provider, precision=precision)
        self._threads = threads
        self._table = normalisation_table(self._about.preprocess)
        self._grids = {layer.name: layer.grid for layer in self._about.layers}
        self._opened: OrderedDict[tuple[str, ...], _Sessions] = OrderedDict()
        self._lock = Lock()
        default = self._about.layers[0].name
        try:
            has_gradient = self._sessions((default,)).backward is not None
        except ModelLoadError:
            raise
        # onnxruntime has an exception class for each of its status codes, and paths in their messages.
        except Exception as error:
            raise ModelLoadError(f"onnxruntime cannot open the file ({type(error).__name__})") from error
        self._info = _capabilities(self._about, self._choice.device, has_gradient=has_gradient)

    @property
    def info(self) -> Capabilities:
        """What this engine can do."""
        return self._info

    def can(self, spec: MapSpec) -> bool:
        """Whether `explain` takes a spec."""
        return (
            not (spec.in_steps or spec.principal)
            and spec.method in self._info.methods
            and set(spec.layers) <= set(self._info.layers_of(spec.method))
        )

    def explain(self, images: ImageArray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch; see `core.engine.Engine.explain`.

        Raises:
            MemoryError: the device is out of memory.
        """
        try:
            if self._about.takes_batches:
                return self._explain(images, targets, spec)
            return [
                result
                for n, target in enumerate(targets)
                for result in self._explain(images[n : n + 1], [target], spec)
            ]
        except Exception as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from None
            raise

    def close(self) -> None:
        """Let go of every session. Idempotent."""
        with self._lock:
            self._network = None
            self._opened.clear()

    def _explain(self, images: ImageArray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        sessions = self._sessions(spec.layers)
        passes = sessions.passes
        found = self._run(sessions, (*passes.scores, *passes.layers.values(), *passes.kept), images)

        def run(further: ImageArray) -> Mapping[str, Array]:
            return self._run(sessions, passes.scores, further)

        scores = {name: found[name] for name in passes.scores}
        goals = goals_of(scores, targets, about=self._about, score=spec.score, run=run)
        activations = {layer: as_map(found[name], self._grids[layer]) for layer, name in passes.layers.items()}
        raw = self._raw_maps(sessions, found, goals, activations, spec.method)
        size = (images.shape[1], images.shape[2]) if spec.upsample else None
        maps = finish([_normalized(raw[layer]) for layer in spec.layers], size, spec.aggregation)
        results = [goals.result(n, maps.values[n], maps.scales[n], maps.offsets[n]) for n in range(len(images))]
        return results if spec.return_mask else [replace(result, mask=None, masks=None) for result in results]

    def _run(self, sessions: _Sessions, names: Sequence[str], images: ImageArray) -> dict[str, Array]:
        """By name, what the forward pass returns for images (N, H, W, C)."""
        passes, unique = sessions.passes, list(dict.fromkeys(names))
        given = self.inputs(images)
        computed = [name for name in unique if name != passes.image]
        found = dict(zip(computed, sessions.forward.run(computed, {passes.image: given}), strict=True))
        return {**found, passes.image: given}

    def _raw_maps(
        self,
        sessions: _Sessions,
        found: Mapping[str, Array],
        goals: Goals,
        activations: Mapping[str, Array],
        method: Method,
    ) -> Mapping[str, Array]:
        """By layer, raw maps (N, K, h, w). Goal by goal, so that one goal's gradients are held at a time."""
        if method.traits.class_free or method is Method.RANDOM_CAM:
            any_factors = np.empty((len(found[sessions.passes.scores[0]]), goals.width, 0), np.float32)
            return {layer: raw_map(method, of_layer, any_factors) for layer, of_layer in activations.items()}
        maps: dict[str, list[Array]] = {layer: [] for layer in activations}
        for k in range(goals.width):
            gradients = self._gradients(sessions, found, goals.seed(k))
            for layer, of_layer in activations.items():
                factors = as_map(gradients[layer], self._grids[layer])[:, None]
                if method is Method.CAM:
                    # Of a linear head over means: its weights are the gradients' sums over places.
                    factors = factors.sum((-2, -1))
                maps[layer].append(raw_map(method, of_layer, factors))
        return {layer: np.concatenate(of_layer, axis=1) for layer, of_layer in maps.items()}

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
                # Gradients of a logit by a deep layer are often below float16's smallest normal number.
                scale = _FP16_GRADIENT_SCALE
            feeds[passes.seeds[name]] = seed * seed.dtype.type(scale)
        gradients = backward.run(list(passes.gradients.values()), feeds)
        if scale == 1.0:
            return dict(zip(passes.gradients, gradients, strict=True))
        scaled = (gradient.astype(np.float32) / np.float32(scale) for gradient in gradients)
        return dict(zip(passes.gradients, scaled, strict=True))

    def _sessions(self, layers: tuple[str, ...]) -> _Sessions:
        """The graphs of some layers: opened now, or kept from before."""
        with self._lock:
            opened = self._opened.get(layers)
            if opened is None:
                if self._network is None:
                    raise ValueError("the engine is closed")
                opened = self._opened[layers] = self._open(self._network.passes(layers))
                if len(self._opened) > _MOST_SESSIONS:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(layers)
            return opened

    def _open(self, passes: Passes) -> _Sessions:
        forward, self._choice = open_packed(self._runtime, passes.forward, self._choice, threads=self._threads)
        if passes.backward is None:
            return _Sessions(passes, forward, None)
        backward, _ = open_packed(self._runtime, passes.backward, self._choice, threads=self._threads)
        return _Sessions(passes, forward, backward)

    def planes(self, images: ImageArray) -> Array:
        """Images (N, H, W, C), normalised, float32 (N, C, H, W)."""
        return normalised_planes(images, self._about.preprocess, self._table)

    def inputs(self, images: ImageArray) -> Array:
        """Images (N, H, W, C) as the network takes them."""
        about, values = self._about, self.planes(images)
        if about.channels_last:
            values = np.ascontiguousarray(values.transpose(0, 2, 3, 1))
        dtype = np.dtype(about.dtype)
        if dtype == np.float32:
            return values
        return np.rint(values).astype(dtype) if dtype.kind in "iu" else values.astype(dtype)


def _normalized(raw: Array) -> Maps:
    found = normalize(raw)
    return Maps(found.values, found.scale, found.offset)


def as_map(output: Array, grid: Grid) -> Array:
    """Read a layer's output as a map (N, C, h, w), float32 or wider; a view of it wherever that is possible."""
    if grid.layout is Layout.TOKENS:
        tokens = output[:, grid.prefix :]
        output = tokens.transpose(0, 2, 1).reshape(len(output), -1, grid.height, grid.width)
    elif grid.layout is Layout.CHANNELS_LAST:
        output = output.transpose(0, 3, 1, 2)
    return output.astype(np.float32) if output.dtype == np.float16 else output


def _capabilities(about: NetworkInfo, device: str, *, has_gradient: bool) -> Capabilities:
    methods = [
        method
        for method in CLOSED_FORMS
        if method not in about.task.traits.unsupported_methods
        and (
            (has_gradient and (method is not Method.CAM or about.has_linear_head))
            or not (method.traits.needs_gradient or method is Method.CAM)
        )
    ]
    names = tuple(layer.name for layer in about.layers)
    input_px = about.preprocess.crop_px or (0, 0)
    alone: dict[Method, tuple[str, ...]] = {Method.CAM: names[:1]} if Method.CAM in methods and len(names) > 1 else {}
    return Capabilities(
        engine_name="onnxruntime",
        device=device,
        precision="fp16" if about.dtype == "float16" else "fp32",
        input_height_px=input_px[0],
        input_width_px=input_px[1],
        class_count=about.class_count,
        methods=tuple(methods),
        layers=names,
        task=about.task,
        input_channels=about.preprocess.channels,
        scores=about.task.traits.scores if has_gradient else (Score.LOGIT,),
        layers_by_method=alone,
        threshold=about.threshold,
        runs_one_by_one=not about.takes_batches,
        refusals=about.refusals,
    )
