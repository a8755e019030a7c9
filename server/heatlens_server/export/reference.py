"""What an exported graph should say, from the network itself: hooks and autograd, and none of the exporter's code."""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from heatlens_server.errors import ExportError
from heatlens_server.imaging.preprocess import PreprocessSpec

# In half precision the score is scaled before the backward pass, as engines do; see engines.torch_engine.
_FP16_GRADIENT_SCALE = 2.0**8

_CHUNK = 4
"""Images that are run together."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What a network says about N images.

    Attributes:
        logits: (N, C).
        class_ids: int64 (N, K), the classes explained.
        activations: (N, A, h, w), the target layer's output.
        gradients: (N, K, A, h, w), of each explained class's logit.
    """

    logits: Tensor
    class_ids: Tensor
    activations: Tensor
    gradients: Tensor


class Network:
    """A network in a precision of its own: the model's module itself in float32, a copy in any other."""

    def __init__(self, module: nn.Module, preprocess: PreprocessSpec, dtype: torch.dtype) -> None:
        self._module = module if dtype is torch.float32 else copy.deepcopy(module).to(dtype)
        self._preprocess = preprocess
        self._dtype = dtype

    def explain(
        self, pixels: npt.NDArray[np.uint8], layers: Sequence[str], class_ids: Tensor | int
    ) -> dict[str, Reference]:
        """Run the network on images and differentiate the logits of K classes each by some layers' outputs.

        Args:
            pixels: uint8 (N, H, W, 3), RGB.
            layers: the target layers' module names.
            class_ids: int64 (N, K), or K for the K most probable classes of every image.

        Returns:
            By layer; in float64 for a float64 network, in float32 for others.

        Raises:
            ExportError: the network fails in this precision, or its logits do not depend on a layer.
        """
        chunks = [slice(start, start + _CHUNK) for start in range(0, len(pixels), _CHUNK)]
        try:
            with torch.inference_mode(mode=False), torch.enable_grad():
                parts = [
                    self._chunk(pixels[chunk], layers, class_ids if isinstance(class_ids, int) else class_ids[chunk])
                    for chunk in chunks
                ]
        # A network is somebody else's code and may raise anything; many have a dtype written into them.
        except Exception as error:
            name = str(self._dtype).removeprefix("torch.")
            raise ExportError(
                f"the network cannot be run in {name} to verify the export ({type(error).__name__})"
            ) from error
        return {
            layer: Reference(
                logits=torch.cat([part[layer].logits for part in parts]),
                class_ids=torch.cat([part[layer].class_ids for part in parts]),
                activations=torch.cat([part[layer].activations for part in parts]),
                gradients=torch.cat([part[layer].gradients for part in parts]),
            )
            for layer in layers
        }

    def _chunk(
        self, pixels: npt.NDArray[np.uint8], layers: Sequence[str], class_ids: Tensor | int
    ) -> dict[str, Reference]:
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
            logits = _logits_of(self._module(self._normalised(pixels)))
        finally:
            for handle in handles:
                handle.remove()
        if isinstance(class_ids, int):
            class_ids = torch.sort(logits.detach(), dim=1, descending=True, stable=True).indices[:, :class_ids]
        scale = _FP16_GRADIENT_SCALE if self._dtype is torch.float16 else 1.0
        activations = [kept[layer] for layer in layers]
        by_class = [
            torch.autograd.grad(logits.gather(1, ids[:, None]).sum() * scale, activations, retain_graph=True)
            for ids in class_ids.unbind(1)
        ]
        return {
            layer: Reference(
                logits=_widened(logits.detach()),
                class_ids=class_ids,
                activations=_widened(kept[layer].detach()),
                gradients=_widened(torch.stack(gradients, dim=1)) / scale,
            )
            for layer, gradients in zip(layers, zip(*by_class, strict=True), strict=True)
        }

    def _normalised(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """(N, 3, H, W) in the network's precision, computed in no less than float32."""
        dtype = torch.promote_types(self._dtype, torch.float32)
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(dtype)
        mean = torch.tensor(self._preprocess.mean, dtype=dtype).view(1, 3, 1, 1)
        std = torch.tensor(self._preprocess.std, dtype=dtype).view(1, 3, 1, 1)
        return ((values / 255.0 - mean) / std).to(self._dtype)


@contextmanager
def unhurried(module: nn.Module) -> Iterator[None]:
    """Let torch run a network with grouped convolutions on one thread, if this is the process's main thread.

    They are many tiny parallel sections, in float64 one for every group. Where anything else runs on the machine,
    threads that wait for each other at the end of each take 6 to 40 times as long as one thread does. In other threads
    nothing is changed: threads of an engine that begin meanwhile would keep the number.
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


def pooled(gradients: Tensor) -> Tensor:
    """Mean gradient of every channel, (N, K, A, h, w) to (N, K, A): Grad-CAM's channel weights."""
    return gradients.mean((-2, -1))


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _logits_of(output: object) -> Tensor:
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"{type(output).__name__} instead of logits")
    return logits
