"""Networks and factories that misbehave in ways that real ones do."""

import sys

import torch
from torch import Tensor, nn

from tiny_models import Tiny, tiny


class Exits(Tiny):
    """Calls sys.exit for white images."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x.mean((1, 2, 3)) >= 2.2).any()):
            sys.exit("secret-exit-text")
        return super().forward(x)


def exits_in_forward() -> nn.Module:
    """A network that ends the process, if it is let."""
    torch.manual_seed(5)
    return Exits()


def exits_in_factory() -> nn.Module:
    """A factory that ends the process, if it is let."""
    sys.exit(3)


def not_finite() -> nn.Module:
    """All weights are NaN."""
    module = tiny()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    return module
