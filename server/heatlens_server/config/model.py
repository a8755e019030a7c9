"""One served model: where it comes from, what runs it, how images become its input."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    DirectoryPath,
    Field,
    FilePath,
    ValidationInfo,
    field_validator,
    model_validator,
)

from heatlens_server.config.section import Section
from heatlens_server.core.graph_spec import MANIFEST_FILE
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import MAX_CHANNELS, ChannelOrder, Interpolation
from heatlens_server.core.tasks import Task

EMBEDDED_MODEL = "efficientnet_lite0"
WEIGHT_FILE_SUFFIXES = (".pth", ".pt", ".safetensors", ".pth.tar", ".ckpt", ".bin")
EXPORT_PREFIX = "export:"
ONNX_PREFIX = "onnx:"

_MAX_SIDE_PX = 8192

_WITHOUT_LOADING = ("default", "weight", "idle_unload_s")
"""Keys that say which requests a model gets and how long it stays, and nothing about the model."""


def _check_source(source: str) -> str:
    kind, _, rest = source.partition(":")
    if kind == "python":
        if re.fullmatch(r"\w+(\.\w+)*:\w+", rest):
            return source
        raise ValueError('must be "python:package.module:factory"')
    if kind == "export":
        folder = Path(rest).expanduser()
        if not rest or not folder.is_dir():
            raise ValueError("the folder does not exist")
        if not (folder / MANIFEST_FILE).is_file():
            raise ValueError(f"the folder is no export: it holds no {MANIFEST_FILE}")
        return f"{EXPORT_PREFIX}{folder}"
    if kind == "onnx":
        file = Path(rest).expanduser()
        if not rest or not file.is_file():
            raise ValueError("the file does not exist")
        return f"{ONNX_PREFIX}{file}"
    if kind not in {"torchvision", "timm", "embedded"} or not re.fullmatch(r"[\w./-]+", rest):
        raise ValueError(
            'must be "onnx:FILE", "torchvision:NAME", "timm:NAME", "python:package.module:factory", "embedded:NAME" or '
            '"export:DIR"'
        )
    if kind == "embedded" and rest != EMBEDDED_MODEL:
        raise ValueError(f'the only embedded model is "embedded:{EMBEDDED_MODEL}"')
    return source


def _check_weights(weights: str) -> str:
    if weights.endswith(WEIGHT_FILE_SUFFIXES):
        if not Path(weights).is_file():
            raise ValueError("the file does not exist")
    elif not re.fullmatch(r"\w+", weights):
        raise ValueError(f'must be "default", "none", a name or a {", ".join(WEIGHT_FILE_SUFFIXES)} file')
    return weights


def _parse_size(value: object) -> int | tuple[int, int]:
    """Accept a number of pixels or [height, width]. By hand: a union would report every alternative's error."""
    sides = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(sides) != 2 or not all(
        isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= _MAX_SIDE_PX for side in sides
    ):
        raise ValueError(f"must be a number of pixels or [height, width], each from 1 to {_MAX_SIDE_PX}")
    height_px, width_px = cast("list[int]", sides)
    return (height_px, width_px) if isinstance(value, Sequence) else height_px


SizePx = Annotated[int | tuple[int, int], BeforeValidator(_parse_size)]
Fraction = Annotated[float, Field(allow_inf_nan=False)]
PositiveFraction = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _parse_window(value: object) -> object:
    """Accept [low, high] or "auto". By hand: a union would report every alternative's error."""
    is_pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if value != "auto" and not (
        is_pair
        and all(isinstance(end, int | float) and math.isfinite(end) for end in cast("Sequence[object]", value))
        and cast("Sequence[float]", value)[0] < cast("Sequence[float]", value)[1]
    ):
        raise ValueError('must be [low, high] with low < high, or "auto"')
    return value


Window = Annotated[tuple[float, float] | Literal["auto"], BeforeValidator(_parse_window)]


_MAX_DEVICES = 64


def _parse_devices(value: object) -> object:
    """Accept a device's name or a list of them. By hand: a union would report every alternative's error."""
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        return value
    names = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not 1 <= len(names) <= _MAX_DEVICES or not all(re.fullmatch(r"cpu|cuda:\d{1,3}", str(name)) for name in names):
        raise ValueError('must be "auto", "cpu", "cuda" or "cuda:N", or a list of "cpu" and "cuda:N"')
    if len(set(names)) < len(names):
        raise ValueError("names a device twice: instances runs several engines on one")
    return tuple(names)


