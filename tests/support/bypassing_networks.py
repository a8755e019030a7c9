"""Small networks in which something bypasses the layer `body`, in every way that matters to what runs behind it."""

import torch
from torch import Tensor, nn


class Early(nn.Module):
    """A layer `body`, and what bypasses it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        early = self.stem(x)
        return self.head(self.joined(early, self.body(early)))


class Residual(Early):
    """It is added."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        return (late + early).mean((-2, -1)) ** 2


class Gated(Early):
    """It multiplies the layer's channels, as in squeeze and excitation."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        return (late * early.mean((-2, -1), keepdim=True).sigmoid()).mean((-2, -1))


class Concatenating(Early):
    """It is put beside the layer's output."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        return torch.cat([early[:, :4], 8 * late[:, :4] ** 2], dim=1).mean((-2, -1))


class Counting(Early):
    """The number of images is taken before the layer."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        return late.reshape(early.shape[0], 8, -1).amax(-1) * early.reshape(early.shape[0], 8, -1).mean(-1)


class Turned(Early):
    """Its images are on the second axis."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        first = early.flatten(2).permute(2, 0, 1)
        return (first * late.flatten(2).permute(2, 0, 1)).sum(0)


class Windows(Early):
    """It is in windows, each of which has the images in it."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        windows = early.unfold(2, 4, 4).unfold(3, 4, 4).permute(2, 3, 0, 1, 4, 5).flatten(0, 2)
        own = late.unfold(2, 4, 4).unfold(3, 4, 4).permute(2, 3, 0, 1, 4, 5).flatten(0, 2)
        return (windows * own).mean((-2, -1)).unflatten(0, (4, -1)).sum(0)


class WithoutRule(Early):
    """An operator that has no rule of differentiation."""

    def joined(self, early: Tensor, late: Tensor) -> Tensor:
        blocks = (10 * late + early).unfold(2, 2, 2).unfold(3, 2, 2)
        return torch.linalg.det(blocks).mean((-2, -1))


BYPASSING = {
    Residual: True,
    Gated: True,
    Concatenating: True,
    Counting: True,
    Turned: True,
    Windows: False,
    WithoutRule: True,
}
"""Whether what is behind the layer takes several changed versions of one image at once."""
