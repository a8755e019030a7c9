"""A network that the engine for files runs: what is known about it, and its graphs. Needs no package but numpy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from heatlens_server.backends.onnx.passes import Passes, Tail
from heatlens_server.core.grid import Grid
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Task


@dataclass(frozen=True, slots=True)
class NetworkLayer:
    """A layer of a network that can be explained.

    Attributes:
        name: of its tensor.
        grid: how that is read as a map.
        channels: of each place.
        height: rows of the map; 0 if they follow the image's size.
        width: columns of the map; 0 if they follow the image's size.
    """

    name: str
    grid: Grid
    channels: int
    height: int
    width: int


class Corners(StrEnum):
    """What the four numbers of a box are. The value is its name in configuration files."""

    CENTER = "cxcywh"
    """The centre, width and height."""
    XY = "xyxy"
    """Left, top, right and bottom."""
    YX = "yxyx"
    """Top, left, bottom and right."""


class RowScores(StrEnum):
    """What a detector says of the classes of a box."""

    SIGMOID = "sigmoid"
    """Logits, each with a probability of its own."""
    SOFTMAX = "softmax"
    """Logits, of which the last one is that of no class."""
    PROBABILITY = "probability"
    """Probabilities."""


@dataclass(frozen=True, slots=True)
class Detector:
    """How boxes are read.

    Attributes:
        scores: what their scores are.
        corners: what their numbers are.
        is_relative: whether these are parts of the image's sides, and not pixels.
        most_overlap: the intersection over union from which on the worse of two boxes of a class is left out; 1 if none
            is.
    """

    scores: RowScores
    corners: Corners
    is_relative: bool
    most_overlap: float


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """What is known about a network.

    Attributes:
        task: what it does.
        class_count: number of classes, or of outputs.
        layers: that can be explained, the default first.
        preprocess: how an image becomes its input.
        channels_last: whether its input is (N, H, W, C).
        dtype: of its input, as numpy calls it: "float32", "float16", "uint8".
        takes_batches: whether it runs on any number of images at once.
        has_linear_head: whether its scores are linear in the means over places of the default layer.
        detector: detection: how boxes are read.
        threshold: segmentation: as `core.engine.Capabilities.threshold`.
        refusals: why it lacks methods that most networks have.
        score: the only one that is explained; None for all of the task's.
        left_out: layers and methods that it lacks, since their maps were found to be wrong.
        weights_bytes: as `core.engine.Capabilities.weights_bytes`.
    """

    task: Task
    class_count: int
    layers: tuple[NetworkLayer, ...]
    preprocess: PreprocessSpec
    channels_last: bool = False
    dtype: str = "float32"
    takes_batches: bool = True
    has_linear_head: bool = False
    detector: Detector | None = None
    threshold: float | None = None
    refusals: Mapping[Method, str] = field(default_factory=dict, hash=False)
    score: Score | None = None
    left_out: frozenset[tuple[str, Method]] = frozenset()
    weights_bytes: int = 0


class NetworkGraphs(Protocol):
    """Gives a network's graphs."""

    @property
    def info(self) -> NetworkInfo:
        """What is known about the network."""
        ...

    def passes(self, layers: Sequence[str]) -> Passes:
        """The forward pass, and the backward pass by some layers if the network can be differentiated."""
        ...

    def tail(self, layer: str) -> Tail:
        """What comes behind a layer."""
        ...

    def twin(self) -> "NetworkGraphs":
        """The same network with weights that mean nothing, always the same."""
        ...
