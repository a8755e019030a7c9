"""What an engine is: images and targets in, scores and float maps out."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.methods import PRESETS, Aggregation, Method, Metric, Score, name_of
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target
from heatlens_server.core.tasks import Activation, Task


@dataclass(frozen=True, slots=True)
class MapSpec:
    """Everything that images must have in common to share a batch.

    Attributes:
        method: how the map is made; no preset.
        layers: the target layers' module names, at least one.
        upsample: True for maps at the model's input size, False for the (largest) layer's size.
        score: what is explained about a target.
        aggregation: how the maps of several layers become one.
        augment: average over flips and scales of the input.
        principal: project weighted activations on their first principal component instead of summing them.
        metrics: the measures of faithfulness to compute, in the order of `Metric`.
        return_mask: segmentation: whether the predicted mask is wanted.
        divisible: whether the engine that runs it could explain it goal by goal.
        by_goal: whether each goal is a run of its own, between which others may have the device. The queue decides.
        in_steps: whether it takes many runs of the model per image: `SteppingEngine.steps`, not `Engine.explain`. Told
            once, since the queue asks for every image, several times.
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
    divisible: bool = False
    by_goal: bool = False
    in_steps: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        in_steps = self.method.traits.in_steps or self.augment or bool(self.metrics) or self.by_goal
        object.__setattr__(self, "in_steps", in_steps)

    def parts(self, count: int) -> int:
        """Into how many runs the explanation of so many goals can be divided."""
        if not self.divisible:
            return 1
        traits, layers = self.method.traits, len(self.layers)
        if traits.class_free:
            # Of a layer's map that may take longer than the network, images share no batch until it is known.
            return 2 * layers if self.method is Method.KPCA_CAM else layers
        if traits.differentiates_twice or (traits.exportable and layers > 1):
            # All gradients are one run; each layer's map, or second derivative, is another.
            return count * (1 + layers)
        # What differentiates by the whole network, and not by what is behind a layer, has a run forward of its own.
        return count if traits.exportable else 2 * count


LayerShape = tuple[int, int, int]
"""Channels, rows and columns of a layer's map."""

Steps = Generator[None, None, ImageResult]
"""One image's explanation in steps: each `next` runs the model on some rows; the last one raises StopIteration with the
result. `close` gives it up. Keeps no thread-local state (grad mode, hooks) between steps."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a loaded engine can do.

    Attributes:
        engine_name: "torch", "onnxruntime", "torchscript".
        device: "cpu", "cuda:0".
        precision: "fp32", "fp16", "bf16".
        input_height_px: height of the images it takes; 0 for any.
        input_width_px: width of the images it takes; 0 for any.
        class_count: number of classes; of an embedding model, the embedding's length; 0 for a detector that does not
            tell.
        methods: the supported methods, in the order of `Method`; no presets.
        layers: the layers that can be explained, the default first.
        task: what the model does.
        input_channels: channels of the images it takes.
        fallback_methods: those of `methods` that a second engine, torch, runs.
        scores: the supported scores.
        fallback_scores: those of `scores` that the second engine runs.
        has_options: whether smoothing and faithfulness are supported.
        multi_map_layers: those of `layers` that return several maps at once: for methods that
            take them.
        layers_by_method: the layers of each method that explains only some of `layers`, the default first;
            `multi_map_layers` aside.
        threshold: segmentation whose classes may overlap: the sigmoid above which a pixel is predicted as a class; None
            where classes exclude each other.
        runs_one_by_one: whether the network mixes the images of a batch, so that each runs by itself.
        takes_steps: whether the engine itself explains in steps, whatever its second one does.
        refusals: why this model does not have methods that most models of its task have.
        layer_shapes: of layers, as far as they are known before an image comes, which may change rows and columns.
        weights_bytes: what the weights take, in bytes, once; what running takes comes on top. 0 if nothing tells.
    """

    engine_name: str
    device: str
    precision: str
    input_height_px: int
    input_width_px: int
    class_count: int
    methods: tuple[Method, ...]
    layers: tuple[str, ...]
    task: Task = Task.CLASSIFICATION
    input_channels: int = 3
    fallback_methods: frozenset[Method] = field(default_factory=frozenset)
    scores: tuple[Score, ...] = (Score.LOGIT,)
    has_options: bool = False
    multi_map_layers: frozenset[str] = field(default_factory=frozenset)
    fallback_scores: frozenset[Score] = field(default_factory=frozenset)
    layers_by_method: Mapping[Method, tuple[str, ...]] = field(default_factory=dict, hash=False)
    threshold: float | None = None
    runs_one_by_one: bool = False
    takes_steps: bool = False
    refusals: Mapping[Method, str] = field(default_factory=dict, hash=False)
    layer_shapes: Mapping[str, LayerShape] = field(default_factory=dict, hash=False)
    weights_bytes: int = field(default=0, compare=False)

    @property
    def activation(self) -> Activation:
        """How logits become probabilities, of images or of pixels."""
        if self.task is not Task.SEGMENTATION:
            return self.task.traits.activation
        return Activation.SOFTMAX if self.threshold is None else Activation.SIGMOID

    def layers_of(self, method: Method) -> tuple[str, ...]:
        """The layers that a method can explain, the default first."""
        layers = self.layers_by_method.get(method, self.layers)
        if method.traits.takes_multi_map_layers:
            return layers
        return tuple(layer for layer in layers if layer not in self.multi_map_layers)

    def why_not(self, method: Method) -> str:
        """Why a method is not supported, after a colon; empty if that is usual for the task or the engine."""
        reason = self.refusals.get(method.as_preset.method)
        return f": {reason}" if reason else ""

    @property
    def requestable_methods(self) -> tuple[Method, ...]:
        """The methods that a request may name: the supported ones, and the presets that stand for one of them.

        A method that explains a single score for which there is a preset goes by the preset's name only.
        """
        presets = {
            name for name in PRESETS if name.as_preset.method in self.methods and name.as_preset.score in self.scores
        }
        alone = len(self.scores) == 1
        names = {name_of(method, self.scores[0]) if alone else method for method in self.methods}
        return tuple(method for method in Method if method in names or method in presets)


