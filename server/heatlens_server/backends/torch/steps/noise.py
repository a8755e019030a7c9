"""Noise that is the same for every image, and however many rows a step takes."""

import torch
from torch import Tensor

_SEED = 0


class Noise:
    """A sequence of noise fields, drawn one by one on the CPU: torch's draws depend on how many they are."""

    def __init__(self, deviation: float, shape: tuple[int, ...], device: torch.device) -> None:
        """Start the sequence from its beginning.

        Args:
            deviation: the standard deviation; the mean is 0.
            shape: of one field.
            device: where the noise is wanted.
        """
        self._deviation = deviation
        self._shape = shape
        self._device = device
        self._generator = torch.Generator().manual_seed(_SEED)

    def draw(self, count: int) -> Tensor:
        """The next fields, float32 (count, *shape)."""
        fields = torch.stack([torch.randn(self._shape, generator=self._generator) for _ in range(count)])
        return (fields * self._deviation).to(self._device)
