"""What calls return: small frozen values, without protobuf."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

from heatlens._exceptions import HeatlensError
from heatlens._results.geometry import Float32Array, PixelBox
from heatlens._results.heatmap import Heatmap
from heatlens._results.images import UInt8Array

FRAME_DROPPED = "FRAME_DROPPED"
"""The reason of a frame that gave way to newer ones."""


@dataclass(frozen=True, slots=True)
class ClassScore:
    """A class and its score.

    Attributes:
        class_id: the class.
        label: its name; empty if the model has no labels.
        logit: its score before softmax or sigmoid; NaN for regression.
        probability: in [0, 1]: softmax of the logits, or sigmoid for multi-label and binary models; NaN for regression.
        value: regression: the value of this output; None otherwise.
    """

    class_id: int
    label: str
    logit: float
    probability: float
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """How faithful a map is. None: not asked for. docs/faithfulness.md has the definitions.

    Attributes:
        deletion: area under the probability as the most salient pixels go first, in [0, 1]; lower is better.
        insertion: area under the probability as the most salient pixels come first, in [0, 1]; higher is better.
        road_morf: mean change of the probability as the most salient pixels are imputed, in [-1, 1]; lower is better.
        road_lerf: mean change of the probability as the least salient pixels are imputed, in [-1, 1]; higher is better.
        road_combined: half of `road_lerf` - `road_morf`; higher is better.
        average_drop: relative drop of the probability when the salient part alone is shown, in [0, 1]; lower is better.
        increase: whether that raises the probability, 0 or 1; higher is better.
        sparseness: Gini index of the map, in [0, 1); higher is sparser.
        model_randomisation: rank correlation with the map of the same model with new weights, in [-1, 1]; near 0 is
            sane.
        class_sensitivity: rank correlation with the map of the least probable class, in [-1, 1]; lower is more
            sensitive to the class.
    """

    deletion: float | None = None
    insertion: float | None = None
    road_morf: float | None = None
    road_lerf: float | None = None
    road_combined: float | None = None
    average_drop: float | None = None
    increase: float | None = None
    sparseness: float | None = None
    model_randomisation: float | None = None
    class_sensitivity: float | None = None

    def by_metric(self) -> dict[str, float]:
        """Return what was measured by the metrics' names, as `explain(faithfulness=...)` takes them."""
        values = ((item.name.replace("_", "-"), getattr(self, item.name)) for item in fields(self))
        return {metric: value for metric, value in values if value is not None}


@dataclass(frozen=True, slots=True, eq=False)
class Explanation:
    """Why the model gave one class its score: of the image, of its pixels (segmentation), or of one detection.

    Attributes:
        class_id: the explained class.
        label: its name; empty if the model has no labels.
        logit: its score before softmax or sigmoid. Segmentation: its mean over the explained pixels. Detection: the
            logit of `probability`. Embedding: the cosine similarity to the reference. Regression: NaN.
        probability: in [0, 1]: softmax of the logits, or sigmoid for multi-label and binary models. Segmentation: its
            mean over the explained pixels. Detection: the detection's score. Embedding: (1 + similarity) / 2.
            Regression: NaN.
        heatmap: where on the image the score comes from.
        area: segmentation: the part of the model's input that is predicted as this class, in [0, 1]; 0 otherwise.
        box: detection: the detection's box in pixels of the upright source image; None otherwise.
        faithfulness: how faithful the map is, as asked; None if not.
        predicted_mask: segmentation whose classes may overlap, with `return_mask`: uint8 (height, width), read-only, 1
            where this class is predicted, of the size that `Result.predicted_mask` has elsewhere, and 255 where that
            has it; None otherwise.
        value: regression: the predicted value; None otherwise.
    """

    class_id: int
    label: str
    logit: float
    probability: float
    heatmap: Heatmap
    area: float = 0.0
    box: PixelBox | None = None
    faithfulness: Faithfulness | None = None
    predicted_mask: UInt8Array | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one call went, inside the server.

    Attributes:
        queue_ms: waiting for a batch.
        preprocess_ms: decoding and resizing the image.
        compute_ms: running the batch that held the image.
        batch_size: how many images that batch held.
    """

    queue_ms: float
    preprocess_ms: float
    compute_ms: float
    batch_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The answer for one image.

    Attributes:
        explanations: one per explained class, in the order asked for.
        predictions: the most probable classes, as many as `top_predictions`; regression: the first values.
        source_region: the part of the source image that the model saw, in pixels of the upright source image.
        source_size: (width, height) of the upright source image, in pixels; None if the server is too old to say.
        model: name of the model that answered.
        model_version: its version.
        timing: where the time went.
        predicted_mask: segmentation, with `return_mask`: uint8 (height, width), read-only: the class of each pixel of
            the model's input, which covers `source_region`; with map_size="source" of the source image, 255 outside
            `source_region`. None where classes may overlap: then each explanation has a mask.
        embedding: embedding models: float32 (length,), read-only. Another call's `reference`.
        warnings: what may be wrong with the image or its explanation, for people; usually empty.
    """

    explanations: tuple[Explanation, ...]
    predictions: tuple[ClassScore, ...]
    source_region: PixelBox
    source_size: tuple[int, int] | None
    model: str
    model_version: str
    timing: Timing
    predicted_mask: UInt8Array | None = None
    embedding: Float32Array | None = None
    warnings: tuple[str, ...] = ()


