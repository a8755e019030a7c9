"""Stepping into a forward pass: layers' outputs caught or changed by hooks, torch's functions replaced by others.

A forward hook on each explainable layer looks for the calling thread's recording. Without one, or in a layer that it
does not want, the hook does nothing. Otherwise the layer's output becomes the leaf of a new graph: the network before
it builds no graph at all (its parameters are frozen), so differentiating the score costs the tail only. Hooks are
registered once and hold no call's data.

Functions are replaced wherever in the network they are called, for the thread that runs it and for that run only:
modules keep their hooks, classes and attributes, and threads that share a network do not meet.
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from heatlens_server.backends.torch.cam.grid import LayerOutput

Change = Callable[[LayerOutput], LayerOutput]
"""Makes what goes on through the network of what a layer returned."""


class Recording:
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
        self.outputs: dict[str, LayerOutput] = {}

    def pass_on(self, layer: str, output: LayerOutput) -> LayerOutput | None:
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


class LayerHooks:
    """The hooks on a model's explainable layers, and the current recording of each thread."""

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        self._local = threading.local()
        self._handles = [
            module.get_submodule(layer).register_forward_hook(self._hook(layer)) for layer in dict.fromkeys(layers)
        ]

    def _hook(self, layer: str) -> Any:  # noqa: ANN401 - torch's own hook type is this loose
        def pass_on(_module: nn.Module, _args: tuple[Any, ...], output: LayerOutput) -> LayerOutput | None:
            recording: Recording | None = getattr(self._local, "recording", None)
            return None if recording is None else recording.pass_on(layer, output)

        return pass_on

    @contextmanager
    def active(self, recording: Recording) -> Iterator[Recording]:
        """Use a recording in the forward passes of this thread."""
        self._local.recording = recording
        try:
            yield recording
        finally:
            self._local.recording = None

    def remove(self) -> None:
        """Take every hook off the model. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def copied(module: nn.Module, *, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A network's copy, which shares some of its tensors and has no hook of `LayerHooks`; others are the network's."""
    copy_of: nn.Module = copy.deepcopy(module, {id(tensor): tensor for tensor in shared})
    for child in copy_of.modules():
        hooks = child._forward_hooks  # noqa: SLF001 - copied with the module, and there is no other way
        for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", "") == __name__]:
            del hooks[key]
    return copy_of


def _copies(levels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: level.clone() for name, level in levels.items()}


Substitutes = Mapping[Callable[..., Any], Callable[..., Any]]
"""What is called instead of a function, with its arguments, by function. In there the functions are torch's own."""


class Substitution(TorchFunctionMode):
    """A context in which functions are replaced. Only those that networks call, not those that others are made of."""

    def __init__(self, substitutes: Substitutes) -> None:
        """Say which functions, and by what."""
        super().__init__()
        self._substitutes = substitutes

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what any function of torch's returns
        """Run a function of torch's, or what replaces it."""
        with torch.enable_grad():
            return self._substitutes.get(func, func)(*args, **(kwargs or {}))
