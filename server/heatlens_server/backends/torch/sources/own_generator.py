"""Random weights that no other thread can disturb: torch has one generator for all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_GENERATOR = "generator"


class OwnGenerator(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """A context in which this thread draws from a generator of its own on the CPU, seeded with 0.

    It draws what torch's own generator would, seeded with 0, if no other thread drew at the same time, as networks with
    dropout at inference do.
    """

    def __init__(self) -> None:
        """Seed the generator."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what any function of torch's returns
        """Run an operator; one that draws, with the generator."""
        given = dict(kwargs or {})
        drawing = _with_generator(func)
        if drawing is None or given.get(_GENERATOR) is not None:
            return func(*args, **given)
        return drawing(*args, **given, **{_GENERATOR: self._generator})


def _with_generator(func: OpOverload[..., Any]) -> Callable[..., Any] | None:
    """The form of an operator that takes a generator; None of one that draws nothing."""
    if any(argument.name == _GENERATOR for argument in func._schema.arguments):  # noqa: SLF001 - has no other name
        return func
    # "rand" draws as "rand.generator" does, "randint.low" as "randint.low_generator".
    form = func._overloadname  # noqa: SLF001
    name = _GENERATOR if form == "default" else f"{form}_{_GENERATOR}"
    packet = func.overloadpacket
    return getattr(packet, name) if name in packet.overloads() else None
