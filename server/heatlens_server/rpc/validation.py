"""From ExplainOptions and Image to what can be run, or to every field that is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import method_pb2
from heatlens_server.cam.catalog import Method
from heatlens_server.engines.base import ClassIds, ClassTarget, MapSpec, TopK, UInt8Array
from heatlens_server.errors import FieldViolation, InvalidArgument
from heatlens_server.imaging.decode import pixels_from_tensor
from heatlens_server.rpc.limits import Limits
from heatlens_server.rpc.wire import MAP_DTYPES, METHOD_FROM_PROTO, data_type_name
from heatlens_server.serving.served import ServedModel

_SHOWN_CHARACTERS = 80


SourceImage = bytes | UInt8Array
"""An encoded file, or uint8 RGB pixels (H, W, 3)."""


@dataclass(frozen=True, slots=True)
class ExplainPlan:
    """How to explain images: valid options.

    Attributes:
        target: the classes wanted.
        spec: method, layers and map size for the engine.
        place_on_source: True if maps are to be placed on the source image.
        map_dtype: numpy dtype of the maps on the wire.
        top_predictions: how many classes to list.
    """

    target: ClassTarget
    spec: MapSpec
    place_on_source: bool
    map_dtype: str
    top_predictions: int

    @property
    def target_count(self) -> int:
        """How many maps the answer holds."""
        return self.target.count


@dataclass(frozen=True, slots=True)
class ExplainCommand:
    """A valid request: an image, and how to explain it."""

    image: SourceImage
    plan: ExplainPlan


def parse_explain(request: pb.ExplainRequest, model: ServedModel, limits: Limits) -> ExplainCommand:
    """Check every field of a request against the model and the limits.

    Raises:
        InvalidArgument: with every wrong field.
    """
    wrong = Violations()
    plan = parse_options(request.options, model, limits, wrong)
    image = parse_image(request.image, limits, wrong)
    wrong.raise_if_any()
    return ExplainCommand(image, plan)


def parse_options(options: pb.ExplainOptions, model: ServedModel, limits: Limits, wrong: "Violations") -> ExplainPlan:
    """Check how to explain. The plan may be used if nothing was added to `wrong`."""
    method = _method(options, model, wrong)
    layers = _layers(options, model, method, wrong)
    target = _target(options, model, limits, wrong)
    map_size = options.map_size
    if map_size not in pb.MapSize.values():
        wrong.add("options.map_size", f"unknown map size {map_size}")
    map_dtype = MAP_DTYPES.get(options.map_type)
    if map_dtype is None:
        wrong.add("options.map_type", f"unknown data type {options.map_type}")
    if not 0 <= options.top_predictions <= model.engine.class_count:
        wrong.add(
            "options.top_predictions",
            f"must be in [0, {model.engine.class_count}], the model's class count; got {options.top_predictions}",
        )
    if options.HasField("smoothing") and (options.smoothing.augmentation or options.smoothing.principal_component):
        wrong.add("options.smoothing", "smoothing is not supported by this version of the server")
    return ExplainPlan(
        target=target,
        spec=MapSpec(method=method, layers=layers, upsample=map_size in {pb.MAP_SIZE_INPUT, pb.MAP_SIZE_SOURCE}),
        place_on_source=map_size == pb.MAP_SIZE_SOURCE,
        map_dtype=map_dtype or "",
        top_predictions=options.top_predictions,
    )


def parse_image(image: pb.Image, limits: Limits, wrong: "Violations") -> SourceImage:
    """Check an image as far as that goes without decoding it. It may be used if nothing was added to `wrong`."""
    source = image.WhichOneof("source")
    if source == "pixels":
        pixels = image.pixels
        try:
            return pixels_from_tensor(
                data_type=data_type_name(pixels.data_type),
                shape=tuple(pixels.shape),
                data=pixels.data,
                max_pixels=limits.max_image_pixels,
            )
        except InvalidArgument as error:
            wrong.add_error(error)
    elif source is None:
        wrong.add("image", "an image is required: set encoded or pixels", reason="IMAGE_MISSING")
    return image.encoded


class Violations:
    """Collects what is wrong, so that a caller learns everything at once."""

    def __init__(self) -> None:
        """Nothing is wrong yet."""
        self._violations: list[FieldViolation] = []
        self._reason = ""
        self._metadata: dict[str, str] = {}

    def add(self, field: str, description: str, *, reason: str = "INVALID_OPTION") -> None:
        """A field is wrong. The error's reason is the first one given."""
        self._violations.append(FieldViolation(field, description))
        self._reason = self._reason or reason

    def add_error(self, error: InvalidArgument) -> None:
        """All fields of an error are wrong."""
        self._violations.extend(error.violations)
        self._reason = self._reason or error.reason
        self._metadata |= error.metadata

    def raise_if_any(self) -> None:
        """Raise InvalidArgument with everything that was added, if anything was."""
        if self._violations:
            raise InvalidArgument(self._violations, reason=self._reason, metadata=self._metadata)


