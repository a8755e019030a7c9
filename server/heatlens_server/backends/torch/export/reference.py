"""What an exported graph should say, from the network itself: hooks and autograd, and none of the exporter's code."""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.grid import MAP, to_map
from heatlens_server.backends.torch.cam.targets import class_scores
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.errors import ExportError
from heatlens_server.core.methods import Score
from heatlens_server.maps.precision import FP16_GRADIENT_SCALE

_CHUNK = 4
"""Images that are run together."""

_OTHER_CHUNK = 3
"""The same, for the run that must agree with the others: no batch of it holds the images of another's."""

_REPEATED = 1e-4
"""What a network's figures may differ by when the same batch is run again, relative to the image's largest."""

_REBATCHED = 1e-3
"""The same in other batches, for which torch may choose other algorithms."""

MOVES = 8
"""How many copies with moved weights tell what float32 determines."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What a network says about N images.

    Attributes:
        logits: (N, C).
        class_ids: int64 (N, K), the classes explained.
        activations: (N, A, h, w), the target layer's output as a map.
        gradients: (N, K, A, h, w), of each explained class's score.
    """

    logits: Tensor
    class_ids: Tensor
    activations: Tensor
    gradients: Tensor


class Network:
    """A network in a precision of its own: the model's module itself in float32, a copy in any other."""

    def __init__(self, model: LoadedModel, dtype: torch.dtype) -> None:
        module = model.module
        self._module = module if dtype is torch.float32 else copy.deepcopy(module).to(dtype)
        self._preprocess = model.preprocess
        self._grids = model.grids
        self._reading = model.reading
        self._dtype = dtype

    def explain(
        self,
        pixels: npt.NDArray[np.uint8],
        layers: Sequence[str],
        class_ids: Tensor | int,
        *,
        score: Score = Score.LOGIT,
        sigmoid: bool = False,
    ) -> dict[str, Reference]:
        """Run the network on images and differentiate the scores of K classes each by some layers' outputs.

        Args:
            pixels: uint8 (N, H, W, C).
            layers: the target layers' module names.
            class_ids: int64 (N, K), or K for the K most probable classes of every image.
            score: what is differentiated.
            sigmoid: whether a class's probability is the sigmoid of its logit.

        Returns:
            By layer; in float64 for a float64 network, in float32 for others.

        Raises:
            ExportError: the network fails in this precision, or its logits do not depend on a layer.
        """
        scores = partial(class_scores, kind=score, sigmoid=sigmoid)

        def run(start: int) -> dict[str, Reference]:
            chunk = slice(start, start + _CHUNK)
            ids = class_ids if isinstance(class_ids, int) else class_ids[chunk]
            return self._chunk(pixels[chunk], layers, ids, scores)

        parts = self._guarded(lambda: [run(start) for start in range(0, len(pixels), _CHUNK)])
        return {layer: _joined([part[layer] for part in parts]) for layer in layers}

    def check_steady(self, pixels: npt.NDArray[np.uint8], layers: Sequence[str]) -> None:
        """Check that logits and activations of an image are the same in every run and every batch.

        Args:
            pixels: uint8 (N, H, W, C).
            layers: whose activations are compared.

        Raises:
            ExportError: they are not, or the network fails in this precision.
        """
        backwards = np.arange(len(pixels))[::-1]
        first = self._figures(pixels, layers, _CHUNK)
        if not _agree(first, self._figures(pixels, layers, _CHUNK), _REPEATED):
            raise ExportError(
                "the network gives different results for the same image: random operations, or state kept between calls"
            )
        again = self._figures(pixels[backwards], layers, _OTHER_CHUNK)
        if not _agree(first, [figure[backwards.copy()] for figure in again], _REBATCHED):
            raise ExportError(
                "the network gives different results for the same image in another batch: they depend on the other "
                "images, or on state kept between calls"
            )

    def _figures(self, pixels: npt.NDArray[np.uint8], layers: Sequence[str], chunk: int) -> list[Tensor]:
        """Logits and every layer's activations, one row per image."""

        def run(start: int) -> list[Tensor]:
            logits, kept = self._forward(pixels[start : start + chunk], layers)
            tensors = (logits, *(kept[layer] for layer in layers))
            return [_at_least_float32(tensor.detach()).flatten(1) for tensor in tensors]

        parts = self._guarded(lambda: [run(start) for start in range(0, len(pixels), chunk)])
        return [torch.cat(figure) for figure in zip(*parts, strict=True)]

    def _guarded(self, run: Callable[[], _T]) -> _T:
        """Run the network with gradients.

        Raises:
            ExportError: it fails in this precision.
        """
        try:
            with torch.inference_mode(mode=False), torch.enable_grad():
                return run()
        # A network is foreign code and may raise anything; many have a dtype written into them.
        except Exception as error:
            name = str(self._dtype).removeprefix("torch.")
            raise ExportError(
                f"the network cannot be run in {name} to verify the export ({type(error).__name__})"
            ) from error

    def _forward(self, pixels: npt.NDArray[np.uint8], layers: Sequence[str]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Run one batch; return its logits, and by layer the activations that they can be differentiated by."""
        kept: dict[str, Tensor] = {}

        def keep(layer: str, output: Tensor) -> Tensor:
            # The network before the first layer builds no graph: its parameters are frozen. Its author may have
            # switched gradients off for the layer itself.
            with torch.enable_grad():
                kept[layer] = output if output.requires_grad else output.detach().requires_grad_()
                # Modules downstream may work in place.
                return kept[layer].clone()

        handles = [
            self._module.get_submodule(layer).register_forward_hook(
                lambda _module, _inputs, output, layer=layer: keep(layer, output)
            )
            for layer in layers
        ]
        try:
            return self._reading(self._module, self._normalised(pixels)), kept
        finally:
            for handle in handles:
                handle.remove()

    def _chunk(
        self,
        pixels: npt.NDArray[np.uint8],
        layers: Sequence[str],
        class_ids: Tensor | int,
        scores: Callable[[Tensor, Tensor], Tensor],
    ) -> dict[str, Reference]:
        logits, kept = self._forward(pixels, layers)
        if isinstance(class_ids, int):
            class_ids = torch.sort(logits.detach(), dim=1, descending=True, stable=True).indices[:, :class_ids]
        scale = FP16_GRADIENT_SCALE if self._dtype is torch.float16 else 1.0
        activations = [kept[layer] for layer in layers]
        by_class = [
            torch.autograd.grad(scores(logits, ids[:, None]).sum() * scale, activations, retain_graph=True)
            for ids in class_ids.unbind(1)
        ]
        return {
            layer: Reference(
                logits=_at_least_float32(logits.detach()),
                class_ids=class_ids,
                activations=_at_least_float32(self._map(layer, kept[layer].detach())),
                gradients=_at_least_float32(torch.stack([self._map(layer, one) for one in gradients], dim=1)) / scale,
            )
            for layer, gradients in zip(layers, zip(*by_class, strict=True), strict=True)
        }

    def _map(self, layer: str, values: Tensor) -> Tensor:
        return to_map(values, self._grids.get(layer, MAP))

    def _normalised(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """(N, C, H, W) in the network's precision, computed in no less than float32."""
        dtype = torch.promote_types(self._dtype, torch.float32)
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(dtype)
        mean = torch.tensor(self._preprocess.mean, dtype=dtype).view(1, -1, 1, 1)
        std = torch.tensor(self._preprocess.std, dtype=dtype).view(1, -1, 1, 1)
        return ((values / 255.0 * self._preprocess.scale - mean) / std).to(self._dtype)


@contextmanager
def one_thread_for_grouped_convs(module: nn.Module) -> Iterator[None]:
    """Let torch run a network with grouped convolutions on one thread, if this is the process's main thread.

    Grouped convolutions are many tiny parallel sections, in float64 one for every group. On a machine that does other
    work too, threads that wait for each other at the end of each section take 6 to 40 times as long as one thread does.
    In other threads nothing is changed: an engine's threads that start meanwhile would keep the number.
    """
    grouped = any(isinstance(child, nn.Conv2d) and child.groups > 1 for child in module.modules())
    if not grouped or threading.current_thread() is not threading.main_thread():
        yield
        return
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


def _joined(parts: Sequence[Reference]) -> Reference:
    """One reference of all images."""
    return Reference(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Reference)))


def moved_copies(module: nn.Module) -> Iterator[nn.Module]:
    """Yield `MOVES` copies of a float32 network, every weight moved by at most two units in the last place.

    What such a move changes float32 does not determine: a ReLU whose input is zero but for rounding, say, switches a
    part of the gradient on or off.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(MOVES):
        moved = copy.deepcopy(module)
        with torch.no_grad():
            for parameter in moved.parameters():
                relative = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                parameter.copy_((parameter.double() * (1 + relative * 2.0**-22)).to(parameter.dtype))
        yield moved


def pooled(gradients: Tensor) -> Tensor:
    """Mean gradient of every channel, (N, K, A, h, w) to (N, K, A): Grad-CAM's channel weights."""
    return gradients.mean((-2, -1))


def _agree(first: Sequence[Tensor], second: Sequence[Tensor], tolerance: float) -> bool:
    """Whether figures (N, ...) of the same images differ by no more than rounding."""
    for a, b in zip(first, second, strict=True):
        # What is not finite is a matter of its own.
        same = (a == b) | (a.isnan() & b.isnan())
        unit = a.nan_to_num(0.0, 0.0, 0.0).abs().amax(1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
        if not bool((same | ((a - b).abs() <= tolerance * unit)).all()):
            return False
    return True


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
