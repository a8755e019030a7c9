"""From ExplainOptions and Image to what can be run, or to every field that is wrong with them."""

from dataclasses import dataclass

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import method_pb2
from heatlens_server.api.images import SourceImage, parse_image
from heatlens_server.api.limits import Limits
from heatlens_server.api.plan import ExplainPlan
from heatlens_server.api.tasks.base import TaskWire
from heatlens_server.api.tasks.table import task_wire
from heatlens_server.api.violations import Violations, shown
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import PRESETS, Aggregation, Method, Metric, Preset, Score
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.transports.grpc.names import (
    AGGREGATION_FROM_PROTO,
    MAP_DTYPES,
    METHOD_FROM_PROTO,
    METRIC_FROM_PROTO,
    SCORE_FROM_PROTO,
)


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


def parse_options(options: pb.ExplainOptions, model: ServedModel, limits: Limits, wrong: Violations) -> ExplainPlan:
    """Check how to explain. The plan may be used if nothing was added to `wrong`."""
    wire = task_wire(model.capabilities.task)
    method = _method(options, model, wrong)
    preset = method.as_preset
    layers = _layers(options, model, preset, wrong)
    wanted = wire.wanted(options, model, limits, wrong)
    map_size = options.map_size
    if map_size not in pb.MapSize.values():
        wrong.add("options.map_size", f"unknown map size {map_size}")
    map_dtype = MAP_DTYPES.get(options.map_type)
    if map_dtype is None:
        wrong.add("options.map_type", f"unknown data type {options.map_type}")
    _check_predictions(options, model, wire, wrong)
    spec = MapSpec(
        method=preset.method,
        layers=layers,
        upsample=map_size in {pb.MAP_SIZE_INPUT, pb.MAP_SIZE_SOURCE},
        score=_score(options, model, method, preset, wrong),
        aggregation=_aggregation(options, method, preset, wrong),
        augment=_augment(options, model, wire, wrong),
        principal=_principal(options, model, preset, wrong),
        metrics=_metrics(options, model, wire, wrong),
        return_mask=options.return_mask,
    )
    return ExplainPlan(
        target=wanted.target,
        spec=spec,
        place_on_source=map_size == pb.MAP_SIZE_SOURCE,
        map_dtype=map_dtype or "",
        top_predictions=options.top_predictions,
        complete=wanted.complete,
    )


def _method(options: pb.ExplainOptions, model: ServedModel, wrong: Violations) -> Method:
    if options.method == method_pb2.METHOD_UNSPECIFIED:
        return model.default_method
    method = METHOD_FROM_PROTO.get(options.method)
    offered = model.capabilities.requestable_methods
    supported = ", ".join(offered)
    if method is None:
        wrong.add("options.method", f"unknown method {options.method}; this model supports: {supported}")
    elif method not in offered:
        wrong.add("options.method", f"model {model.name!r} does not support {method}; it supports: {supported}")
    else:
        return method
    return model.default_method


def _layers(options: pb.ExplainOptions, model: ServedModel, preset: Preset, wrong: Violations) -> tuple[str, ...]:
    offered = model.capabilities.layers_of(preset.method)
    known = model.capabilities.layers
    if len(options.layers) > len(known):
        # Not one violation each: their number, and the time to compare them, would be the caller's to choose.
        wrong.add("options.layers", f"at most {len(known)} layers, each once; got {len(options.layers)}")
        return offered[:1]
    layers = tuple(options.layers) or (offered if preset.all_layers else offered[:1])
    for i, layer in enumerate(layers):
        if layer in model.capabilities.multi_map_layers and layer not in offered:
            wrong.add(
                f"options.layers[{i}]",
                f"{shown(layer)} is several maps at once: {preset.method} explains {', '.join(offered) or 'no layer'}",
            )
        elif layer not in known:
            wrong.add(f"options.layers[{i}]", f"unknown layer {shown(layer)}; this model offers: {', '.join(offered)}")
        elif layer not in offered and preset.method is not Method.CAM:
            wrong.add(
                f"options.layers[{i}]",
                f"this export has no {preset.method} by {shown(layer)}, only by {', '.join(offered)}",
            )
        elif layer in layers[:i]:
            wrong.add(f"options.layers[{i}]", f"duplicate layer {shown(layer)}")
    if preset.method is Method.CAM and layers != offered[:1]:
        wrong.add("options.layers", f"{Method.CAM} explains the model's default layer only: {offered[0]}")
    return layers


