"""The torch engine: the model as it is, hooks on its layers, a backward pass over the tail alone.

It is the reference that every other engine is compared with, and the one that has every method.
"""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Self

from heatlens_server.backends.torch.goals.table import task_model
from heatlens_server.backends.torch.network.device import memory_errors, recording_allowed, run_on_threads, wait_for
from heatlens_server.backends.torch.network.hooks import copied
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.table import PASSES, explain
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.stepping import TorchNetwork
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import Capabilities, MapSpec, Steps
from heatlens_server.core.errors import InvalidArgument, ModelLoadError
from heatlens_server.core.grid import Layout
from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target
from heatlens_server.maps.steps.drive import STEPPERS, explain_in_steps
from heatlens_server.maps.steps.job import at_once
from heatlens_server.maps.steps.network import results


class TorchEngine:
    """Explains with PyTorch, on a CPU or a CUDA device. Implements `core.engine.SteppingEngine`.

    The module given is moved to the device and frozen; the engine owns it from then on.
    """

    def __init__(self, model: LoadedModel, *, device: str = "auto", precision: str = "fp32") -> None:
        """Prepare the model and check that it can be explained.

        Raises:
            ModelLoadError: no such device or precision, or the score does not depend on a layer.
        """
        task = task_model(model)
        if precision != "fp32" and not model.task.traits.runs_in_half_precision:
            raise ModelLoadError(f"precision: a model for {model.task} runs in fp32, not {precision}")
        self._threads: int | None = None
        self._model = TorchModel(model, task, device=device, precision=precision)
        try:
            self._model.check()
        except BaseException:
            self._model.close()
            raise
        height_px, width_px = model.preprocess.crop_px or (0, 0)
        offered = {*CLOSED_FORMS, *PASSES, *STEPPERS} - model.task.traits.unsupported_methods
        refusals, layers_by_method = self._lack_of_gradients(offered)
        offered -= refusals.keys()
        if self._model.head_weight is None:
            offered -= {Method.CAM}
        if self._model.attention is None:
            offered -= {Method.LE_GRAD}
        multi_map_layers = frozenset(layer for layer in model.layers if model.grid(layer).layout is Layout.PYRAMID)
        if multi_map_layers == set(model.layers):
            offered = {method for method in offered if method.traits.takes_multi_map_layers}
        self._info = Capabilities(
            engine_name="torch",
            device=str(self._model.device),
            precision=precision,
            input_height_px=height_px,
            input_width_px=width_px,
            class_count=model.class_count,
            methods=tuple(method for method in Method if method in offered),
            layers=model.layers,
            task=model.task,
            input_channels=model.preprocess.channels,
            scores=model.task.traits.scores,
            has_options=True,
            multi_map_layers=multi_map_layers,
            layers_by_method=layers_by_method,
            runs_one_by_one=self._model.mixes_batch,
            takes_steps=True,
            refusals=refusals,
            threshold=model.threshold,
            layer_shapes=self._model.layer_shapes,
            weights_bytes=sum(one.nbytes for one in (*model.module.parameters(), *model.module.buffers())),
        )

    @property
    def info(self) -> Capabilities:
        """What this engine can do."""
        return self._info

    def explain(self, images: ImageArray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch; see `core.engine.Engine.explain`.

        The forward pass runs once, whatever the number of classes; each class costs one backward pass over the tail.

        Raises:
            InvalidArgument: the method cannot explain a layer, or the image lacks what is asked for.
            MemoryError: the device is out of memory.
        """
        self._check_layers(spec)
        if self._info.runs_one_by_one and len(images) > 1:
            places = range(len(images))
            return [self.explain(images[n : n + 1], [targets[n]], spec)[0] for n in places]
        run_on_threads(self._threads)
        with memory_errors(), recording_allowed():
            explained = at_once(explain(self._model, self._model.inputs(images), targets, spec))
            found = results(explained.goals, explained.maps(spec, (images.shape[1], images.shape[2])))
        return [_as_asked(result, spec) for result in found]

    def steps(self, image: ImageArray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        """Explain one image in steps; see `core.engine.SteppingEngine.steps`."""
        self._check_layers(spec)
        rows = 1 if self._info.runs_one_by_one else rows
        steps = explain_in_steps(TorchNetwork(self._model), image, target, spec, rows=rows)
        while True:
            run_on_threads(self._threads)
            # Never across a yield: other work is done on this thread meanwhile.
            with memory_errors(), recording_allowed():
                try:
                    next(steps)
                    # How long a step takes is measured, and others have the device after it.
                    wait_for(self._model.device)
                except StopIteration as stop:
                    return _as_asked(stop.value, spec)
            yield

    def is_loaded_for(self, spec: MapSpec) -> bool:  # noqa: ARG002 - whatever it is
        """True: everything is loaded from the start."""
        return True

    def load_for(self, spec: MapSpec) -> None:
        """Everything is loaded already."""

    def use_threads(self, count: int | None) -> None:
        """Run on so many threads of a CPU from now on."""
        self._threads = count

    def another(self) -> Self:
        """An engine for another thread: a copy of the network, which keeps what it likes on itself, with the weights.

        Raises:
            ModelLoadError: the network cannot be copied.
        """
        module = self._model.module
        try:
            own = copied(module, shared=itertools.chain(module.parameters(), module.buffers()))
        # Foreign code may refuse in any way.
        except Exception as error:
            raise ModelLoadError(f"instances: the network cannot be copied ({type(error).__name__})") from error
        model = dataclasses.replace(self._model.model, module=own)
        made = type(self)(model, device=self._info.device, precision=self._info.precision)
        made.use_threads(self._threads)
        return made

    def close(self) -> None:
        """Take every hook off the model and let go of it. Idempotent."""
        self._model.close()

    def _lack_of_gradients(
        self, offered: Collection[Method]
    ) -> tuple[dict[Method, str], dict[Method, tuple[str, ...]]]:
        """What layers without a gradient take away: methods, with the reason, and layers of others."""
        without, layers = self._model.without_gradient, self._model.model.layers
        refusals: dict[Method, str] = {}
        layers_by_method: dict[Method, tuple[str, ...]] = {}
        with_gradient = tuple(layer for layer in layers if layer not in without)
        for method in offered if without else ():
            if not method.traits.needs_gradient:
                continue
            # Methods of the whole network go past the default layer.
            if layers[0] in without and (not with_gradient or method.traits.always_at_input_size):
                refusals[method] = without[layers[0]]
            else:
                layers_by_method[method] = with_gradient
        return refusals, layers_by_method

    def _check_layers(self, spec: MapSpec) -> None:
        fit = self._info.layers_of(spec.method)
        for place, layer in enumerate(spec.layers):
            why = self._model.without_gradient.get(layer)
            if layer in self._info.multi_map_layers:
                why = "it is several maps at once"
            if layer not in fit and why:
                raise InvalidArgument.of(
                    f"layers[{place}]",
                    f"{spec.method} does not explain {layer!r}: {why}; it explains: "
                    f"{', '.join(fit) or 'no layer of this model'}",
                    reason="INVALID_OPTION",
                )


def _as_asked(result: ImageResult, spec: MapSpec) -> ImageResult:
    """A result without masks, unless they are wanted."""
    return result if spec.return_mask else dataclasses.replace(result, mask=None, masks=None)
