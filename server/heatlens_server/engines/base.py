"""What an engine is: uint8 images and wanted classes in, logits and float maps out. No torch in here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from heatlens_server.cam.catalog import Method

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TopK:
    """Explain the k most probable classes, most probable first. k >= 1."""

    k: int


@dataclass(frozen=True, slots=True)
class ClassIds:
    """Explain these classes, in this order. At least one, no duplicates, each in [0, class_count)."""

    ids: tuple[int, ...]


Target = TopK | ClassIds


@dataclass(frozen=True, slots=True)
class MapSpec:
    """Everything that images must have in common to share a batch.

    Attributes:
        method: how the map is made.
        layers: the target layers' module names, at least one.
        upsample: True for maps at the model's input size, False for the (largest) layer's size.
    """

    method: Method
    layers: tuple[str, ...]
    upsample: bool


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What an engine says about one image.

    Attributes:
        logits: float32 (C,), the score of every class.
        class_ids: the K explained classes, in the order asked for.
        maps: float32 (K, h, w) in [0, 1].
        scales: float32 (K,); maps * scales + offsets is the raw map.
        offsets: float32 (K,).
    """

    logits: Float32Array
    class_ids: tuple[int, ...]
    maps: Float32Array
    scales: Float32Array
    offsets: Float32Array


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine can do.

    Attributes:
        kind: "torch", ...
        device: "cpu", "cuda:0".
        precision: "fp32", "fp16", "bf16".
        input_height_px: height of the images it takes.
        input_width_px: width of the images it takes.
        class_count: number of classes.
        methods: the supported methods.
        layers: the layers that can be explained, the default first.
    """

    kind: str
    device: str
    precision: str
    input_height_px: int
    input_width_px: int
    class_count: int
    methods: tuple[Method, ...]
    layers: tuple[str, ...]


class Engine(Protocol):
    """Runs one model. Called by one thread at a time; stores nothing about a call on the model."""

    @property
    def info(self) -> EngineInfo:
        """What this engine can do."""
        ...

    def explain(self, images: UInt8Array, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch.

        Args:
            images: uint8 (N, H, W, 3), RGB, at the model's input size, N >= 1.
            targets: N targets.
            spec: method, layers and map size; must be supported (see `info`).

        Returns:
            N results, in order. A batch of N gives the same maps as N batches of one.

        Raises:
            MemoryError: the device is out of memory; the engine is still usable.
        """
        ...

    def close(self) -> None:
        """Release the model and every hook on it. Idempotent."""
        ...
