"""`python -m bench.defaults`: which methods find the object, in small transformers and a convolutional network.

The networks are trained here, within minutes, on photos of a cat, a cup of coffee and a rocket, each pasted on clutter
at a known place. A map is right if its peak lies on the object (the pointing game, Zhang et al. 2018,
arXiv:1608.00507), and the better the more of its sum does.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import numpy.typing as npt
import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from skimage import data
from torch import nn

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import PRESETS, Method
from heatlens_server.core.targets import ClassIds

_PX = 64
_CLASSES = ("chelsea", "coffee", "rocket")
_CLUTTER = ("brick", "grass", "gravel")
_MEAN, _STD = 0.5, 0.25
_BATCH = 32
_SCENES = 48

Array = npt.NDArray[np.uint8]
Box = tuple[int, int, int]
"""Top, left and side, in pixels."""


def class_token() -> nn.Module:
    """A vision transformer that reads its class token."""
    return _vit(class_token=True, global_pool="token")


def pooled_tokens() -> nn.Module:
    """A vision transformer that averages its tokens."""
    return _vit(class_token=False, global_pool="avg")


def windows() -> nn.Module:
    """A Swin transformer."""
    options = {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "patch_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=_PX, num_classes=len(_CLASSES), **options)


def convolutions() -> nn.Module:
    """A residual network."""
    return timm.create_model("resnet10t", num_classes=len(_CLASSES))


def _vit(**options: object) -> nn.Module:
    small = {"img_size": _PX, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=len(_CLASSES), **small, **options)


NETWORKS: dict[Callable[[], nn.Module], int] = {class_token: 500, pooled_tokens: 500, windows: 300, convolutions: 150}
"""Each with its steps of training."""


class Scenes:
    """Photos pasted on clutter, drawn from a generator."""

    def __init__(self, seed: int) -> None:
        """Read the photos."""
        self._rng = np.random.default_rng(seed)
        self._photos = {name: np.atleast_3d(getattr(data, name)()) for name in (*_CLASSES, *_CLUTTER)}

    def draw(self, count: int) -> tuple[Array, npt.NDArray[np.int64], list[Box]]:
        """Images (count, H, W, 3), their classes, and where the objects are."""
        classes = self._rng.integers(0, len(_CLASSES), count)
        scenes = [self._scene(_CLASSES[one]) for one in classes]
        return np.stack([image for image, _ in scenes]), classes, [box for _, box in scenes]

    def _scene(self, name: str) -> tuple[Array, Box]:
        image = self._crop(str(self._rng.choice(_CLUTTER)), _PX).copy()
        side = int(_PX * self._rng.uniform(0.35, 0.55))
        top, left = (int(place) for place in self._rng.integers(0, _PX - side + 1, 2))
        image[top : top + side, left : left + side] = self._crop(name, side)
        return image, (top, left, side)

    def _crop(self, name: str, px: int) -> Array:
        photo = self._photos[name]
        side = int(self._rng.uniform(0.5, 0.95) * min(photo.shape[:2]))
        top, left = (int(self._rng.integers(0, length - side + 1)) for length in photo.shape[:2])
        part = cv2.resize(photo[top : top + side, left : left + side], (px, px), interpolation=cv2.INTER_AREA)
        return np.broadcast_to(np.atleast_3d(part), (px, px, 3)).astype(np.uint8)


def train(make: Callable[[], nn.Module], steps: int, seed: int) -> tuple[nn.Module, float]:
    """Train a network; return it and the share of new scenes that it gets right."""
    torch.manual_seed(seed)
    network, scenes = make().train(), Scenes(seed)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for _ in range(steps):
        images, classes, _boxes = scenes.draw(_BATCH)
        loss = nn.functional.cross_entropy(network(_inputs(images)), torch.from_numpy(classes))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    images, classes, _boxes = scenes.draw(4 * _BATCH)
    with torch.no_grad():
        predicted = network.eval()(_inputs(images)).argmax(1).numpy()
    return network, float((predicted == classes).mean())


def _inputs(images: Array) -> torch.Tensor:
    return torch.from_numpy(((images / np.float32(255) - _MEAN) / _STD).transpose(0, 3, 1, 2)).contiguous()


def judge(network: nn.Module, factory: str, seed: int) -> dict[Method, tuple[float, float]]:
    """For each method of one pass: the share of peaks on the object, and the mean share of the map's sum."""
    images, classes, boxes = Scenes(seed + 1000).draw(_SCENES)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "trained.pth"
        torch.save(network.state_dict(), weights)
        size = {"resize_px": _PX, "crop_px": _PX, "mean": [_MEAN] * 3, "std": [_STD] * 3}
        source = f"python:{__spec__.name if __spec__ else __name__}:{factory}"
        model = load_model(ModelConfig(name="m", source=source, weights=str(weights), preprocess=size))
    engine = TorchEngine(model, device="cpu")
    found = {}
    for method in engine.info.methods:
        if method.traits.in_steps or method in PRESETS:
            continue
        spec = MapSpec(method, engine.info.layers_of(method)[:1], upsample=True)
        results = engine.explain(images, [ClassIds((int(one),)) for one in classes], spec)
        found[method] = _score([result.maps[0] for result in results], boxes)
    engine.close()
    return found


def _score(maps: Sequence[npt.NDArray[np.float32]], boxes: Sequence[Box]) -> tuple[float, float]:
    peaks, shares = [], []
    for values, (top, left, side) in zip(maps, boxes, strict=True):
        row, column = np.unravel_index(values.argmax(), values.shape)
        # A flat map points nowhere.
        peaks.append(values.max() > 0 and top <= row < top + side and left <= column < left + side)
        shares.append(values[top : top + side, left : left + side].sum() / max(float(values.sum()), 1e-12))
    return float(np.mean(peaks)), float(np.mean(shares))


def main(seeds: Annotated[int, typer.Option(help="How often each network is trained.")] = 2) -> None:
    """Print how often each method's map peaks on the object, and how much of it lies there."""
    torch.set_num_threads(1)
    tables: dict[str, list[dict[Method, tuple[float, float]]]] = {}
    right: dict[str, list[float]] = {}
    for make, steps in NETWORKS.items():
        for seed in range(seeds):
            network, accuracy = train(make, steps, seed)
            right.setdefault(make.__name__, []).append(accuracy)
            tables.setdefault(make.__name__, []).append(judge(network, make.__name__, seed))
            print(f"{make.__name__}, seed {seed}: {accuracy:.0%} right", file=sys.stderr)
    table = Table(title=f"peak on the object / share of the map there, {seeds} networks each, {_SCENES} scenes")
    table.add_column("method")
    for name in tables:
        table.add_column(f"{name} ({np.mean(right[name]):.0%} right)", justify="right")
    for method in Method:
        cells = []
        for runs in tables.values():
            scores = [run[method] for run in runs if method in run]
            cells.append(
                f"{np.mean([s[0] for s in scores]):.0%} / {np.mean([s[1] for s in scores]):.2f}" if scores else "-"
            )
        if set(cells) != {"-"}:
            table.add_row(method.value, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
