"""What an engine is: uint8 images and wanted targets in, scores and float maps out. No torch in here."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from heatlens_server.core.methods import OF_PYRAMIDS, PRESETS, Aggregation, Method, Metric, Score, name_of

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TopK:
    """Explain the k most probable classes, most probable first. k >= 1."""

    k: int

    @property
    def count(self) -> int:
        """How many classes."""
        return self.k


@dataclass(frozen=True, slots=True)
class ClassIds:
    """Explain these classes, in this order. At least one, no duplicates, each in [0, class_count)."""

    ids: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many classes."""
        return len(self.ids)


ClassTarget = TopK | ClassIds


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """Segmentation: explain classes, by their scores over given pixels.

    Attributes:
        classes: which ones.
        mask: bool (H, W), at the model's input size, at least one True; or (K, H, W), one for each of `ClassIds`. None:
            those predicted as the class.
    """

    classes: ClassTarget
    mask: BoolArray | None = None

    @property
    def count(self) -> int:
        """How many classes."""
        return self.classes.count


@dataclass(frozen=True, slots=True)
class Detections:
    """Detection: explain the boxes of at least a score, best first.

    Attributes:
        min_score: in [0, 1].
        max_count: the most boxes, >= 1.
        class_ids: of these classes only; empty for any.
    """

    min_score: float
    max_count: int
    class_ids: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many boxes at most."""
        return self.max_count


@dataclass(frozen=True, slots=True)
class Boxes:
    """Detection: explain whatever is detected where these boxes are, as their classes.

    Attributes:
        boxes: left, top, right, bottom in pixels of the model's input.
        class_ids: of each.
    """

    boxes: tuple[tuple[float, float, float, float], ...]
    class_ids: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many boxes."""
        return len(self.boxes)


@dataclass(frozen=True, slots=True, eq=False)
class Similarity:
    """Embedding models: explain the cosine similarity to a reference.

    Attributes:
        reference: float32 (D,), not zero; or uint8 (H, W, 3), an image at the model's input size.
    """

    reference: Float32Array | UInt8Array

    @property
    def count(self) -> int:
        """One."""
        return 1


Target = TopK | ClassIds | Pixels | Detections | Boxes | Similarity
"""What is wanted of one image; which of them a model takes is its task's business."""


def class_targets(targets: Sequence[Target]) -> list[ClassTarget]:
    """The targets of a classifier.

    Raises:
        TypeError: one is of another task.
    """
    chosen = [target for target in targets if isinstance(target, TopK | ClassIds)]
    if len(chosen) < len(targets):
        raise TypeError("a classifier explains classes")
    return chosen


class Task(StrEnum):
    """What a model does. The value is its name in configuration files and on the wire."""

    CLASSIFICATION = "classification"
    MULTI_LABEL = "multi-label-classification"
    SEGMENTATION = "segmentation"
    DETECTION = "detection"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class MapSpec:
    """Everything that images must have in common to share a batch.

    Attributes:
        method: how the map is made; not one of `core.methods.PRESETS`.
        layers: the target layers' module names, at least one.
        upsample: True for maps at the model's input size, False for the (largest) layer's size.
        score: what is explained about a target.
        aggregation: how the maps of several layers become one.
        augment: average over flips and scales of the input.
        principal: project weighted activations on their first principal component instead of summing them.
        metrics: the measures of faithfulness to compute, in the order of `Metric`.
        return_mask: segmentation: whether the predicted mask is wanted.
    """

    method: Method
    layers: tuple[str, ...]
    upsample: bool
    score: Score = Score.LOGIT
    aggregation: Aggregation = Aggregation.MEAN
    augment: bool = False
    principal: bool = False
    metrics: tuple[Metric, ...] = ()
    return_mask: bool = False

    @property
    def in_steps(self) -> bool:
        """Whether it takes many runs of the model per image: `Engine.steps`, not `Engine.explain`."""
        return self.method.in_steps or self.augment or bool(self.metrics)


