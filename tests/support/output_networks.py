"""Classifiers that return their scores in other forms than logits (N, classes): all of one small network's scores."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_models import tiny_mlp


@dataclass
class Record:
    """As transformers' outputs: an object with attributes."""

    logits: Tensor
    hidden: object = None


class Entries(OrderedDict):
    """As transformers' outputs: a mapping whose keys are attributes too."""

    def __getattr__(self, name: str) -> object:
        if name in self:
            return self[name]
        raise AttributeError(name)


class Ends(nn.Module):
    """The small network's first scores, times a factor, and what is made of them at the end."""

    def __init__(self, end: Callable[[Tensor], object], *, classes: int = 10, factor: float = 4.0) -> None:
        super().__init__()
        self.net = tiny_mlp()
        self.end = end
        self._classes, self._factor = classes, factor

    def forward(self, x: Tensor) -> object:
        return self.end(self._factor * self.net(x)[:, : self._classes])


def _written_out(z: Tensor) -> Tensor:
    """A softmax that is no function of torch's."""
    exponentials = (z - z.amax(1, keepdim=True)).exp()
    return exponentials / exponentials.sum(1, keepdim=True)


ENDS: dict[str, Callable[[], Ends]] = {
    "logits": lambda: Ends(nn.Identity()),
    "sharp_logits": lambda: Ends(nn.Identity(), factor=400.0),
    "one_logit": lambda: Ends(nn.Identity(), classes=1),
    # Other forms.
    "mapping": lambda: Ends(lambda z: {"logits": z, "features": z[:, :, None, None].expand(-1, -1, 2, 2)}),
    "entries": lambda: Ends(lambda z: Entries(logits=z, more=z)),
    "record": lambda: Ends(Record),
    "out": lambda: Ends(lambda z: {"out": z, "aux": 2 * z}),
    "named": lambda: Ends(lambda z: {"prediction": z}),
    "listed": lambda: Ends(lambda z: [z]),
    "pair": lambda: Ends(lambda z: (2 * z, z)),
    "spatial": lambda: Ends(lambda z: z[:, :, None, None]),
    "squeezed": lambda: Ends(lambda z: z.squeeze()),
    "one_squeezed": lambda: Ends(lambda z: z.squeeze(), classes=1),
    # Activations at the end, as modules, functions and methods of tensors.
    "softmax": lambda: Ends(nn.Softmax(1)),
    "softmax_function": lambda: Ends(lambda z: F.softmax(z, dim=-1)),
    "softmax_method": lambda: Ends(lambda z: {"logits": z.softmax(1)}),
    "sharp_softmax": lambda: Ends(nn.Softmax(1), factor=400.0),
    "spatial_softmax": lambda: Ends(lambda z: z[:, :, None, None].softmax(1)),
    "log_softmax": lambda: Ends(nn.LogSoftmax(1)),
    "log_softmax_function": lambda: Ends(lambda z: torch.log_softmax(z, 1)),
    "written_out": lambda: Ends(_written_out),
    "sigmoids": lambda: Ends(nn.Sigmoid()),
    "sigmoids_in_place": lambda: Ends(lambda z: z.sigmoid_()),
    "one_sigmoid": lambda: Ends(lambda z: torch.sigmoid(z).squeeze(1), classes=1),
    "sigmoid_written_out": lambda: Ends(lambda z: 1 / (1 + (-z).exp()), classes=3),
    # What only looks like probabilities.
    "small_logits": lambda: Ends(lambda z: 0.5 + 0.01 * z),
}
"""By name, factories without arguments."""


def __getattr__(name: str) -> Callable[[], Ends]:
    """Every one of ENDS is a factory of this module, for configurations to name."""
    if name in ENDS:
        return ENDS[name]
    raise AttributeError(name)
