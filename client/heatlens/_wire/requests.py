"""From values to protobuf: pure functions that build requests. `answers` reads what comes back."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypedDict, Unpack

import cv2
import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from heatlens._exceptions import InvalidArgumentError
from heatlens._results.images import ImageSource, PixelArray, is_pil, load_image, pil_pixels
from heatlens._results.results import ModelInfo
from heatlens._wire.arguments import as_float, checked_bool, checked_int, is_text, number_of
from heatlens._wire.names import (
    AGGREGATIONS,
    DIRECTIONS,
    MAP_SIZES,
    MAP_TYPES,
    METHODS,
    METRICS,
    TARGET_SCORES,
    AggregationName,
    DirectionName,
    MapSizeName,
    MapTypeName,
    TargetScoreName,
)
from heatlens.v1 import explain_pb2, faithfulness_pb2

_PIXEL_TYPES = {
    "uint8": explain_pb2.DATA_TYPE_UINT8,
    "uint16": explain_pb2.DATA_TYPE_UINT16,
    "float32": explain_pb2.DATA_TYPE_FLOAT32,
}

ALL = "all"
"""Stands for all names."""

Metrics: TypeAlias = bool | str | Sequence[str]
MaskSource: TypeAlias = ImageSource
ReferenceSource: TypeAlias = ImageSource | Sequence[float]


# Pillow's modes of one number per pixel. Those of a palette are its indices: 0 is what does not count.
_MASK_MODES = frozenset({"1", "L", "P", "I", "I;16"})


class MapOptions(TypedDict, total=False):
    """How maps are made, of images and of frames. `Client.explain` documents the options."""

    top_k: int | None
    class_ids: int | str | Sequence[int | str] | None
    method: str | None
    layers: str | Sequence[str] | None
    map_size: MapSizeName | None
    map_type: MapTypeName | None
    top_predictions: int | None
    target_score: TargetScoreName | None
    aggregation: AggregationName | None
    augment: bool
    principal_component: bool
    direction: DirectionName | None


class ExplainOptions(MapOptions, total=False):
    """What `Client.explain` takes besides, which documents it."""

    faithfulness: Metrics
    mask: MaskSource | None
    reference: ReferenceSource | None
    min_score: float | None
    return_mask: bool


def explain_request(
    image: ImageSource,
    caller: str = "Client.explain",
    /,
    *,
    model: str | None = None,
    version: str | None = None,
    **options: Unpack[ExplainOptions],
) -> explain_pb2.ExplainRequest:
    """Build the request for `Client.explain`, which documents the arguments. Reads the file if the image is a path.

    `caller` is the function that was called, for errors.

    Raises:
        InvalidArgumentError: an argument is wrong; names it.
        TypeError: there is no option of that name.
        FileNotFoundError: there is no such file (another OSError if it cannot be read).
    """
    request = explain_pb2.ExplainRequest(model=model_name(model), model_version=version_name(version))
    write_options(request.options, options, known=ExplainOptions.__optional_keys__, caller=caller)
    fill_image(request.image, load_image(image))
    return request


def write_options(
    message: explain_pb2.ExplainOptions, options: Mapping[str, object], *, known: frozenset[str], caller: str
) -> None:
    """Write options into their fields. One that has its default is not sent.

    Args:
        message: where they go.
        options: the values by name.
        known: the names that are allowed.
        caller: the function that was called, for errors.

    Raises:
        InvalidArgumentError: a value is wrong; names the option.
        TypeError: there is no option of that name.
    """
    message.SetInParent()
    if options.get("top_k") is not None and options.get("class_ids") is not None:
        raise InvalidArgumentError.of("class_ids", "cannot be combined with top_k: give one of the two")
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"{caller}() got an unexpected keyword argument {name!r}")
        if value is not OPTIONS[name].default:
            OPTIONS[name].write(message, name, value)


_OF_CLASSIFIERS = frozenset({"class-sensitivity"})
_OF_PROBABILITIES = frozenset({"deletion", "insertion", "average-drop", "increase"})


def metrics_of(task: str) -> tuple[str, ...]:
    """Return the metrics that a task has: only classifiers say which class is the least probable.

    Values have no probabilities, whose areas and shares other metrics are.
    """
    lacking: frozenset[str] = frozenset()
    if "classification" not in task:
        lacking = _OF_CLASSIFIERS | (_OF_PROBABILITIES if task == "regression" else frozenset())
    return tuple(metric for metric in METRICS if metric not in lacking)


def keep_metrics_of(models: Iterable[ModelInfo], request: explain_pb2.ExplainRequest) -> None:
    """Reduce a request for all metrics to those that its model's task has; left as it is if the task is not known."""
    models, version = list(models), request.model_version
    name = request.model or next((one.name for one in models if one.is_default), "")
    asked = [one for one in models if one.name == name]
    task = next((one.task for one in asked if (one.version == version if version else one.is_default_version)), "")
    if task:
        del request.options.faithfulness.metrics[:]
        request.options.faithfulness.metrics.extend(
            number_of("faithfulness", metric, METRICS) for metric in metrics_of(task)
        )


