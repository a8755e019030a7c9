"""U-Nets whose output channels are masks by sigmoid, and the same networks written for softmax."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(ins: int, outs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1), nn.ReLU())


class UNet(nn.Module):
    """Two levels down and up again; sides must be multiples of 4."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.a, self.b, self.bottom, self.pool = _block(3, 8), _block(8, 16), _block(16, 32), nn.MaxPool2d(2)
        self.up2, self.d2 = nn.ConvTranspose2d(32, 16, 2, 2), _block(32, 16)
        self.up1, self.d1 = nn.ConvTranspose2d(16, 8, 2, 2), _block(16, 8)
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(self.pool(a))
        y = self.d2(torch.cat([self.up2(self.bottom(self.pool(b))), b], 1))
        return self.head(self.d1(torch.cat([self.up1(y), a], 1)))


class Changed(nn.Module):
    """A network whose output is changed by a function."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner = inner
        self.change = change

    def forward(self, x: Tensor) -> object:
        return self.change(self.inner(x))


class Sides(nn.Module):
    """Of each channel z of a network the two logits (0, z): their softmax gives the second what the sigmoid of z is."""

    def __init__(self, one: nn.Module, channel: int) -> None:
        super().__init__()
        self.one = one
        self.channel = channel

    def forward(self, x: Tensor) -> Tensor:
        z = self.one(x)[:, self.channel : self.channel + 1]
        return torch.cat([torch.zeros_like(z), z], 1)


def _masks(classes: int) -> UNet:
    torch.manual_seed(0)
    net = UNet(classes)
    with torch.no_grad():
        # So that photos have pixels on both sides of 0.
        net.head.weight.mul_(20)
    return net.eval()


def one() -> nn.Module:
    """One mask."""
    return _masks(1)


def three() -> nn.Module:
    """Three masks, which overlap."""
    net = _masks(3)
    with torch.no_grad():
        net.head.bias.copy_(torch.tensor([0.4, -0.4, -0.2]))
    return net


def sides_of_one() -> nn.Module:
    """The network of `one`, for softmax: class 1 is its mask."""
    return Sides(one(), 0)


def three_sigmoid() -> nn.Module:
    return Changed(three(), torch.sigmoid).eval()


def three_softmax() -> nn.Module:
    return Changed(three(), lambda z: F.softmax(z, 1)).eval()


def three_log_softmax() -> nn.Module:
    return Changed(three(), lambda z: F.log_softmax(z, 1)).eval()


def three_hidden_sigmoid() -> nn.Module:
    """Whose sigmoid is written in a way that nobody sees."""
    return Changed(three(), lambda z: 1 / (1 + torch.exp(-z))).eval()


def three_in_object() -> nn.Module:
    """Beside other maps, as in transformers."""
    return Changed(three(), lambda z: SimpleNamespace(logits=z, features=torch.cat([z, z], 1))).eval()


def three_in_tuple() -> nn.Module:
    """With the scores of a head for training alone."""
    return Changed(three(), lambda z: (z, z.flip(1))).eval()


def one_squeezed() -> nn.Module:
    return Changed(one(), lambda z: z.squeeze(1)).eval()


def three_ids() -> nn.Module:
    """Class ids, whose scores are lost."""
    return Changed(three(), lambda z: z.argmax(1)).eval()
