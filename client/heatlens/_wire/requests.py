"""From values to protobuf: pure functions that build requests. `answers` reads what comes back."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypedDict, Unpack

import cv2
import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from heatlens._exceptions import InvalidArgumentError
from heatlens._results.images import ImageSource, UInt8Array, load_image
from heatlens._results.results import ModelInfo
from heatlens._wire.arguments import as_float, checked_bool, checked_int, is_text, number_of
from heatlens._wire.names import AGGREGATIONS, MAP_SIZES, MAP_TYPES, METHODS, METRICS, TARGET_SCORES
from heatlens.v1 import explain_pb2, faithfulness_pb2

ALL = "all"
"""Stands for every name there is."""

Metrics: TypeAlias = bool | str | Sequence[str]
MaskSource: TypeAlias = ImageSource
ReferenceSource: TypeAlias = ImageSource | Sequence[float]


class MapOptions(TypedDict, total=False):
    """What `explain` and `stream` have in common. `Client.explain` documents them."""

    top_k: int | None
    class_ids: int | Sequence[int] | None
    method: str | None
    layers: str | Sequence[str] | None
    map_size: str | None
    map_type: str | None
    top_predictions: int | None
    target_score: str | None
    aggregation: str | None
    augment: bool
    principal_component: bool


def explain_request(
    image: ImageSource,
    *,
    model: str | None = None,
    faithfulness: Metrics = False,
    mask: MaskSource | None = None,
    reference: ReferenceSource | None = None,
    min_score: float | None = None,
    return_mask: bool = False,
    **options: Unpack[MapOptions],
) -> explain_pb2.ExplainRequest:
    """Build the request for `Client.explain`, which documents the arguments. Reads the file if the image is a path.

    Raises:
        InvalidArgumentError: an argument is wrong; names it.
        FileNotFoundError: there is no such file (another OSError if it cannot be read).
    """
    request = explain_pb2.ExplainRequest(model=model_name(model), options=explain_options(**options))
    wanted = request.options
    wanted.return_mask = checked_bool("return_mask", return_mask)
    metrics = _metrics(faithfulness)
    if metrics is not None:
        wanted.faithfulness.CopyFrom(faithfulness_pb2.FaithfulnessOptions(metrics=metrics))
    if min_score is not None:
        score = as_float(min_score)
        if not 0 <= score <= 1:
            raise InvalidArgumentError.of("min_score", f"expected a number in [0, 1], got {min_score!r}")
        wanted.min_score = score
    if mask is not None:
        _fill_tensor(wanted.mask, _mask(mask), explain_pb2.DATA_TYPE_UINT8)
    if reference is not None:
        _fill_reference(wanted, reference)
    fill_image(request.image, load_image(image))
    return request


def explain_options(
    *,
    top_k: int | None = None,
    class_ids: int | Sequence[int] | None = None,
    method: str | None = None,
    layers: str | Sequence[str] | None = None,
    map_size: str | None = None,
    map_type: str | None = None,
    top_predictions: int | None = None,
    target_score: str | None = None,
    aggregation: str | None = None,
    augment: bool = False,
    principal_component: bool = False,
) -> explain_pb2.ExplainOptions:
    """Build what `explain` and `stream` have in common. `Client.explain` documents the arguments.

    Raises:
        InvalidArgumentError: an argument is wrong; names it.
    """
    if top_k is not None and class_ids is not None:
        raise InvalidArgumentError.of("class_ids", "cannot be combined with top_k: give one of the two")
    options = explain_pb2.ExplainOptions(
        method=number_of("method", method, METHODS),
        layers=_layer_names(layers),
        map_size=number_of("map_size", map_size, MAP_SIZES),
        map_type=number_of("map_type", map_type, MAP_TYPES),
        top_predictions=0 if top_predictions is None else checked_int("top_predictions", top_predictions, at_least=0),
        target_score=number_of("target_score", target_score, TARGET_SCORES),
        aggregation=number_of("aggregation", aggregation, AGGREGATIONS),
    )
    if checked_bool("augment", augment):
        options.smoothing.augmentation = True
    if checked_bool("principal_component", principal_component):
        options.smoothing.principal_component = True
    if top_k is not None:
        options.top_k = checked_int("top_k", top_k, at_least=1)
    if class_ids is not None:
        options.class_ids.values.extend(_class_ids(class_ids))
    return options


def metrics_of(task: str) -> tuple[str, ...]:
    """Return the metrics that a task has: only classifiers say which class is the least probable."""
    return tuple(metric for metric in METRICS if metric != "class-sensitivity" or "classification" in task)


def keep_metrics_of(models: Iterable[ModelInfo], request: explain_pb2.ExplainRequest) -> None:
    """Reduce a request for all metrics to those that its model's task has; left as it is if the task is not known."""
    task = next((one.task for one in models if (one.name == request.model if request.model else one.is_default)), "")
    if task:
        del request.options.faithfulness.metrics[:]
        request.options.faithfulness.metrics.extend(
            number_of("faithfulness", metric, METRICS) for metric in metrics_of(task)
        )