def check_size(request: Message, max_message_bytes: int, *, argument: str = "image") -> None:
    """Refuse a request that is larger than a message may be: gRPC would refuse it only after all retries.

    Raises:
        InvalidArgumentError: the request is larger than the limit.
    """
    size_bytes = request.ByteSize()
    if size_bytes > max_message_bytes:
        raise InvalidArgumentError.of(
            argument,
            f"the request has {size_bytes} bytes, max_message_bytes is {max_message_bytes}; "
            "send the encoded file, or a smaller image",
            reason="MESSAGE_TOO_LARGE",
        )


def health_request(model: str | None) -> health_pb2.HealthCheckRequest:
    """Build the health question about the server (None) or one model.

    Raises:
        InvalidArgumentError: the model is no name.
    """
    name = model_name(model)
    return health_pb2.HealthCheckRequest(service="" if model is None else f"heatlens.v1.ExplainService/{name}")


def fill_image(image: explain_pb2.Image, loaded: bytes | PixelArray) -> None:
    """Write what `load_image` returned into a request. In place, as a message of its own would be copied."""
    if isinstance(loaded, bytes):
        image.encoded = loaded
    else:
        image.pixels.data_type = _PIXEL_TYPES[loaded.dtype.name]
        image.pixels.shape.extend(loaded.shape)
        image.pixels.data = loaded.astype(loaded.dtype.newbyteorder("<"), copy=False).tobytes()


def model_name(model: str | None) -> str:
    """Return a model's name as sent; None is the default model, the empty name.

    Raises:
        InvalidArgumentError: not a text.
    """
    if model is not None and not is_text(model):
        raise InvalidArgumentError.of("model", f"expected a name, got {model!r}")
    return model or ""


def version_name(version: str | None) -> str:
    """Return a version as sent; None is the one that the server chooses, the empty one.

    Raises:
        InvalidArgumentError: not a text.
    """
    if version is not None and not is_text(version):
        raise InvalidArgumentError.of("version", f"expected a text, got {version!r}")
    return version or ""


@dataclass(frozen=True, slots=True)
class Option:
    """What is known of an option.

    Attributes:
        field: its path in heatlens.v1.ExplainOptions; empty if `check` returns several fields, as such a message.
        check: returns what is sent for a value: a number, a list, a message; False for nothing. It is given the
            option's name, for its InvalidArgumentError.
        help: one line for the command line.
        default: the value that is not sent.
    """

    field: str
    check: Callable[[str, Any], Any]
    help: str
    default: bool | None = None

    def write(self, message: Message, name: str, value: object) -> None:
        """Check a value and write it into its field."""
        checked = self.check(name, value)
        if checked is False:
            return
        if not self.field:
            message.MergeFrom(checked)
            return
        *parents, field = self.field.split(".")
        for parent in parents:
            message = getattr(message, parent)
        if isinstance(checked, Message):
            getattr(message, field).CopyFrom(checked)
        elif isinstance(checked, list):
            getattr(message, field).extend(checked)
        else:
            setattr(message, field, checked)


