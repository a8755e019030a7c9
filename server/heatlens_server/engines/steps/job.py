"""One image that is explained in steps, and what a method of many runs is."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from heatlens_server.cam.grid import Output
from heatlens_server.engines.torch_model import TorchModel
from heatlens_server.tasks.base import Goals


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
    def features(self) -> Tensor:
        """The layer's output as a map (1, C, h, w)."""
        return self.model.features(self.layer, self.output)

    def scores_of_inputs(self, inputs: Tensor) -> Tensor:
        """The scores (R, K) of R changed images (R, 3, H, W); one step's work."""
        with torch.no_grad():
            return self.goals.values(0, self.model.run(inputs))

    def scores_of_features(self, change: Callable[[Output], Output], rows: int) -> Tensor:
        """The scores (rows, K) of the image with the layer's output changed in `rows` ways; one step's work."""
        with torch.no_grad():
            return self.goals.values(0, self.model.replay(self.inputs, self.layer, change, rows))


RawMaps = Generator[None, None, Tensor]
"""Yields after each run of the network; returns raw maps (1, K, h, w)."""

Stepper = Callable[[Job], RawMaps]
"""A method. It is resumed with gradients enabled, and changes no state of the thread across a yield."""