class Engine(Protocol):
    """Runs one model. Called by one thread at a time; stores nothing about a call on the model.

    Several threads run one model by an engine each: see `another`.
    """

    @property
    def info(self) -> Capabilities:
        """What this engine can do."""
        ...

    def explain(self, images: ImageArray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch.

        Args:
            images: uint8, or float32 in 0 to 255, (N, H, W, C), of the model's size and channels, N >= 1.
            targets: N targets.
            spec: how; must be supported (see `info`), and not `in_steps`.

        Returns:
            N results, in order. A batch of N gives the same maps as N batches of one.

        Raises:
            MemoryError: the device is out of memory; the engine is still usable.
        """
        ...

    def use_threads(self, count: int | None) -> None:
        """Run on so many threads of a CPU from now on, None for one per core. Called while nothing runs."""
        ...

    def another(self) -> Self:
        """Make an engine of the same model on the same device, for another thread. It shares the weights.

        Raises:
            ModelLoadError: it cannot be made.
        """
        ...

    def close(self) -> None:
        """Release the model and every hook on it; those made by `another` go on. Idempotent."""
        ...


class SteppingEngine(Engine, Protocol):
    """An engine that also explains in steps, and may load what it needs when it needs it: what a server runs."""

    def steps(self, image: ImageArray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        """Explain one image in steps, so that others can have the device in between.

        Nothing runs before the first `next`. Steps of several images may be interleaved, and mixed with `explain`.

        Args:
            image: (H, W, C), as for `explain`.
            target: what is wanted.
            spec: how; must be supported, and `in_steps`.
            rows: the most rows that a step runs the model on, >= 1.

        Raises:
            MemoryError: by `next`, as for `explain`.
        """
        ...

    def is_loaded_for(self, spec: MapSpec) -> bool:
        """Whether `load_for` has nothing to do for a spec. Any thread may call this; asked for every request."""
        ...

    def load_for(self, spec: MapSpec) -> None:
        """Load what a spec needs beyond what is loaded; returns at once if that is nothing. Any thread may call this.

        Raises:
            ModelLoadError: it cannot be loaded.
        """
        ...
