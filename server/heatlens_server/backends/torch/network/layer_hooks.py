"""Catching, or changing, what layers return in one call, with hooks that are registered once and hold no call's data.

A forward hook on each explainable layer looks for the calling thread's tape. With no tape, or a layer that the tape
does not want, it does nothing. Otherwise the layer's output becomes the leaf of a new graph: the network before it
builds no graph at all (its parameters are frozen), so differentiating the score costs the tail only.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.grid import Output

Change = Callable[[Output], Output]
"""Makes what goes on through the network of what a layer returned."""


class Tape:
    """What one forward pass does at the layers that it wants.

    Attributes:
        outputs: what each recorded layer gave, in the order the layers ran.
    """

    __slots__ = ("_changes", "_differentiate", "_wanted", "outputs")

    def __init__(
        self, layers: Sequence[str] = (), *, differentiate: bool = False, changes: Mapping[str, Change] | None = None
    ) -> None:
        self._wanted = frozenset(layers)
        self._differentiate = differentiate
        self._changes = changes or {}
        self.outputs: dict[str, Output] = {}

    def pass_on(self, layer: str, output: Output) -> Output | None:
        """Do what is wanted at a layer; what is returned, if anything, goes on in the place of its output."""
        if layer in self._changes:
            return self._changes[layer](output)
        if layer not in self._wanted:
            return None
        if not self._differentiate or not isinstance(output, Tensor):
            # The next module may work in place (a ReLU after a convolution), so keep a copy.
            self.outputs[layer] = output.clone() if isinstance(output, Tensor) else _copies(output)
            return None
        # The model's own forward may run this layer under no_grad: recording starts here all the same.
        with torch.enable_grad():
            # A layer that follows another wanted one is part of that one's graph already: cutting it out
            # would leave the earlier layer without a gradient.
            activation = output if output.requires_grad else output.detach().requires_grad_()
            self.outputs[layer] = activation
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
        def pass_on(_module: nn.Module, _args: tuple[Any, ...], output: Output) -> Output | None:
            tape: Tape | None = getattr(self._local, "tape", None)
            return None if tape is None else tape.pass_on(layer, output)

        return pass_on

    @contextmanager
    def playing(self, tape: Tape) -> Iterator[Tape]:
        """Use a tape in the forward passes of this thread."""
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


def _copies(levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: level.clone() for name, level in levels.items()}