def _layer_names(name: str, layers: str | Sequence[str]) -> list[str]:
    names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else []
    if not names or not all(is_text(one) and one for one in names):
        raise InvalidArgumentError.of(name, f"expected a layer's name or a list of names, got {layers!r}")
    return names


def _class_ids(name: str, class_ids: int | str | Sequence[int | str]) -> explain_pb2.ClassIds:
    values: list[Any]
    if isinstance(class_ids, np.ndarray):
        values = list(np.atleast_1d(class_ids))
    elif isinstance(class_ids, Sequence) and not isinstance(class_ids, str | bytes | bytearray):
        values = list(class_ids)
    else:
        values = [class_ids]
    labels = [value for value in values if isinstance(value, str)]
    if not values or not all(is_text(label) and label for label in labels):
        raise InvalidArgumentError.of(name, f"expected at least one class, by id or label, got {class_ids!r}")
    ids = [checked_int(name, value, at_least=0) for value in values if not isinstance(value, str)]
    return explain_pb2.ClassIds(values=ids, labels=labels)


def _score(name: str, value: float) -> float:
    score = as_float(value)
    if not 0 <= score <= 1:
        raise InvalidArgumentError.of(name, f"expected a number in [0, 1], got {value!r}")
    return score


def _metrics(argument: str, faithfulness: Metrics | None) -> faithfulness_pb2.FaithfulnessOptions | Literal[False]:
    """Return the metrics asked for, empty for the server's choice; False if none are."""
    if faithfulness is None or isinstance(faithfulness, bool | np.bool_):
        return faithfulness_pb2.FaithfulnessOptions() if faithfulness else False
    names: object = faithfulness
    if isinstance(faithfulness, str):
        names = METRICS if faithfulness == ALL else [faithfulness]
    if not isinstance(names, Iterable) or not (names := list(names)):
        raise InvalidArgumentError.of(
            argument, f"expected True, 'all', a metric's name or a list of names, got {faithfulness!r}"
        )
    numbers = [number_of(argument, name if isinstance(name, str) else repr(name), METRICS) for name in names]
    if len(set(numbers)) < len(numbers):
        raise InvalidArgumentError.of(argument, f"expected each metric once, got {names!r}")
    return faithfulness_pb2.FaithfulnessOptions(metrics=numbers)


def _mask(name: str, mask: MaskSource) -> explain_pb2.Tensor:
    """Return a mask as sent: uint8 (height, width), 1 where the pixel counts."""
    if isinstance(mask, np.ndarray):
        if mask.ndim != 2 or mask.dtype.kind not in "bui":
            raise InvalidArgumentError.of(
                name, f"expected bools or integers of shape (height, width), got {mask.dtype} of shape {mask.shape}"
            )
        pixels: npt.NDArray[Any] = mask
    elif is_pil(mask):
        pixels = pil_pixels(mask, _MASK_MODES, otherwise="L")
    else:
        encoded = load_image(mask, argument=name)
        try:
            decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_GRAYSCALE)
        except cv2.error:
            decoded = None
        if decoded is None:
            raise InvalidArgumentError.of(name, "cannot be decoded", reason="IMAGE_UNDECODABLE")
        pixels = decoded
    if not pixels.any():
        raise InvalidArgumentError.of(name, "expected at least one pixel that is not 0")
    return _tensor(np.asarray(pixels != 0, dtype=np.uint8), explain_pb2.DATA_TYPE_UINT8)


