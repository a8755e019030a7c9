"""Catching the activations of one call, with hooks that are registered once and hold no call's data.

A forward hook on each explainable layer looks for the calling thread's tape. With no tape, or a layer that the tape
does not want, it does nothing. Otherwise the layer's output becomes the leaf of a new graph: the network before it
builds no graph at all (its parameters are frozen), so differentiating the score costs the tail only.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Tape:
    """The activations of one forward pass.

    Attributes:
        activations: what each wanted layer gave, shape (N, A, h, w), in the order the layers ran.
    """

    __slots__ = ("_differentiate", "_wanted", "activations")

    def __init__(self, layers: Sequence[str], *, differentiate: bool) -> None:
        self._wanted = frozenset(layers)
        self._differentiate = differentiate
        self.activations: dict[str, Tensor] = {}

    def wants(self, layer: str) -> bool:
        """Whether this pass records that layer."""
        return layer in self._wanted

    def record(self, layer: str, output: Tensor) -> Tensor | None:
        """Keep a layer's output; the returned tensor, if any, goes on through the network in its place."""
        if not self._differentiate:
            # The next module may work in place (a ReLU after a convolution), so keep a copy.
            self.activations[layer] = output.clone()
            return None
        # The model's own forward may run this layer under no_grad: recording starts here all the same.
        with torch.enable_grad():
            # A layer that follows another wanted one is part of that one's graph already: cutting it out
            # would leave the earlier layer without a gradient.
            activation = output if output.requires_grad else output.detach().requires_grad_()
            self.activations[layer] = activation
            # The clone is what an in-place module downstream may overwrite.
            return activation.clone()


class TapeRecorder:
    """The hooks on a model's explainable layers, and the current tape of each thread."""

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        self._local = threading.local()
        self._handles = [
            module.get_submodule(layer).register_forward_hook(self._hook(layer)) for layer in dict.fromkeys(layers)
        ]

    def _hook(self, layer: str) -> Any:  # noqa: ANN401 - torch's own hook type is this loose
        def record(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            tape: Tape | None = getattr(self._local, "tape", None)
            if tape is None or not tape.wants(layer):
                return None
            return tape.record(layer, output)

        return record

    @contextmanager
    def recording(self, layers: Sequence[str], *, differentiate: bool) -> Iterator[Tape]:
        """Record `layers` during forward passes of this thread.

        Args:
            layers: names given at construction.
            differentiate: True if gradients with respect to the activations will be asked for.
        """
        tape = Tape(layers, differentiate=differentiate)
        self._local.tape = tape
        try:
            yield tape
        finally:
            self._local.tape = None

    def remove(self) -> None:
        """Take every hook off the model. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
