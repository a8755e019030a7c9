"""Small networks for tests: seeded, untrained, with heads whose gradients are not zero."""

import copy
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

CLASS_COUNT = 10
INPUT_PX = 64


_made: dict[int, nn.Module] = {}


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network of its own, with the weights of its seed."""
    if seed not in _made:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _made[seed] = make()
    return copy.deepcopy(_made[seed])


def make_all() -> None:
    """Draw every network's weights now: servers load models side by side, and all threads share torch's generator."""
    for make in (tiny, tiny_mlp, no_grad_backbone, poisonous, slow):
        make()


class Tiny(nn.Module):
    """Two convolutions, each with a ReLU in place, and a linear head over pooled activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(16, CLASS_COUNT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((-2, -1)))


class TinyMlp(Tiny):
    """The same, with a hidden layer in the head: CAM does not apply, and gradients differ from pixel to pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * 8 * 8, 32), nn.ReLU(inplace=True), nn.Linear(32, CLASS_COUNT)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


class NoGradBackbone(Tiny):
    """A backbone that its author runs under no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.body(self.stem(x))
        return self.head(features.mean((-2, -1)))


class Poisonous(Tiny):
    """Raises if any image of the batch is all white (with ImageNet normalisation)."""

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((1, 2, 3))
        if bool((means >= means.new_tensor(2.2)).any()):
            raise RuntimeError("secret-poison-text")
        return super().forward(x)


def tiny() -> nn.Module:
    """CAM-able: GAP and one linear layer."""
    return _seeded(Tiny, 0)


def negative() -> nn.Module:
    """As `tiny`, but nothing speaks for any class: the weights of its head are negative, so Grad-CAM is 0."""
    network = tiny()
    with torch.no_grad():
        network.head.weight.abs_().neg_()
    return network


def tiny_mlp() -> nn.Module:
    """A head with a hidden layer."""
    return _seeded(TinyMlp, 1)


def of_channels(channels: int) -> nn.Module:
    """As `tiny_mlp`, for images of so many channels."""
    network = tiny_mlp()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(channels)
        network.stem[0] = nn.Conv2d(channels, 8, 3, stride=4, padding=1)
    return network


def no_grad_backbone() -> nn.Module:
    """Its own forward switches gradients off before the target layer."""
    return _seeded(NoGradBackbone, 2)


def poisonous() -> nn.Module:
    """Fails on white images."""
    return _seeded(Poisonous, 3)


def broken() -> nn.Module:
    """A factory that fails, with a path in its message."""
    raise OSError("no such file: /secret/path/weights.bin")


class Slow(Tiny):
    """Once a file `armed` is in SLOW_FOLDER, leaves a file `seen` there and takes SLOW_S seconds per batch."""

    def forward(self, x: Tensor) -> Tensor:
        folder = Path(os.environ["SLOW_FOLDER"])
        if (folder / "armed").exists():
            (folder / "seen").touch()
            time.sleep(float(os.environ.get("SLOW_S", "1")))
        return super().forward(x)


def slow() -> nn.Module:
    """Slow on purpose."""
    return _seeded(Slow, 4)


def telling() -> nn.Module:
    """The logit of its first class, the most probable one, is about the number of the process that it runs in."""
    network = tiny_mlp()
    with torch.no_grad():
        network.head[-1].weight[0] *= 1e-3
        network.head[-1].bias[0] = os.getpid()
    return network


# Networks and factories that misbehave in ways that real ones do.


class Exits(Tiny):
    """Calls sys.exit for white images."""

    def forward(self, x: Tensor) -> Tensor:
        if bool((x.mean((1, 2, 3)) >= 2.2).any()):
            sys.exit("secret-exit-text")
        return super().forward(x)


def exits_in_forward() -> nn.Module:
    """A network that ends the process, if it is let."""
    return _seeded(Exits, 5)


def exits_in_factory() -> nn.Module:
    """A factory that ends the process, if it is let."""
    sys.exit(3)


class Crashes(Tiny):
    """Does what a file `crash` in SLOW_FOLDER says, once: is killed by a signal, ends the process, or keeps memory."""

    def forward(self, x: Tensor) -> Tensor:
        order = Path(os.environ["SLOW_FOLDER"]) / "crash"
        if order.exists():
            what = order.read_text()
            order.unlink()
            if what == "exit":
                os._exit(3)
            elif what == "leak":
                self.kept = torch.ones(100_000_000)
            elif what == "sleep":
                time.sleep(3600)
            else:
                os.kill(os.getpid(), getattr(signal, what))
        return super().forward(x)


def crashes() -> nn.Module:
    """A network that ends the process when it is told to."""
    return _seeded(Crashes, 6)


def not_finite() -> nn.Module:
    """All weights are NaN."""
    module = tiny()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    return module


def ends_in_factory() -> nn.Module:
    """A factory that ends the process without a word."""
    os._exit(7)