def _reference(name: str, reference: ReferenceSource) -> explain_pb2.ExplainOptions:
    """Return options with an embedding (numbers, or an array of one dimension or one row), or else an image."""
    options = explain_pb2.ExplainOptions()
    is_numbers = isinstance(reference, Sequence) and not isinstance(reference, str | bytes | bytearray | memoryview)
    if isinstance(reference, np.ndarray):
        # Floats of two dimensions are rather several embeddings than a gray image.
        is_numbers = reference.ndim == 1 or (reference.ndim == 2 and reference.dtype.kind == "f")
    if not is_numbers:
        fill_image(options.reference_image, load_image(reference, argument=name))  # type: ignore[arg-type]
        return options
    try:
        numbers = np.asarray(reference)
    except ValueError:
        # Rows of different lengths.
        numbers = np.empty(0)
    # What float32 cannot hold becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
        embedding = numbers.astype(np.float32) if numbers.dtype.kind in "fiu" else np.empty(0, np.float32)
    if embedding.ndim == 2 and len(embedding) == 1:
        # As models return it for a batch of one.
        embedding = embedding[0]
    if embedding.ndim != 1 or not embedding.any() or not np.isfinite(embedding).all():
        raise InvalidArgumentError.of(name, "expected an embedding of finite numbers, not all 0, or an image")
    options.reference_embedding.CopyFrom(_tensor(embedding, explain_pb2.DATA_TYPE_FLOAT32))
    return options


def _tensor(values: npt.NDArray[Any], data_type: explain_pb2.DataType) -> explain_pb2.Tensor:
    data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    return explain_pb2.Tensor(data_type=data_type, shape=values.shape, data=data)


OPTIONS: Mapping[str, Option] = {
    "top_k": Option("top_k", partial(checked_int, at_least=1), "Explain the N most probable classes."),
    "class_ids": Option("class_ids", _class_ids, "Explain this class, by its id or its label. Repeatable."),
    "method": Option("method", partial(number_of, names=METHODS), "grad-cam, layer-cam, ..."),
    "layers": Option("layers", _layer_names, "Explain this layer. Repeatable."),
    "map_size": Option("map_size", partial(number_of, names=MAP_SIZES), "layer, input or source."),
    "map_type": Option("map_type", partial(number_of, names=MAP_TYPES), "float32, float16 or uint8 on the wire."),
    "top_predictions": Option(
        "top_predictions", partial(checked_int, at_least=0), "Return so many of the most probable classes."
    ),
    "target_score": Option(
        "target_score",
        partial(number_of, names=TARGET_SCORES),
        "What is explained about a class: logit, probability, log-probability or contrast.",
    ),
    "aggregation": Option(
        "aggregation",
        partial(number_of, names=AGGREGATIONS),
        "Several layers' maps become one: mean, max or product.",
    ),
    "augment": Option(
        "smoothing.augmentation",
        checked_bool,
        "Average the maps of the image and its mirror image, darker and brighter.",
        default=False,
    ),
    "principal_component": Option(
        "smoothing.principal_component", checked_bool, "Smooth maps: their first principal component.", default=False
    ),
    "direction": Option(
        "direction", partial(number_of, names=DIRECTIONS), "Regression: explain the value's increase or decrease."
    ),
    "faithfulness": Option(
        "faithfulness", _metrics, "Measure how faithful the maps are: deletion,insertion,... or all.", default=False
    ),
    "mask": Option("mask", _mask, "Segmentation: explain the pixels that are not black in this image."),
    "reference": Option("", _reference, "Embedding models: what to compare with: an image, or an embedding (.npy)."),
    "min_score": Option("min_score", _score, "Detection: explain detections of at least this score."),
    "return_mask": Option(
        "return_mask", checked_bool, "Segmentation: write the predicted mask, too. Needs -o.", default=False
    ),
}
"""The options of `Client.explain`, by name. Those of MapOptions are options of streams, too."""
