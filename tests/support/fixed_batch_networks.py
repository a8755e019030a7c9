"""Networks whose exports for one image name the number of images in every way that exporters do."""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

PX = 32
CLASSES = 5


class Residual(nn.Module):
    """Convolutions with a connection past two of them, global pooling, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.block(x)).relu()
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(Residual):
    """Every stage reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.last(torch.cat([x, self.block(x)], 1))
        return self.head(functional.avg_pool2d(x, 2).mean((2, 3)))


class Shuffled(Residual):
    """The channels of two halves are shuffled, by a view of five dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([right, left], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)
        return self.head(self.block(x).mean((2, 3)))


class Excited(Residual):
    """Channels are weighted by what pooling sees; a gray image is left for last."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x * self.gate(x).sigmoid()).amax((2, 3)))


class Coordinates(Residual):
    """The places of pixels are channels of the image, the same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem[0] = nn.Conv2d(5, 8, 3, 2, 1)
        steps = torch.linspace(-1, 1, PX)
        self.register_buffer("places", torch.stack(torch.meshgrid(steps, steps, indexing="ij"))[None])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, self.places.expand(len(x), -1, -1, -1)], 1))


class ChannelsLast(Residual):
    """Takes images as (N, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2))


class Grouped(Residual):
    """Normalises groups of channels, and enlarges its map to a fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head(functional.interpolate(x, size=(24, 20), mode="bilinear")[:, :, ::2].mean((2, 3)))


class Squeezed(Residual):
    """Squeezes what it pools, the axis of one image included."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.adaptive_avg_pool2d(self.stem(x), 1).squeeze())


class Tokens(nn.Module):
    """A vision transformer with a class token; attention comes with the batch first, or last as in PyTorch's layers."""

    def __init__(self, *, sequence_first: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 17, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=not sequence_first, norm_first=True)
        self.head = nn.Linear(16, CLASSES)
        self.sequence_first = sequence_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = self.block(x.transpose(0, 1)).transpose(0, 1) if self.sequence_first else self.block(x)
        return self.head(x[:, 0])


class Windows(nn.Module):
    """Attention inside of shifted windows, with a mask for each window, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, CLASSES)
        self.register_buffer("mask", torch.randn(4, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1).roll((-2, -2), (1, 2))
        n, h, w, c = x.shape
        x = x.view(n, h // 4, 4, w // 4, 4, c).transpose(2, 3).reshape(-1, 16, c)
        q, k, v = self.qkv(x).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1)
        scores = scores.view(n, 4, 2, 16, 16) + self.mask[None, :, None]
        x = (scores.softmax(-1).view(-1, 2, 16, 16) @ v).transpose(1, 2).reshape(-1, 16, c)
        x = x.view(n, 2, 2, 4, 4, c).transpose(2, 3).reshape(n, h, w, c)
        return self.head(x.square().mean((1, 2)))


class TiledMask(Windows):
    """The mask is added to the windows of all images at once."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2).reshape(-1, 16, 8)
        scores = x @ x.transpose(1, 2) + self.mask.repeat(x.shape[0] // 4, 1, 1)
        return self.head((scores.softmax(-1) @ x).reshape(-1, 64, 8).square().mean(1))


class BatchStatistics(Residual):
    """Normalises by the statistics of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(x, None, None, training=True)
        return super().forward(x)


class Centred(Residual):
    """Subtracts the mean of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0, keepdim=True) / 2)


class Compared(Residual):
    """Shares its scores out among the images."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + x.softmax(0)


class Confused(Residual):
    """Reads channels of all images as if they were of one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        return self.head(x.reshape(-1, 2).softmax(0).reshape(-1, 8))


class First(Residual):
    """Adds the scores of the first image to all."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + x[0].tanh()


class Untrained(Residual):
    """Gives the same scores for every image."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)


def seeded(kind: Callable[[], nn.Module]) -> nn.Module:
    """A network of its own weights, which are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return kind().eval()


def images(count: int, module: nn.Module) -> Tensor:
    """Noise for a network."""
    shape = (PX, PX, 3) if isinstance(module, ChannelsLast) else (3, PX, PX)
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(count))


def export(module: nn.Module, path: Path, *, opset: int = 17, dynamo: bool = False, count: int = 1) -> Path:
    """Export a network for so many images, and no others."""
    # PyTorch's fused attention of inference has no ONNX operators.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, (images(count, module),), str(path), opset_version=opset, dynamo=dynamo, verbose=False
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return path
