"""Running a network with some of torch's functions replaced, wherever in the network they are called.

Modules keep their hooks, classes and attributes: the functions are replaced for the thread that runs the network, and
for that run only, so threads that share a network do not meet. Everything runs with gradients enabled: parts that a
network runs under `no_grad` are differentiated too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