def _parse_instances(value: object) -> object:
    """Accept a number or "auto". By hand, as above."""
    if value != "auto" and not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_DEVICES):
        raise ValueError(f'must be a number from 1 to {_MAX_DEVICES}, or "auto"')
    return value


class PreprocessConfig(Section):
    """How images become the model's input, where it differs from what the model's source says."""

    resize_px: SizePx | None = None
    """The shorter side after resizing, in pixels, or the exact [height, width]. With only `crop_px` set, the ratio
    of the two stays as it was; where there is none, the shorter side becomes the crop's longer one."""
    crop_px: SizePx | None = None
    """The centre crop, in pixels: one number for a square, or [height, width]. The model's input size. Models for
    segmentation and detection take images of any size, and crop none unless this is set."""
    max_side_px: int | None = Field(default=None, ge=1, le=_MAX_SIDE_PX)
    """The longest side of an input, where there is no crop: larger images are shrunk. Unset: 1333."""
    channels: int | None = Field(default=None, ge=1, le=MAX_CHANNELS)
    """How many channels the model's input has: 1 is gray, 3 is RGB, 4 is RGBA. Unset: as many as the network's first
    convolution takes."""
    mean: Annotated[tuple[Fraction, ...], Field(min_length=1, max_length=MAX_CHANNELS)] | None = None
    """Subtracted from each channel, for values in [0, scale]: one value per channel, or one for all."""
    std: Annotated[tuple[PositiveFraction, ...], Field(min_length=1, max_length=MAX_CHANNELS)] | None = None
    """What each channel is then divided by: one value per channel, or one for all."""
    interpolation: Interpolation | None = None
    """How images are resampled."""
    window: Window | None = None
    """The values of an image's own that become 0 and 1, [low, high]: of 12 bits [0, 4095], or Hounsfield units. "auto":
    each image's smallest and largest value. Unset: the range of the image's type, or what the file says."""
    channel_order: ChannelOrder | None = None
    """The order of the model's colours: "rgb" or "bgr". `mean` and `std` are in this order. Unset: "rgb"."""
    scale: PositiveFraction | None = None
    """What values in [0, 1] are multiplied by before `mean` and `std`: 255 for networks of Caffe's kind. Unset: 1."""
    letterbox: bool | None = None
    """Whether images keep their proportions and are padded to `crop_px` with gray. Unset: they are cropped."""
    pad_to_multiple: int | None = Field(default=None, ge=1, le=1024)
    """What the sides of inputs of any size are padded to a multiple of, at the right and bottom. Unset: found for
    segmentation by running the network on sizes; 1 for others."""


class GridConfig(Section):
    """How a layer's output is read as a map, where that cannot be found by running the model."""

    layout: Literal["map", "channels-last", "tokens"]
    """"map" (N, C, h, w), "channels-last" (N, h, w, C) or "tokens" (N, prefix + height * width, C)."""
    prefix: int = Field(default=0, ge=0)
    """For "tokens": how many come before the grid (class, distillation and register tokens)."""
    height: int = Field(default=0, ge=0)
    """For "tokens", and required there: rows of the grid."""
    width: int = Field(default=0, ge=0)
    """For "tokens", and required there: columns of the grid."""

    @model_validator(mode="after")
    def _of_tokens(self) -> Self:
        if self.layout == "tokens" and not (self.height and self.width):
            raise ValueError('layout = "tokens" needs height and width')
        if self.layout != "tokens" and (self.prefix or self.height or self.width):
            raise ValueError('prefix, height and width are for layout = "tokens" only')
        return self

    @property
    def grid(self) -> Grid:
        """The same, as the layer's grid."""
        return Grid(Layout(self.layout), self.prefix, self.height, self.width)


class BatchingConfig(Section):
    """How concurrent requests share a run of the model."""

    max_batch_size: int = Field(default=16, ge=1, le=4096)
    """The largest number of images run at once."""
    max_delay_ms: float = Field(default=2.0, ge=0, le=10_000)
    """How long an image may wait for others while the device is busy, in milliseconds."""