def check_size(request: Message, max_message_bytes: int, *, argument: str = "image") -> None:
    """Refuse a request that no channel would carry: gRPC would only find out after burning every retry.

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


def fill_image(image: explain_pb2.Image, loaded: bytes | npt.NDArray[np.uint8]) -> None:
    """Write what `load_image` returned into its place in a request: a message of its own would be copied there."""
    if isinstance(loaded, bytes):
        image.encoded = loaded
    else:
        image.pixels.data_type = explain_pb2.DATA_TYPE_UINT8
        image.pixels.shape.extend(loaded.shape)
        image.pixels.data = loaded.tobytes()


def model_name(model: str | None) -> str:
    """Return a model's name as sent; None is the default model, the empty name.

    Raises:
        InvalidArgumentError: not a text.
    """
    if model is not None and not is_text(model):
        raise InvalidArgumentError.of("model", f"expected a name, got {model!r}")
    return model or ""


def _layer_names(layers: str | Sequence[str] | None) -> list[str]:
    if layers is None:
        return []
    names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else []
    if not names or not all(is_text(name) and name for name in names):
        raise InvalidArgumentError.of("layers", f"expected a layer's name or a list of names, got {layers!r}")
    return names


def _class_ids(class_ids: int | Sequence[int]) -> list[int]:
    values: list[Any]
    if isinstance(class_ids, np.ndarray):
        values = list(np.atleast_1d(class_ids))
    elif isinstance(class_ids, Sequence) and not isinstance(class_ids, bytes | bytearray):
        values = list(class_ids)
    else:
        values = [class_ids]
    if not values:
        raise InvalidArgumentError.of("class_ids", "expected at least one class id")
    return [checked_int("class_ids", value, at_least=0) for value in values]


def _metrics(faithfulness: Metrics) -> list[faithfulness_pb2.FaithfulnessMetric] | None:
    """Return the metrics asked for, empty for the server's choice; None if none are."""
    if faithfulness is None or isinstance(faithfulness, bool | np.bool_):
        return [] if faithfulness else None
    names: object = faithfulness
    if isinstance(faithfulness, str):
        names = METRICS if faithfulness == ALL else [faithfulness]
    if not isinstance(names, Iterable) or not (names := list(names)):
        raise InvalidArgumentError.of(
            "faithfulness", f"expected True, 'all', a metric's name or a list of names, got {faithfulness!r}"
        )
    numbers = [number_of("faithfulness", name if isinstance(name, str) else repr(name), METRICS) for name in names]
    if len(set(numbers)) < len(numbers):
        raise InvalidArgumentError.of("faithfulness", f"expected each metric once, got {names!r}")
    return numbers


def _mask(mask: MaskSource) -> UInt8Array:
    """Return a mask as sent: uint8 (height, width), 1 where the pixel counts."""
    if isinstance(mask, np.ndarray):
        if mask.ndim != 2 or mask.dtype.kind not in "bui":
            raise InvalidArgumentError.of(
                "mask", f"expected bools or integers of shape (height, width), got {mask.dtype} of shape {mask.shape}"
            )
        pixels: npt.NDArray[Any] = mask
    else:
        encoded = load_image(mask, argument="mask")
        try:
            decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_GRAYSCALE)
        except cv2.error:
            decoded = None
        if decoded is None:
            raise InvalidArgumentError.of("mask", "cannot be decoded", reason="IMAGE_UNDECODABLE")
        pixels = decoded
    if not pixels.any():
        raise InvalidArgumentError.of("mask", "expected at least one pixel that is not 0")
    return np.asarray(pixels != 0, dtype=np.uint8)


def _fill_reference(options: explain_pb2.ExplainOptions, reference: ReferenceSource) -> None:
    """Write an embedding (numbers, or an array of one dimension) or else an image into its place."""
    is_numbers = isinstance(reference, Sequence) and not isinstance(reference, str | bytes | bytearray | memoryview)
    if not is_numbers and not (isinstance(reference, np.ndarray) and reference.ndim == 1):
        fill_image(options.reference_image, load_image(reference, argument="reference"))  # type: ignore[arg-type]
        return
    try:
        numbers = np.asarray(reference)
    except ValueError:
        # Rows of different lengths.
        numbers = np.empty(0)
    # What float32 cannot hold becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
        embedding = numbers.astype(np.float32) if numbers.dtype.kind in "fiu" else np.empty(0, np.float32)
    if embedding.ndim != 1 or not embedding.any() or not np.isfinite(embedding).all():
        raise InvalidArgumentError.of("reference", "expected an embedding of finite numbers, not all 0, or an image")
    _fill_tensor(options.reference_embedding, embedding, explain_pb2.DATA_TYPE_FLOAT32)


def _fill_tensor(tensor: explain_pb2.Tensor, values: npt.NDArray[Any], data_type: explain_pb2.DataType) -> None:
    tensor.data_type = data_type
    tensor.shape.extend(values.shape)
    tensor.data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
