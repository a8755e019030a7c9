"""A network that costs next to nothing to run: what is left is what the server does around it."""

import torch
from torch import Tensor, nn

INPUT_PX = 32
LAYER = "features"


class TinyNetwork(nn.Module):
    """Two convolutions and a linear head with as many classes as ImageNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(8, 1000)

    def forward(self, images: Tensor) -> Tensor:
        """Float (N, 3, 32, 32) to logits (N, 1000)."""
        logits: Tensor = self.head(self.features(images).mean((-2, -1)))
        return logits


def tiny_network() -> nn.Module:
    """Random weights, always the same: the server and this process each make one."""
    torch.manual_seed(0)
    return TinyNetwork().eval()
