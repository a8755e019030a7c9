"""One image that is explained in steps, what a method of many runs is, and the noise that such methods share."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.grid import Grid, LayerOutput
from heatlens_server.backends.torch.goals.base import Goals
from heatlens_server.backends.torch.network.network import TorchModel

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Scores that differ by no more than this, relative to their size, are the same: a map of the rest would be noise."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One image, its goals, and the layer to explain them by.

    Attributes:
        model: the network.
        inputs: (1, C, H, W), the image.
        goals: of the image alone.
        layer: the target layer's name.
        output: what it returned for the image, detached.
        rows: the most rows that a step runs the network on.
    """

    model: TorchModel
    inputs: Tensor
    goals: Goals
    layer: str
    output: LayerOutput
    rows: int

    @property
    def grid(self) -> Grid:
        """How to read the layer's output as a map."""
        return self.model.model.grid(self.layer)

    @property
    def features(self) -> Tensor:
        """The layer's output as a map (1, C, h, w)."""
        return self.model.features(self.layer, self.output)

    def on_image(self, features: Tensor) -> Tensor:
        """The part of the layer's map, or of some of its channels, that lies on the image."""
        return self.model.on_image(features, self.size_px)

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.inputs.shape[2], self.inputs.shape[3]

    def chunks(self, indices: Tensor) -> Iterator[Tensor]:
        """Indices (M,) in parts that a step can run the network on, in order; none if M is 0."""
        return (indices[start : start + self.rows] for start in range(0, len(indices), self.rows))

    def scores_of_inputs(self, inputs: Tensor) -> Tensor:
        """The scores, float32 (R, K), of R changed images (R, C, H, W); one step."""
        with torch.no_grad():
            return self.goals.scores_of(0, self.model.run(inputs)).float()

    def scores_of_features(self, change: Callable[[LayerOutput], LayerOutput], rows: int) -> Tensor:
        """The scores, float32 (rows, K), of the image with the layer's output changed in `rows` ways; one step."""
        with torch.no_grad():
            return self.goals.scores_of(0, self.model.replay(self.inputs, self.layer, change, rows)).float()


MapSteps = Generator[None, None, Tensor]
"""Yields after each run of the network; returns raw maps (1, K, h, w)."""

Stepper = Callable[[Job], MapSteps]
"""A method. It is resumed with gradients enabled, and changes no state of the thread across a yield."""


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
