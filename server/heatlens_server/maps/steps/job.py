"""One image that is explained in steps, as methods of many runs see it, and what such a method is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np

from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.grid import Grid
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target
from heatlens_server.maps.concrete import Array
from heatlens_server.maps.normalization import NormalizedMap

ROUNDING = 8 * float(np.finfo(np.float32).eps)
"""Scores that differ by no more than this, relative to their size, are the same: a map of the rest would be noise."""


class Goals(Protocol):
    """What is explained about N images: of each, some numbers that the network computes."""

    @property
    def width(self) -> int:
        """The most goals that an image has; 1 if none has any."""
        ...

    def by_name(self, n: int) -> Target:
        """Image n's goals as a target that names them, whatever a changed version of the image scores highest."""
        ...

    def least_probable(self, n: int) -> Target | None:
        """What the network sees least of in image n, as a target; None where the task has no such thing."""
        ...

    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's result, of maps (width, h, w), scales and offsets (width,)."""
        ...


class Explained(Protocol):
    """What is known about N images before their maps are finished."""

    @property
    def goals(self) -> Goals:
        """What was explained."""
        ...

    def maps(self, spec: MapSpec, size_px: tuple[int, int]) -> NormalizedMap[Array]:
        """Finish the maps (N, K, h, w).

        Args:
            spec: how.
            size_px: (height, width) of the input.
        """
        ...


Change = Callable[[Sequence[Array]], Sequence[Array]]
"""Makes other levels, of R rows each, of a layer's levels for one image."""


@dataclass(frozen=True, slots=True, eq=False)
class Job(ABC):
    """One image, its goals, and the layer to explain them by. Each engine has its own.

    Attributes:
        inputs: (1, C, H, W), the image, normalised.
        goals: of the image alone.
        layer: the target layer's name.
        grid: how to read the layer's output as a map.
        rows: the most rows that a step runs the network on.
    """

    inputs: Array
    goals: Goals
    layer: str
    grid: Grid
    rows: int

    @property
    @abstractmethod
    def features(self) -> Array:
        """The layer's output as a map (1, C, h, w)."""

    @property
    @abstractmethod
    def levels(self) -> Sequence[Array]:
        """The maps (1, C_i, h_i, w_i) that the layer's output is made of: one, or a pyramid's."""

    @abstractmethod
    def on_image(self, features: Array) -> Array:
        """The part of the layer's map, or of some of its channels, that lies on the image."""

    @abstractmethod
    def scores_of_inputs(self, inputs: Array) -> Array:
        """The scores, float32 (R, K), of R changed images (R, C, H, W); one step."""

    @abstractmethod
    def probabilities_of_inputs(self, inputs: Array) -> Array:
        """The same as probabilities, in [0, 1]."""

    @abstractmethod
    def scores_of_levels(self, change: Change, rows: int) -> Array:
        """The scores, float32 (rows, K), of the image with the layer's output changed in `rows` ways; one step."""

    @abstractmethod
    def gradients(self, inputs: Array) -> Iterator[Array]:
        """For each goal its score's gradients (R, C, h, w) for R changed images, float32 or wider.

        Raises:
            TypeError: the layer returns a pyramid, which has no gradient here.
        """

    @abstractmethod
    def explained(self, raw: Sequence[Array]) -> Explained:
        """The image, explained by raw maps (1, K, h, w) of the same goals, one per layer."""

    @property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the image."""
        return self.inputs.shape[2], self.inputs.shape[3]

    def chunks(self, indices: Array) -> Iterator[Array]:
        """Indices (M,) in parts that a step can run the network on, in order; none if M is 0."""
        return (indices[start : start + self.rows] for start in range(0, len(indices), self.rows))


T = TypeVar("T")


def at_once(steps: Generator[None, None, T]) -> T:
    """What steps return, of steps that are not interrupted."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return cast("T", stop.value)


MapSteps = Generator[None, None, Array]
"""Yields after each run of the network; returns raw maps (1, K, h, w)."""

Stepper = Callable[[Job], MapSteps]
"""A method. It is resumed where gradients can be taken, and changes no state of the thread across a yield."""
