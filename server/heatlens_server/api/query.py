"""What a caller asks for, whatever the transport, before anything is checked.

Where a transport meets a number that stands for no name, it passes the number on: it is refused with all else.

An error about a query names the wrong field once, as it is called here: an option by its own name ("layers[1]",
"class_ids.ids[0]"), anything else from the query, the configuration of a stream or its frame on ("image.encoded",
"frame_id"). Each transport makes a path in its own terms of it. The empty name stands for the message as a whole.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from heatlens_server.core.methods import Aggregation, Method, Metric, Score
from heatlens_server.core.targets import ClassIds, Direction


class MapSize(StrEnum):
    """The size of the maps."""

    LAYER = "layer"
    INPUT = "input"
    SOURCE = "source"


class MapType(StrEnum):
    """The element type of the maps. The value is its numpy dtype."""

    FLOAT32 = "<f4"
    FLOAT16 = "<f2"
    UINT8 = "|u1"


class OverflowPolicy(StrEnum):
    """What gives when a stream's window is full: the reading of frames, or the oldest frame that waits."""

    BLOCK = "block"
    DROP_OLDEST = "drop-oldest"


class ReplacementPolicy(StrEnum):
    """What a stream does when its model is replaced: it goes on with the old one, or ends."""

    FINISH = "finish"
    END = "end"


@dataclass(frozen=True, slots=True)
class Tensor:
    """Raw elements, row-major and little-endian.

    Attributes:
        data_type: the element type in capitals: "UINT8", "UINT16", "FLOAT32".
        shape: one length per dimension.
        data: the elements.
    """

    data_type: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Image:
    """An image in one of two forms.

    Attributes:
        encoded: an image file.
        pixels: uint8, uint16 or float32 (height, width, channels), or (height, width).
    """

    encoded: bytes | None = None
    pixels: Tensor | None = None

    @property
    def data(self) -> bytes:
        """What it came in."""
        return self.encoded or (b"" if self.pixels is None else self.pixels.data)

    @property
    def size_bytes(self) -> int:
        """How many bytes it came in."""
        return len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to explain. None, and what is empty, stands for the default.

    Attributes:
        method: how the maps are made.
        top_k: explain so many of the most probable classes.
        class_ids: explain these classes. Not given together with `top_k`.
        class_labels: explain the classes of these labels, after those of `class_ids`.
        layers: the target layers.
        map_size: the size of the maps.
        map_type: the element type of the maps.
        augmentation: average over flips and scales of the input.
        principal_component: project weighted activations on their first principal component.
        top_predictions: how many classes to list.
        target_score: what is explained about a class.
        aggregation: how the maps of several layers become one.
        faithfulness: whether to measure each map.
        metrics: what to measure.
        mask: segmentation: uint8 (height, width) of the source image; pixels other than 0 are meant.
        reference_embedding: embedding models: float32 (D,).
        reference_image: embedding models: instead of the embedding.
        min_score: detection: the least score of a box.
        return_mask: segmentation: whether the predicted mask is wanted.
        direction: regression: which change of a value is explained.
    """

    method: Method | int | None = None
    top_k: int | None = None
    class_ids: ClassIds | None = None
    class_labels: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    map_size: MapSize | int = MapSize.LAYER
    map_type: MapType | int = MapType.FLOAT32
    augmentation: bool = False
    principal_component: bool = False
    top_predictions: int = 0
    target_score: Score | int | None = None
    aggregation: Aggregation | int | None = None
    faithfulness: bool = False
    metrics: tuple[Metric | int, ...] = ()
    mask: Tensor | None = None
    reference_embedding: Tensor | None = None
    reference_image: Image | None = None
    min_score: float | None = None
    return_mask: bool = False
    direction: Direction | int | None = None

    @property
    def size_bytes(self) -> int:
        """How many bytes the mask and the reference image came in, which streams keep."""
        mask, reference = self.mask, self.reference_image
        return (0 if mask is None else len(mask.data)) + (0 if reference is None else reference.size_bytes)


@dataclass(frozen=True, slots=True)
class Query:
    """Explain one image.

    Attributes:
        model: the model's name; empty for the default model.
        image: what to explain; None if the caller sent none.
        options: how.
        model_version: of the model; empty for the one that the server chooses.
        images: how many images share the message of the answer, this one included.
    """

    model: str
    image: Image | None
    options: Options
    model_version: str = ""
    images: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig:
    """The first message of a stream: how to explain its frames.

    Attributes:
        model: the model's name; empty for the default model.
        options: how to explain each frame.
        overflow_policy: what gives when too many frames are unanswered.
        max_in_flight: most unanswered frames; 0 for the default.
        frame_timeout_s: how long a frame may wait to be run, in seconds; None for ever.
        explain_every: explain the first of so many frames; 0 for each.
        max_frames_per_second: explain at most so many; 0 for no limit.
        temporal_smoothing: weight of the past in the maps.
        replacement_policy: what happens when the model is replaced.
        model_version: of the model; empty for the one that the server chooses.
    """

    model: str = ""
    options: Options = field(default_factory=Options)
    overflow_policy: OverflowPolicy | int = OverflowPolicy.BLOCK
    max_in_flight: int = 0
    frame_timeout_s: float | None = None
    explain_every: int = 0
    max_frames_per_second: float = 0.0
    temporal_smoothing: float = 0.0
    replacement_policy: ReplacementPolicy | int = ReplacementPolicy.FINISH
    model_version: str = ""


@dataclass(frozen=True, slots=True)
class Frame:
    """Every later message of a stream.

    Attributes:
        frame_id: increases from frame to frame.
        image: the frame; None if the caller sent none.
        captured_s: when it was captured, on the caller's clock, in seconds; None if the caller does not tell.
    """

    frame_id: int
    image: Image | None = None
    captured_s: float | None = None


@dataclass(frozen=True, slots=True)
class EmptyMessage:
    """A message of a stream that holds neither a configuration nor a frame."""


StreamMessage = StreamConfig | Frame | EmptyMessage
