"""The engine for networks that are given as graphs: an ONNX file of anybody's, or what was written beforehand.

It needs neither torch nor, once graphs are written, onnx.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Self

from heatlens_server.backends.onnx.graph_network import Array, GraphNetwork
from heatlens_server.backends.onnx.network import NetworkGraphs, NetworkInfo
from heatlens_server.backends.onnx.providers import choose_for, is_out_of_memory, load_runtime
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import Capabilities, MapSpec, Steps
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target
from heatlens_server.maps.arrays import silently
from heatlens_server.maps.steps.drive import STEPPERS, explain_in_steps
from heatlens_server.maps.steps.job import at_once
from heatlens_server.maps.steps.network import results

_OF_TORCH: Mapping[Method, str] = {
    Method.SHAPLEY_CAM: "it differentiates twice",
    Method.FULL_GRAD: "it differentiates by the biases of all layers",
    Method.LE_GRAD: "it differentiates by the attention of all blocks",
    Method.GUIDED_GRAD_CAM: "it changes how activation functions are differentiated",
}
"""Why this engine lacks methods."""


class NetworkEngine:
    """Explains with a network's graphs, on a CPU or an NVIDIA GPU. Implements `core.engine.SteppingEngine`."""

    def __init__(
        self,
        network: NetworkGraphs,
        *,
        device: str = "auto",
        provider: str = "auto",
        threads: int | None = None,
        optimised: bool = True,
    ) -> None:
        """Open the default layer's sessions; other layers' are opened when they are first asked for.

        Args:
            network: what to run.
            device: "auto", "cpu", "cuda" or "cuda:N".
            provider: "auto", "cpu", "cuda" or "tensorrt".
            threads: for one run on a CPU; None for as many as there are cores for this process.
            optimised: whether onnxruntime may put other operators in the place of the graphs'.

        Raises:
            ModelLoadError: onnxruntime does not run the graphs, or not where it should.
        """
        runtime = load_runtime()
        self._about = about = network.info
        precision = "fp16" if about.dtype == "float16" else "fp32"
        choice = choose_for(runtime, device=device, provider=provider, precision=precision)
        graphs = GraphNetwork(network, runtime, choice, threads=threads, optimised=optimised)
        try:
            has_gradient = graphs.has_gradient(about.layers[0].name)
        except ModelLoadError:
            raise
        # onnxruntime has an exception class for each of its status codes, and paths in their messages.
        except Exception as error:
            raise ModelLoadError(f"onnxruntime cannot open the file ({type(error).__name__})") from error
        self._layers_of = _layers_of(about, has_gradient=has_gradient)
        self._info = _capabilities(about, graphs.device, self._layers_of)
        self._graphs: GraphNetwork | None = graphs

    @property
    def info(self) -> Capabilities:
        """What this engine can do."""
        return self._info

    def can(self, spec: MapSpec) -> bool:
        """Whether this engine takes a spec."""
        return set(spec.layers) <= set(self._layers_of.get(spec.method, ()))

    def explain(self, images: ImageArray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch; see `core.engine.Engine.explain`.

        Raises:
            MemoryError: the device is out of memory.
        """
        graphs, inputs = self._network, self._network.inputs(images)
        step = len(inputs) if self._about.takes_batches else 1
        found = []
        for start in range(0, len(inputs), step):
            with _memory_errors():
                explained = at_once(graphs.explain(inputs[start : start + step], targets[start : start + step], spec))
                found += results(explained.goals, explained.maps(spec, (images.shape[1], images.shape[2])))
        return [_as_asked(result, spec) for result in found]

    def steps(self, image: ImageArray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        """Explain one image in steps; see `core.engine.SteppingEngine.steps`."""
        steps = explain_in_steps(self._network, image, target, spec, rows=rows if self._about.takes_batches else 1)
        while True:
            # Never across a yield: other work is done on this thread meanwhile.
            with _memory_errors(), silently():
                try:
                    next(steps)
                except StopIteration as stop:
                    return _as_asked(stop.value, spec)
            yield

    def is_loaded_for(self, spec: MapSpec) -> bool:  # noqa: ARG002 - whatever it is
        """True: further graphs are opened by the first request that needs them."""
        return True

    def load_for(self, spec: MapSpec) -> None:
        """Nothing is loaded beforehand."""

    def use_threads(self, count: int | None) -> None:
        """Open all sessions anew, when they are next asked for, with so many threads."""
        self._network.use_threads(count)

    def another(self) -> Self:
        """An engine for another thread; the two have the same sessions, which may be run at once."""
        return copy.copy(self)

    def factors(
        self, images: ImageArray, targets: Sequence[Target], layer: str
    ) -> tuple[Mapping[str, Array], Array, Array]:
        """What maps of logits by a layer are made of; see `graph_network.GraphNetwork.factors`."""
        return self._network.factors(self._network.inputs(images), targets, layer)

    def planes(self, images: ImageArray) -> Array:
        """Images (N, H, W, C), normalised, float32 (N, C, H, W)."""
        return self._network.inputs(images)

    def inputs(self, images: ImageArray) -> Array:
        """Images (N, H, W, C) as the network takes them."""
        return self._network.given(self.planes(images))

    def close(self) -> None:
        """Let go of every session. Idempotent."""
        self._graphs = None

    @property
    def _network(self) -> GraphNetwork:
        if self._graphs is None:
            raise ValueError("the engine is closed")
        return self._graphs


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn onnxruntime's errors of memory into MemoryError."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from None
        raise


def _as_asked(result: ImageResult, spec: MapSpec) -> ImageResult:
    """A result without masks, unless they are wanted."""
    return result if spec.return_mask else replace(result, mask=None, masks=None)


def _layers_of(about: NetworkInfo, *, has_gradient: bool) -> Mapping[Method, tuple[str, ...]]:
    """The layers that each method explains."""

    def is_offered(method: Method) -> bool:
        if method in about.task.traits.unsupported_methods:
            return False
        if method is Method.CAM:
            return has_gradient and about.has_linear_head
        return has_gradient or not method.traits.needs_gradient

    names = [layer.name for layer in about.layers]
    return {
        method: tuple(
            name for name in (names[:1] if method is Method.CAM else names) if (name, method) not in about.left_out
        )
        for method in Method
        if method in {*CLOSED_FORMS, *STEPPERS} and is_offered(method)
    }


def _capabilities(about: NetworkInfo, device: str, layers_of: Mapping[Method, tuple[str, ...]]) -> Capabilities:
    names = [layer.name for layer in about.layers]
    methods = tuple(method for method, layers in layers_of.items() if names[0] in layers)
    offered = tuple(name for name in names if any(name in layers_of[method] for method in methods))
    input_px = about.preprocess.crop_px or (0, 0)
    missing = {method: f"{why}, which takes PyTorch" for method, why in _OF_TORCH.items()}
    return Capabilities(
        engine_name="onnxruntime",
        device=device,
        precision="fp16" if about.dtype == "float16" else "fp32",
        input_height_px=input_px[0],
        input_width_px=input_px[1],
        class_count=about.class_count,
        methods=methods,
        layers=offered,
        task=about.task,
        input_channels=about.preprocess.channels,
        scores=(about.score,) if about.score else about.task.traits.scores,
        has_options=True,
        layers_by_method={method: layers_of[method] for method in methods if layers_of[method] != offered},
        threshold=about.threshold,
        runs_one_by_one=not about.takes_batches,
        takes_steps=True,
        refusals={**missing, **about.refusals},
        weights_bytes=about.weights_bytes,
        layer_shapes={layer.name: (layer.channels, layer.height, layer.width) for layer in about.layers},
    )