def _check_predictions(options: pb.ExplainOptions, model: ServedModel, wire: TaskWire, wrong: Violations) -> None:
    count = options.top_predictions
    if not wire.predicts and count:
        wrong.add(
            "options.top_predictions", f"a model of {model.capabilities.task} predicts no classes for the whole image"
        )
    elif not 0 <= count <= model.capabilities.class_count:
        wrong.add(
            "options.top_predictions",
            f"must be in [0, {model.capabilities.class_count}], the model's class count; got {count}",
        )


def _score(options: pb.ExplainOptions, model: ServedModel, method: Method, preset: Preset, wrong: Violations) -> Score:
    if options.target_score == method_pb2.TARGET_SCORE_UNSPECIFIED:
        # An export may have another score than the logit; it has that one only.
        alone = len(model.capabilities.scores) == 1 and method not in PRESETS
        return model.capabilities.scores[0] if alone else preset.score
    score = SCORE_FROM_PROTO.get(options.target_score)
    if score is None:
        wrong.add("options.target_score", f"unknown target score {options.target_score}")
    elif score not in model.capabilities.scores:
        supported = ", ".join(model.capabilities.scores)
        wrong.add("options.target_score", f"model {model.name!r} does not support {score}; it supports: {supported}")
    elif method in PRESETS and preset.score is not Score.LOGIT and score is not preset.score:
        wrong.add("options.target_score", f"{method} explains the {preset.score}")
    else:
        return score
    return preset.score


def _aggregation(options: pb.ExplainOptions, method: Method, preset: Preset, wrong: Violations) -> Aggregation:
    if options.aggregation == method_pb2.AGGREGATION_UNSPECIFIED:
        return preset.aggregation
    aggregation = AGGREGATION_FROM_PROTO.get(options.aggregation)
    if aggregation is None:
        wrong.add("options.aggregation", f"unknown aggregation {options.aggregation}")
    elif preset.all_layers and aggregation is not preset.aggregation:
        wrong.add("options.aggregation", f"{method} makes the {preset.aggregation} of its layers' maps")
    else:
        return aggregation
    return preset.aggregation


def _augment(options: pb.ExplainOptions, model: ServedModel, wire: TaskWire, wrong: Violations) -> bool:
    if options.smoothing.augmentation and not (model.capabilities.has_options and wire.mirrors):
        wrong.add("options.smoothing.augmentation", f"model {model.name!r} does not support it")
    return options.smoothing.augmentation


def _principal(options: pb.ExplainOptions, model: ServedModel, preset: Preset, wrong: Violations) -> bool:
    if options.smoothing.principal_component:
        if not model.capabilities.has_options:
            wrong.add("options.smoothing.principal_component", f"model {model.name!r} does not support it")
        elif not preset.method.traits.weights_activations:
            known = ", ".join(sorted(method for method in Method if method.traits.weights_activations))
            wrong.add(
                "options.smoothing.principal_component",
                f"{preset.method} does not weight activations; these methods do: {known}",
            )
    return options.smoothing.principal_component


def _metrics(options: pb.ExplainOptions, model: ServedModel, wire: TaskWire, wrong: Violations) -> tuple[Metric, ...]:
    if not options.HasField("faithfulness"):
        return ()
    if not (model.capabilities.has_options and wire.measures):
        wrong.add("options.faithfulness", f"model {model.name!r} does not support it")
        return ()
    field = "options.faithfulness.metrics"
    asked = options.faithfulness.metrics
    if len(asked) > len(Metric):
        # Not one violation each: their number would be the caller's to choose.
        wrong.add(field, f"at most {len(Metric)} metrics, each once; got {len(asked)}")
        return ()
    chosen: set[Metric] = set()
    for i, value in enumerate(asked):
        metric = METRIC_FROM_PROTO.get(value)
        if metric is None:
            wrong.add(f"{field}[{i}]", f"unknown metric {value}")
        elif metric in chosen:
            wrong.add(f"{field}[{i}]", f"duplicate metric {metric}")
        elif metric not in wire.measures:
            wrong.add(f"{field}[{i}]", f"{metric} is not defined for a model of {model.capabilities.task}")
        else:
            chosen.add(metric)
    return tuple(metric for metric in Metric if metric in (chosen or {Metric.DELETION, Metric.INSERTION}))
