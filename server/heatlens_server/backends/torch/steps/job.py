"""One image that is explained in steps, and what a method of many runs is."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.grid import Grid, Output
from heatlens_server.backends.torch.goals.base import Goals
from heatlens_server.backends.torch.network.network import TorchModel

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Scores that differ by no more than this, relative to their size, are the same: a map of the rest would be noise."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One image, its goals, and the layer to explain them by.

    Attributes:
        model: the network.
        inputs: (1, 3, H, W), the image.
        goals: of the image alone.
        layer: the target layer's name.
        output: what it returned for the image, detached.
        rows: the most rows that a step runs the network on.
    """

    model: TorchModel
    inputs: Tensor
    goals: Goals
    layer: str
    output: Output
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
        """The scores, float32 (R, K), of R changed images (R, 3, H, W); one step."""
        with torch.no_grad():
            return self.goals.values(0, self.model.run(inputs)).float()

    def scores_of_features(self, change: Callable[[Output], Output], rows: int) -> Tensor:
        """The scores, float32 (rows, K), of the image with the layer's output changed in `rows` ways; one step."""
        with torch.no_grad():
            return self.goals.values(0, self.model.replay(self.inputs, self.layer, change, rows)).float()


RawMaps = Generator[None, None, Tensor]
"""Yields after each run of the network; returns raw maps (1, K, h, w)."""

Stepper = Callable[[Job], RawMaps]
"""A method. It is resumed with gradients enabled, and changes no state of the thread across a yield."""