def _method(options: pb.ExplainOptions, model: ServedModel, wrong: Violations) -> Method:
    if options.method == method_pb2.METHOD_UNSPECIFIED:
        return model.default_method
    method = METHOD_FROM_PROTO.get(options.method)
    supported = ", ".join(model.engine.methods)
    if method is None:
        wrong.add("options.method", f"unknown method {options.method}; this model supports: {supported}")
    elif method not in model.engine.methods:
        wrong.add("options.method", f"model {model.name!r} does not support {method}; it supports: {supported}")
    else:
        return method
    return model.default_method


def _layers(options: pb.ExplainOptions, model: ServedModel, method: Method, wrong: Violations) -> tuple[str, ...]:
    offered = model.engine.layers
    if len(options.layers) > len(offered):
        # Not one violation each: their number, and the time to compare them, would be the caller's to choose.
        wrong.add("options.layers", f"at most {len(offered)} layers, each once; got {len(options.layers)}")
        return offered[:1]
    layers = tuple(options.layers) or offered[:1]
    for i, layer in enumerate(layers):
        if layer not in offered:
            wrong.add(f"options.layers[{i}]", f"unknown layer {_shown(layer)}; this model offers: {', '.join(offered)}")
        elif layer in layers[:i]:
            wrong.add(f"options.layers[{i}]", f"duplicate layer {_shown(layer)}")
    if method is Method.CAM and layers != offered[:1]:
        wrong.add("options.layers", f"{Method.CAM} explains the model's default layer only: {offered[0]}")
    return layers


def _target(options: pb.ExplainOptions, model: ServedModel, limits: Limits, wrong: Violations) -> ClassTarget:
    class_count = model.engine.class_count
    kind = options.WhichOneof("target")
    if kind == "top_k":
        largest = min(class_count, limits.max_targets)
        if not 1 <= options.top_k <= largest:
            wrong.add("options.top_k", f"must be in [1, {largest}]; got {options.top_k}")
        return TopK(options.top_k)
    if kind == "class_ids":
        ids = tuple(options.class_ids.values)
        _check_class_ids(ids, class_count, limits, wrong)
        return ClassIds(ids)
    return TopK(1)


def _check_class_ids(ids: Sequence[int], class_count: int, limits: Limits, wrong: Violations) -> None:
    field = "options.class_ids.values"
    if not ids:
        wrong.add(field, "must name at least one class")
    if len(ids) > limits.max_targets:
        # Not one violation each: their number would be the caller's to choose.
        wrong.add(field, f"at most {limits.max_targets} classes in one request; got {len(ids)}")
        return
    for i, class_id in enumerate(ids):
        if not 0 <= class_id < class_count:
            wrong.add(f"{field}[{i}]", f"class id {class_id} is not in [0, {class_count})")
        elif class_id in ids[:i]:
            wrong.add(f"{field}[{i}]", f"duplicate class id {class_id}")


def _shown(text: str) -> str:
    """A caller's text, as it may be repeated in an error: short, and quoted."""
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