class ModelState(StrEnum):
    """Whether a model can answer."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    IDLE = "idle"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Preprocess:
    """How an image becomes a model's input. The names are those of the configuration's `[models.preprocess]`.

    Attributes:
        window: the values (low, high) of an image that become 0 and 1, or "auto" for each image's smallest and largest;
            None: the range of the image's type.
        resize_px: one value: the shorter side after resizing; two: height and width; empty: images keep their size.
        crop_px: height and width of the centre crop; empty: images are not cropped.
        max_side_px: the longest side of an input of any size; 0: no limit.
        interpolation: how pixels are resampled.
        letterbox: whether images keep their proportions and are padded to `crop_px`.
        pad_to_multiple: what sides are padded to a multiple of, in pixels; 1: they are not.
        channel_order: "rgb" or "bgr"; empty where channels are no colours.
        scale: what values in [0, 1] are multiplied by before mean and std.
        mean: subtracted from each channel.
        std: what each channel is divided by.
    """

    window: tuple[float, float] | Literal["auto"] | None
    resize_px: tuple[int, ...]
    crop_px: tuple[int, ...]
    max_side_px: int
    interpolation: str
    letterbox: bool
    pad_to_multiple: int
    channel_order: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One engine of a model.

    Attributes:
        name: "cpu", "cuda:0"; "cpu#0", "cpu#1" where several engines share a device.
        in_service: whether it runs requests; one that fails is taken out, and tried again, while others go on.
        message: why it does not; empty if it does.
    """

    name: str
    in_service: bool
    message: str = ""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One served model. What is only known once it is loaded is zero or empty before.

    Attributes:
        name: what `explain(model=...)` takes.
        version: from the server's configuration, or derived from the weights; what `explain(version=...)` takes.
        is_default: whether it answers calls that name no model and no version.
        state: whether it can answer.
        state_message: why it cannot; empty if it can.
        task: "classification", "multi-label-classification", "binary-classification", "regression", "segmentation",
            "detection" or "embedding".
        input_height_px: height of the model's input; 0 if it takes images of any size.
        input_width_px: width of the model's input; 0 if it takes images of any size.
        class_count: number of classes; of an embedding model, the embedding's length; 0 if nothing tells, of a detector
            without labels.
        methods: what `explain(method=...)` takes.
        default_method: the method used when a call names none.
        layers: what `explain(layers=...)` takes, the default first.
        engine: what runs the model.
        device: where it runs; of several devices, the first.
        precision: "fp32", "fp16", "bf16".
        max_batch_size: most images run at once.
        max_queue_delay_ms: how long an image may wait for others while the device is busy.
        method_engines: what runs each of `methods` with default options: "onnxruntime", "torchscript", "torch"; empty
            if the server is too old to say.
        methods_in_steps: the methods that take many runs of the model per image.
        activation: how logits become probabilities: "softmax", "sigmoid" or "none"; empty if the server is too old to
            say.
        assumptions: what the server found or assumed when it loaded the model, one sentence each, with the key of its
            configuration that overrides it.
        input_channels: of the model's input: 1 is gray, 3 is RGB, 4 is RGBA; 0 if the server is too old to say.
        preprocess: how images become its input; None if the server is too old to say.
        next_engine: what takes over once the model's export is made, beside its calls; empty if `engine` stays.
        is_default_version: whether it answers calls for the model that name no version, but for others' weights.
        weight: the share of such calls that it answers, not being the default version.
        weights_bytes: what its weights take in the server; 0 if it is not loaded.
        devices: all that run it; empty if the server is too old to say.
    """

    name: str
    version: str
    is_default: bool
    state: ModelState
    state_message: str
    task: str
    input_height_px: int
    input_width_px: int
    class_count: int
    methods: tuple[str, ...]
    default_method: str
    layers: tuple[str, ...]
    engine: str
    device: str
    precision: str
    max_batch_size: int
    max_queue_delay_ms: float
    method_engines: Mapping[str, str] = field(default_factory=dict, hash=False)
    methods_in_steps: tuple[str, ...] = ()
    activation: str = ""
    assumptions: tuple[str, ...] = ()
    input_channels: int = 0
    preprocess: Preprocess | None = None
    next_engine: str = ""
    is_default_version: bool = True
    weight: float = 0.0
    weights_bytes: int = 0
    devices: tuple[DeviceInfo, ...] = ()

    @property
    def is_degraded(self) -> bool:
        """Whether it answers with fewer devices than it has."""
        return self.state is ModelState.READY and not all(device.in_service for device in self.devices)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server's version and limits.

    Attributes:
        version: version of heatlens that serves.
        max_message_bytes: largest message accepted and sent.
        max_image_pixels: largest image accepted, width times height.
        max_queue_length: most requests that may wait per model.
        max_targets: most classes explained in one call.
        max_in_flight: largest window of a stream, in frames; 0: streaming is not served.
        max_batch_size: largest batch of any model.
        max_queue_delay_ms: longest batching window of any model.
        max_streams: most streams open at a time; 0 if the server is too old to say.
        max_image_parts: most segments, chunks, blocks or tags of an image file, beside one for each 4,096 bytes of it;
            0 if the server is too old to say.
        max_image_samples: most samples that decoding an image file may go over, in all its scans, tiles and channels
            together; 0 if the server is too old to say.
        max_decoding_bytes: most memory for large images that are decoded or wait for it; 0 if the server is too old to
            say.
        max_bytes_in_flight: most bytes of requests and answers in flight; 0 if the server is too old to say.
        max_connection_bytes_in_flight: the same of one connection.
        max_model_runs: most runs of a model, forward or backward, for one image; 0 if the server is too old to say.
    """

    version: str
    max_message_bytes: int
    max_image_pixels: int
    max_queue_length: int
    max_targets: int
    max_in_flight: int
    max_batch_size: int
    max_queue_delay_ms: float
    max_streams: int
    max_image_parts: int
    max_image_samples: int
    max_decoding_bytes: int
    max_bytes_in_flight: int = 0
    max_connection_bytes_in_flight: int = 0
    max_model_runs: int = 0