@dataclass(frozen=True, slots=True)
class Finding:
    """What is explained about one image, where class ids and logits do not say it all.

    Attributes:
        class_id: its class; 0 where there are none.
        logit: the score before softmax or sigmoid.
        probability: in [0, 1].
        box: left, top, right, bottom in pixels of the engine's input image, half open; None but for detections.
        area: the part of the input that is predicted as the class, in [0, 1]; segmentation only.
    """

    class_id: int
    logit: float
    probability: float
    box: tuple[float, float, float, float] | None = None
    area: float = 0.0


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What an engine says about one image.

    Attributes:
        logits: float32 (C,), the score of every class; empty where the task has none for the image as a whole.
        class_ids: the classes of the K explanations, in the order asked for.
        maps: float32 (K, h, w) in [0, 1].
        scales: float32 (K,); maps * scales + offsets is the raw map.
        offsets: float32 (K,).
        findings: K, one per explanation; None for classification, where logits and class ids say it all.
        faithfulness: K, the measures asked for; None if none were.
        mask: segmentation, if asked for: uint8 (H, W), the class of each pixel of the input.
        embedding: embedding models: float32 (D,).
    """

    logits: Float32Array
    class_ids: tuple[int, ...]
    maps: Float32Array
    scales: Float32Array
    offsets: Float32Array
    findings: tuple[Finding, ...] | None = None
    faithfulness: tuple[Mapping[Metric, float], ...] | None = None
    mask: UInt8Array | None = None
    embedding: Float32Array | None = None


Steps = Generator[None, None, ImageResult]
"""One image's explanation in steps: each `next` runs the model on some rows; the last one raises StopIteration with the
result. `close` gives it up. Keeps no thread-local state (grad mode, hooks) between steps."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a loaded engine can do.

    Attributes:
        kind: "torch", ...
        device: "cpu", "cuda:0".
        precision: "fp32", "fp16", "bf16".
        input_height_px: height of the images it takes; 0 for any.
        input_width_px: width of the images it takes; 0 for any.
        class_count: number of classes; of an embedding model, the embedding's length.
        methods: the supported methods, in the order of `Method`; none of `core.methods.PRESETS`.
        layers: the layers that can be explained, the default first.
        task: what the model does.
        companion_methods: those of `methods` that a second engine, torch, runs beside this one.
        scores: the supported scores.
        companion_scores: those of `scores` that the second engine runs.
        full: whether smoothing and faithfulness are supported.
        pyramids: those of `layers` that return several maps at once: for methods of `core.methods.OF_PYRAMIDS`.
        fewer_layers: the layers of each method that explains not all of `layers`, the default first; pyramids aside.
    """

    kind: str
    device: str
    precision: str
    input_height_px: int
    input_width_px: int
    class_count: int
    methods: tuple[Method, ...]
    layers: tuple[str, ...]
    task: Task = Task.CLASSIFICATION
    companion_methods: frozenset[Method] = field(default_factory=frozenset)
    scores: tuple[Score, ...] = (Score.LOGIT,)
    full: bool = False
    pyramids: frozenset[str] = field(default_factory=frozenset)
    companion_scores: frozenset[Score] = field(default_factory=frozenset)
    fewer_layers: Mapping[Method, tuple[str, ...]] = field(default_factory=dict, hash=False)

    def layers_of(self, method: Method) -> tuple[str, ...]:
        """The layers that a method can explain, the default first."""
        layers = self.fewer_layers.get(method, self.layers)
        return layers if method in OF_PYRAMIDS else tuple(layer for layer in layers if layer not in self.pyramids)

    @property
    def offered(self) -> tuple[Method, ...]:
        """What a request may name: the supported methods, and the presets that stand for one of them.

        A method that explains one score alone, for which there is a preset, goes by the preset's name only.
        """
        presets = {
            name for name, preset in PRESETS.items() if preset.method in self.methods and preset.score in self.scores
        }
        alone = len(self.scores) == 1
        names = {name_of(method, self.scores[0]) if alone else method for method in self.methods}
        return tuple(method for method in Method if method in names or method in presets)


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
            spec: how; must be supported (see `info`), and not `in_steps`.

        Returns:
            N results, in order. A batch of N gives the same maps as N batches of one.

        Raises:
            MemoryError: the device is out of memory; the engine is still usable.
        """
        ...

    def close(self) -> None:
        """Release the model and every hook on it. Idempotent."""
        ...


class SteppingEngine(Engine, Protocol):
    """An engine that also explains in steps, and may load what it needs when it needs it: what a server runs."""

    def steps(self, image: UInt8Array, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        """Explain one image in steps, so that others can have the device in between.

        Nothing runs before the first `next`. Steps of several images may be interleaved, and mixed with `explain`.

        Args:
            image: uint8 (H, W, 3), as for `explain`.
            target: what is wanted.
            spec: how; must be supported, and `in_steps`.
            rows: the most rows that a step runs the model on, >= 1.

        Raises:
            MemoryError: by `next`, as for `explain`.
        """
        ...

    def ready(self, spec: MapSpec) -> bool:
        """Whether `prepare` has nothing to do for a spec. Any thread may call this; asked for every request."""
        ...

    def prepare(self, spec: MapSpec) -> None:
        """Load what a spec needs beyond what is loaded; returns at once if that is nothing. Any thread may call this.

        Raises:
            ModelLoadError: it cannot be loaded.
        """
        ...
