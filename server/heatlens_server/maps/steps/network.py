"""What methods of many runs, smoothing and measures of faithfulness ask of an engine's network."""

from collections.abc import Generator, Sequence
from typing import Protocol, Self

import numpy as np

from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target
from heatlens_server.maps.concrete import Array, as_numpy
from heatlens_server.maps.normalization import NormalizedMap
from heatlens_server.maps.steps.job import Explained, Goals, Job


class Network(Protocol):
    """A network, with an engine that explains it in one go and runs it on changed images."""

    def inputs(self, images: ImageArray) -> Array:
        """Images (N, H, W, C) as normalised inputs (N, C, H, W)."""
        ...

    def explain(self, inputs: Array, targets: Sequence[Target], spec: MapSpec) -> Generator[None, None, Explained]:
        """Explain inputs with any method of one pass; yields after each run, and map of a layer."""
        ...

    def jobs(self, inputs: Array, target: Target, spec: MapSpec, *, rows: int) -> Sequence[Job]:
        """Run the network on one image (1, C, H, W): what explains it by each layer of a spec, by the same goals."""
        ...

    def twin(self) -> Self:
        """The same network with weights that mean nothing, always the same."""
        ...


def results(goals: Goals, maps: NormalizedMap[Array]) -> list[ImageResult]:
    """Take a batch's maps apart: one result per image."""
    parts = (maps.values, maps.scale, maps.offset)
    values, scales, offsets = (as_numpy(part).astype(np.float32, copy=False) for part in parts)
    return [goals.result(n, values[n], scales[n], offsets[n]) for n in range(len(values))]