class ModelConfig(Section):
    """One served model."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """Unique name; what clients ask for."""
    source: Annotated[str, AfterValidator(_check_source)]
    """Where the architecture comes from: "onnx:FILE" (an ONNX file of anybody's), "torchvision:NAME", "timm:NAME",
    "python:package.module:factory" (a function without arguments that returns a torch.nn.Module),
    "embedded:efficientnet_lite0" or "export:DIR" (a folder that `heatlens-server export` wrote)."""
    source_folder: DirectoryPath | None = None
    """Where a Python factory's module is looked for, before PYTHONPATH. Unset: the configuration file's folder."""
    weights: Annotated[str, AfterValidator(_check_weights)] = "default"
    """"default" (the source's own pretrained weights), "none" (random, always the same), the name of a torchvision
    weights enum's member, or a .pth, .pt, .safetensors, .pth.tar, .ckpt or .bin file of tensors."""
    weights_key: str = Field(default="", max_length=128)
    """Where in a weights file the state_dict is, as "model_ema". Empty: found under the usual names."""
    labels: FilePath | None = None
    """Class names: one per line, a JSON list, or a JSON object {"0": "name"}. Unset: the source's, if it has any."""
    task: Literal[
        "auto",
        "classification",
        "multi-label-classification",
        "binary-classification",
        "regression",
        "segmentation",
        "detection",
        "embedding",
    ] = "auto"
    """What the model does. "auto": segmentation or detection for torchvision's builders of such models, else
    classification. "segmentation": any network that returns (N, classes, h, w), or a mapping with that as "out".
    "detection": networks with torchvision's interface. "embedding": any network that returns (N, length); of timm's and
    of the embedded model the classifier is left out. "multi-label-classification": a class's probability is the sigmoid
    of its logit. "binary-classification": a network of one output, the logit of class 1; class 0 has its negative.
    "regression": a network of values, (N, values), without probabilities. Of a network that is not declared, one output
    is a binary classifier, sigmoids are multi-label and one without a classifier is an embedding."""
    activation: Literal["auto", "softmax", "sigmoid"] = "auto"
    """Segmentation: "softmax" where the classes of a pixel exclude each other, "sigmoid" where they may overlap.
    "auto": "sigmoid" for a network of one output channel, else "softmax". Detection by an ONNX file that returns logits
    of boxes: "softmax" where the last class is that of nothing. Other tasks have one of their own."""
    threshold: float | None = Field(default=None, gt=0, lt=1)
    """Segmentation by sigmoid: the probability above which a pixel is predicted as a class. Unset: 0.5."""
    detector: Literal["auto", "yolov8", "yolov5", "end2end", "detr", "nms"] = "auto"
    """Detection by an ONNX file: how it returns boxes before any is left out. "yolov8": (N, 4 + classes, boxes).
    "yolov5": (N, boxes, 5 + classes), the fifth the score of there being something. "end2end": (N, boxes, 6), corners,
    score and class of boxes that need no suppression. "detr": scores (N, boxes, classes) and boxes (N, boxes, 4).
    "nms": what goes into its NonMaxSuppression. "auto": found by shapes."""
    boxes: Literal["auto", "cxcywh", "xyxy", "yxyx", "cxcywh-relative", "xyxy-relative", "yxyx-relative"] = "auto"
    """Detection by an ONNX file: what the four numbers of a box are: the centre, width and height, or corners; in
    pixels of the input, or as parts of its sides. "auto": as is usual for `detector`."""
    output: Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)] | None = None
    """Which part of what the network returns holds the scores, if that is no tensor: a key of a mapping or an attribute
    ("logits"), or a place in a tuple or list (0). Unset: "logits" or "out" if there is one, or the one part that
    fits."""
    outputs: Literal["auto", "logits", "probabilities", "log-probabilities"] = "auto"
    """What these scores are: "logits", "probabilities" (the network ends in softmax or sigmoid) or "log-probabilities".
    "auto": found by running the network on a few images."""
    layers: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Module names that can be explained, the default first. Empty: found by running the model once."""
    grids: Mapping[str, GridConfig] = {}
    """How to read what some of `layers` return, by name. A layer that is not named: found by running the model."""
    method: Method = Method.GRAD_CAM
    """The method used when a request names none. Unset: Grad-CAM, element-wise Grad-CAM for networks of tokens, or
    HiResCAM for detectors."""
    version: str = Field(default="", max_length=128)
    """What clients see as the model's version. Empty: derived from the weights. Several models may share a name if each
    has a version of its own."""
    default: bool = False
    """Whether this version answers requests for the model that name no version. Of several, unset: the first."""
    weight: float = Field(default=0.0, ge=0, lt=1)
    """The share of requests for the model that name no version and that this one answers, not being the default: a
    canary. Which ones is decided by a hash of the image."""
    device: Annotated[str | tuple[str, ...], BeforeValidator(_parse_devices)] = "auto"
    """"auto" (cuda if there is one), "cpu", "cuda" or "cuda:N"; or a list of "cpu" and "cuda:N", with one queue."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """The precision the model runs in."""
    engine: Literal["auto", "onnxruntime", "torchscript", "torch"] = "auto"
    """What runs the model. "auto": onnxruntime if the model can be exported and the export gives the same maps, else
    torch."""
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """What runs onnxruntime's graphs. "auto": CUDA if there is a GPU and onnxruntime can use it, else the CPU."""
    isolation: Literal["none", "process"] = "none"
    """Where the model runs: "none": in the server's process. "process": in one of its own, which is started again when
    it crashes; other models do not notice."""
    instances: Annotated[int | Literal["auto"], BeforeValidator(_parse_instances)] = 1
    """How many engines run the model on each device. On a CPU they divide the cores and, unless each has a process of
    its own, share the weights. "auto": one, or one per core if that explains more images a second, as is measured."""
    max_rss_bytes: int = Field(default=0, ge=0)
    """With isolation = "process": the resident memory beyond which its process is started again, between batches, in
    bytes. 0: no limit."""
    hang_after_s: float = Field(default=120.0, gt=0, le=86_400)
    """How long a batch or step runs at least before the model counts as hanging, in seconds: also 20 times as long as
    it usually does. Its callers are told so, and others are refused until it ends."""
    idle_unload_s: float = Field(default=0.0, ge=0, le=31_536_000)
    """After how long without a call or stream it is unloaded, in seconds; the next request loads it again. 0: never."""
    companion: bool = True
    """Whether torch may be loaded beside onnxruntime or torchscript, when a request first needs it, for the methods and
    options that exported graphs lack. It takes the memory of the model once more. Without it they are not offered;
    an export ("export:DIR") never has it."""
    wait_for_export: bool = False
    """Whether a model is ready only once it is exported. Without it torch answers as soon as the model is loaded, and
    onnxruntime takes over. Models with `isolation = "process"`, or an `engine`, are always waited for."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """How images become the model's input."""
    batching: BatchingConfig = BatchingConfig()
    """How requests share a run."""

    @property
    def key(self) -> str:
        """What tells it from other models and other versions: names hold no colon."""
        return f"{self.name}:{self.version}" if self.version else self.name

    def routed_as(self, other: Self) -> Self:
        """The same model, with the keys of another that take no loading."""
        return self.model_copy(update={key: getattr(other, key) for key in _WITHOUT_LOADING})

    @property
    def devices(self) -> tuple[str, ...]:
        """The names in `device`, as a list."""
        return (self.device,) if isinstance(self.device, str) else self.device

    @field_validator("layers")
    @classmethod
    def _unique_layers(cls, layers: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(layers)) < len(layers):
            raise ValueError("names a layer twice")
        return layers

    @field_validator("grids")
    @classmethod
    def _grids_of_layers(cls, grids: Mapping[str, GridConfig], info: ValidationInfo) -> Mapping[str, GridConfig]:
        if _is_export(info) and grids:
            raise ValueError("cannot be set for an export: they are part of it")
        for name in grids:
            if name not in info.data.get("layers", ()):
                raise ValueError(f"names {name!r}, which is not in layers")
        return grids

    @field_validator("task")
    @classmethod
    def _task_of_export(cls, task: str, info: ValidationInfo) -> str:
        if _is_export(info) and not _is_exportable(task):
            raise ValueError(f"exports are of classifiers, not for {task}")
        return task

    @field_validator("activation", "threshold")
    @classmethod
    def _of_segmentation(cls, value: str | float | None, info: ValidationInfo) -> str | float | None:
        task = info.data.get("task", "auto")
        if info.field_name == "activation" and task == "detection" and _is_file(info):
            return value
        own = () if task == "auto" else (Task(task).traits.activation,)
        if value not in {"auto", None, *own} and (_is_export(info) or task not in {"auto", "segmentation"}):
            raise ValueError(f"is for segmentation{'' if task == 'auto' else f', and task is {task!r}'}")
        return value

    @field_validator("detector", "boxes")
    @classmethod
    def _of_detection_files(cls, value: str, info: ValidationInfo) -> str:
        if value != "auto" and not (_is_file(info) and info.data.get("task", "auto") in {"auto", "detection"}):
            raise ValueError(f'is for detection by "{ONNX_PREFIX}" sources')
        return value

    @field_validator("source_folder")
    @classmethod
    def _folder_of_factory(cls, source_folder: Path | None, info: ValidationInfo) -> Path | None:
        if source_folder is not None and not str(info.data.get("source", "python:")).startswith("python:"):
            raise ValueError('is for "python:" sources')
        return source_folder

    @field_validator("output", "outputs")
    @classmethod
    def _output_of_export(cls, value: object, info: ValidationInfo) -> object:
        if _is_export(info):
            raise ValueError("cannot be set for an export: its graphs return logits")
        return value

    @field_validator("weights")
    @classmethod
    def _weights_of_export(cls, weights: str, info: ValidationInfo) -> str:
        if (_is_export(info) or _is_file(info)) and weights != "default":
            kind = "an export" if _is_export(info) else "an ONNX file"
            raise ValueError(f'must be "default" for {kind}: its weights are inside')
        return weights

    @field_validator("weights_key")
    @classmethod
    def _key_of_file(cls, weights_key: str, info: ValidationInfo) -> str:
        if weights_key and not info.data.get("weights", ".pth").endswith(WEIGHT_FILE_SUFFIXES):
            raise ValueError("is for weights that are a file")
        return weights_key

    @field_validator("precision")
    @classmethod
    def _precision_of_file(cls, precision: str, info: ValidationInfo) -> str:
        if _is_file(info) and precision != "fp32":
            raise ValueError(f"ONNX files are computed in fp32, not in {precision}")
        return precision

    @field_validator("engine")
    @classmethod
    def _engine_fits(cls, engine: str, info: ValidationInfo) -> str:
        if _is_export(info) and engine == "torch":
            raise ValueError('an export is run by "onnxruntime" or "torchscript", or "auto" for whichever it is for')
        if _is_file(info) and engine in {"torch", "torchscript"}:
            raise ValueError('an ONNX file is run by "onnxruntime"')
        task = info.data.get("task", "auto")
        if engine in {"onnxruntime", "torchscript"} and not (_is_exportable(task) or _is_file(info)):
            raise ValueError(f'"{engine}" runs exports, which are of classifiers; {task} is for "torch"')
        if engine in {"onnxruntime", "torchscript"} and info.data.get("precision") == "bf16":
            raise ValueError(f'"{engine}" runs in fp32 and fp16; bf16 is for "torch"')
        return engine

    @field_validator("provider")
    @classmethod
    def _provider_is_used(cls, provider: str, info: ValidationInfo) -> str:
        engine = info.data.get("engine")
        if provider != "auto" and not (
            engine == "onnxruntime" or (engine == "auto" and (_is_export(info) or _is_file(info)))
        ):
            raise ValueError('is for engine = "onnxruntime" only')
        return provider

    @field_validator("instances")
    @classmethod
    def _instances_are_measured_here(cls, instances: int | str, info: ValidationInfo) -> int | str:
        if instances == "auto" and info.data.get("isolation") == "process":
            raise ValueError('must be a number for isolation = "process"')
        return instances

    @field_validator("max_rss_bytes")
    @classmethod
    def _memory_of_process(cls, max_rss_bytes: int, info: ValidationInfo) -> int:
        if max_rss_bytes and info.data.get("isolation") == "none":
            raise ValueError('is for isolation = "process"')
        return max_rss_bytes

    @field_validator("preprocess")
    @classmethod
    def _preprocess_of_export(cls, preprocess: PreprocessConfig, info: ValidationInfo) -> PreprocessConfig:
        if _is_export(info) and preprocess != PreprocessConfig():
            raise ValueError("cannot be set for an export: it is part of it")
        return preprocess


def _is_exportable(task: str) -> bool:
    return task == "auto" or Task(task).traits.exportable


def _is_export(info: ValidationInfo) -> bool:
    return str(info.data.get("source", "")).startswith(EXPORT_PREFIX)


def _is_file(info: ValidationInfo) -> bool:
    return str(info.data.get("source", "")).startswith(ONNX_PREFIX)
