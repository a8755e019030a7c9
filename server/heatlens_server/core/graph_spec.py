"""What an export is made of: formats, inputs, outputs. No torch in here: engines read exports without it."""

from dataclasses import dataclass
from enum import StrEnum

from heatlens_server.core.methods import Method, Score
from heatlens_server.core.preprocess import ChannelOrder, PreprocessSpec

MANIFEST_FILE = "manifest.json"
"""In the folder of every export: says what the other files are."""

IMAGE = "image"
"""Input (N, C, H, W)."""

CLASS_INDEX = "class_index"
"""Input int64 (N, K): a class id, or -1 at position k for the k-th most probable class."""


class Format(StrEnum):
    """What a graph is written as."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    PT2 = "pt2"


class InputKind(StrEnum):
    """What `image` holds."""

    FLOAT = "float"
    """float32, normalised: (value / 255 - mean) / std."""
    UINT8 = "uint8"
    """uint8; the graph normalises."""


class Output(StrEnum):
    """An output of the graph, in the order in which they are returned."""

    LOGITS = "logits"
    CLASS_ID = "class_id"
    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    CAM = "cam"
    CAM_SCALE = "cam_scale"
    CAM_OFFSET = "cam_offset"


MAP_OUTPUTS = (Output.CAM, Output.CAM_SCALE, Output.CAM_OFFSET)

_COLORS = {1: "gray", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Which graph is made of a model.

    Attributes:
        layer: the target layer's module name.
        method: of the map in the graph.
        classes: how many classes per image, K >= 1; None for any number, chosen by each call.
        precision: "fp32" or "fp16", of the network. Logits and maps are float32 in both.
        input: what `image` holds.
        outputs: at least one, in the order of `Output`.
        score: what is differentiated; not the logit for methods that differentiate it only.
        sigmoid: whether a class's probability is the sigmoid of its logit.

    Raises:
        ValueError: a value is out of range.
    """

    layer: str
    method: Method = Method.GRAD_CAM
    classes: int | None = 1
    precision: str = "fp32"
    input: InputKind = InputKind.FLOAT
    outputs: tuple[Output, ...] = tuple(Output)
    score: Score = Score.LOGIT
    sigmoid: bool = False

    def __post_init__(self) -> None:
        if not self.method.traits.exportable:
            raise ValueError(f"{self.method} is no closed form of activations and gradients")
        if self.score not in self.method.traits.exportable_scores:
            raise ValueError(f"{self.method} differentiates nothing, so it has no score but the logit")
        if self.classes is not None and self.classes < 1:
            raise ValueError("classes must be at least 1")
        if self.precision not in {"fp32", "fp16"}:
            raise ValueError(f"precision must be fp32 or fp16, not {self.precision}")
        if not self.outputs or list(self.outputs) != [output for output in Output if output in self.outputs]:
            raise ValueError("outputs must be at least one, in order, none twice")


def meanings(spec: GraphSpec, preprocess: PreprocessSpec) -> dict[str, str]:
    """One line for people about each input and output of a graph, by name."""
    colors = _COLORS.get(preprocess.channels, f"{preprocess.channels} channels")
    if preprocess.channel_order is ChannelOrder.BGR:
        colors = colors.replace("RGB", "BGR")
    scaled = "value / 255" if preprocess.scale == 1.0 else f"value / 255 * {preprocess.scale:g}"
    score = "logit" if spec.score is Score.LOGIT else str(spec.score)
    return {
        IMAGE: f"{colors} pixels" if spec.input is InputKind.UINT8 else f"{colors}, ({scaled} - mean) / std",
        CLASS_INDEX: "class ids; -1 at position k is the k-th most probable class, -2 none",
        Output.LOGITS: "the score of every class",
        Output.CLASS_ID: "the classes explained",
        Output.ACTIVATIONS: "the target layer's output, as a map",
        Output.GRADIENTS: f"derivative of each explained class's {score} with respect to the activations",
        Output.CAM: "saliency map in [0, 1]; cam * cam_scale + cam_offset is the map after ReLU",
        Output.CAM_SCALE: "maximum minus minimum of the map after ReLU; 0 if it is flat",
        Output.CAM_OFFSET: "minimum of the map after ReLU",
    }