class Health(StrEnum):
    """What a server says about itself or one model (grpc.health.v1)."""

    SERVING = "serving"
    NOT_SERVING = "not-serving"
    UNKNOWN = "unknown"


# eq=False: frames are mostly arrays, and arrays have no truth value.
@dataclass(frozen=True, slots=True, eq=False)
class FrameResult:
    """The answer for one frame of a stream: a result, an error, or left out on purpose.

    Attributes:
        frame_id: the frame's id.
        frame: what was passed to `map` or `send`.
        result: the explanation; None if the frame failed or was left out.
        error: why the frame failed; None if it did not. The stream goes on.
        skipped: whether the frame was left out, as `every` or `max_fps` asked for.
        latency_ms: from when the frame was passed to `send`, or pulled by `map`, to its answer.
    """

    frame_id: int
    frame: Any
    result: Result | None
    error: HeatlensError | None
    skipped: bool
    latency_ms: float

    def __repr__(self) -> str:
        outcome = "skipped" if self.skipped else f"error={self.error!r}" if self.error else f"result={self.result!r}"
        return f"FrameResult({self.frame_id}, {outcome}, latency_ms={self.latency_ms:.1f})"

    @property
    def dropped(self) -> bool:
        """Whether the frame gave way to newer ones (overflow="drop-oldest"). `error` says so too."""
        return self.error is not None and self.error.reason == FRAME_DROPPED
