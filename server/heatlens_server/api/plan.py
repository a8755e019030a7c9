"""From a query to what can be run, or to every field that is wrong with it."""

from dataclasses import dataclass, replace

from heatlens_server.api.checks import Limits, SourceImage, Violations, check_image, quoted
from heatlens_server.api.query import MapSize, MapType, Options, Query
from heatlens_server.api.reference_image import ReferenceImage
from heatlens_server.api.tasks import FinishTarget, check_target
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import PRESETS, Aggregation, Method, Metric, Preset, Score, name_of
from heatlens_server.core.targets import Detections, Target
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.maps.steps.runs import model_runs


@dataclass(frozen=True, slots=True)
class Plan:
    """How images are to be explained: options that are known to be valid.

    Attributes:
        target: what is wanted.
        spec: how the engine makes the maps.
        place_on_source: True if maps are to be placed on the source image.
        map_type: the element type of the maps in the answer.
        top_predictions: how many classes to list.
        masks_overlap: segmentation: whether there is a predicted mask per map, and not one of all classes.
        finish_target: makes the target that the engine gets, once an image is decoded; None if `target` is that.
        reference: the image that it decodes for that, if any.
        warnings: what the caller asked for that changes nothing.
        images: how many images share the message of the answer.
    """

    target: Target
    spec: MapSpec
    place_on_source: bool = False
    map_type: MapType = MapType.FLOAT32
    top_predictions: int = 0
    masks_overlap: bool = False
    finish_target: FinishTarget | None = None
    reference: ReferenceImage | None = None
    warnings: tuple[str, ...] = ()
    images: int = 1

    @property
    def method(self) -> Method:
        """How the maps are made, by the name that requests have for it."""
        return name_of(self.spec.method, self.spec.score)

    @property
    def target_count(self) -> int:
        """How many maps the answer holds at most."""
        return self.target.count

    @property
    def counts_boxes(self) -> bool:
        """Whether only the model can say how many maps there are: one per box that it finds."""
        return isinstance(self.target, Detections)


def plan_query(query: Query, model: ServedModel, limits: Limits) -> tuple[Plan, SourceImage]:
    """Check every field of a query against the model and the limits.

    Returns:
        How to explain, and the image.

    Raises:
        InvalidArgument: with every wrong field.
    """
    wrong = Violations()
    plan = plan_options(query.options, model, limits, wrong)
    image = check_image(query.image, model.preprocess, limits, wrong)
    wrong.raise_if_any()
    return replace(plan, images=query.images), image


def plan_options(options: Options, model: ServedModel, limits: Limits, wrong: Violations) -> Plan:
    """Check how to explain. The plan may be used if nothing was added to `wrong`."""
    method = _method(options, model, wrong)
    preset = method.as_preset
    layers = _layers(options, model, preset, wrong)
    target, finish_target = check_target(options, model, limits, wrong)
    map_size, map_type = options.map_size, options.map_type
    if not isinstance(map_size, MapSize):
        wrong.add("map_size", f"unknown map size {map_size}")
    if not isinstance(map_type, MapType):
        wrong.add("map_type", f"unknown data type {map_type}")
        map_type = MapType.FLOAT32
    _check_predictions(options, model, wrong)
    spec = MapSpec(
        method=preset.method,
        layers=layers,
        upsample=map_size in (MapSize.INPUT, MapSize.SOURCE),
        score=_score(options, model, method, preset, wrong),
        aggregation=_aggregation(options, method, preset, wrong),
        augment=_augment(options, model, wrong),
        principal=_principal(options, model, preset, wrong),
        metrics=_metrics(options, model, wrong),
        return_mask=options.return_mask,
        divisible=_is_divisible(preset, model),
    )
    _check_runs(options, spec, target.count, model, limits=limits, wrong=wrong)
    return Plan(
        target=target,
        spec=spec,
        place_on_source=map_size is MapSize.SOURCE,
        map_type=map_type,
        top_predictions=options.top_predictions,
        masks_overlap=model.capabilities.threshold is not None,
        finish_target=finish_target,
        reference=finish_target if isinstance(finish_target, ReferenceImage) else None,
        warnings=_warnings(options, preset),
    )


def _warnings(options: Options, preset: Preset) -> tuple[str, ...]:
    if not options.layers or preset.method.traits.looks_at_layers:
        return ()
    return (f"layers: {preset.method} looks at no layer, so that its map is the same without them",)


def _check_runs(
    options: Options, spec: MapSpec, count: int, model: ServedModel, *, limits: Limits, wrong: Violations
) -> None:
    """Refuse what would take too many runs of the model, at the option that costs most."""

    def runs(spec: MapSpec, count: int) -> int:
        return model_runs(spec, count, model.capabilities.layer_shapes)

    asked, most = runs(spec, count), limits.max_model_runs
    if asked <= most:
        return
    without = {
        "layers": (replace(spec, layers=spec.layers[:1]), count),
        "top_k" if options.class_ids is None else "class_ids.ids": (spec, 1),
        "augmentation": (replace(spec, augment=False), count),
        "metrics": (replace(spec, metrics=()), count),
    }
    field = min(without, key=lambda name: runs(*without[name]))
    if runs(replace(spec, layers=spec.layers[:1], augment=False, metrics=()), 1) > most:
        field = "method"
    wrong.add(field, f"the explanation would take {asked} runs of the model; at most {most} are made for one image")


def _is_divisible(preset: Preset, model: ServedModel) -> bool:
    """Whether the engine that runs it takes steps."""
    capabilities = model.capabilities
    in_second = preset.method in capabilities.fallback_methods or preset.score in capabilities.fallback_scores
    return capabilities.takes_steps or in_second


def _method(options: Options, model: ServedModel, wrong: Violations) -> Method:
    method = options.method
    if method is None:
        return model.default_method
    offered = model.capabilities.requestable_methods
    supported = ", ".join(offered)
    if not isinstance(method, Method):
        wrong.add("method", f"unknown method {method}; this model supports: {supported}")
    elif method not in offered:
        why = model.capabilities.why_not(method)
        wrong.add("method", f"model {model.name!r} does not support {method}{why}; it supports: {supported}")
    else:
        return method
    return model.default_method


def _layers(options: Options, model: ServedModel, preset: Preset, wrong: Violations) -> tuple[str, ...]:
    offered = model.capabilities.layers_of(preset.method)
    known = model.capabilities.layers
    if len(options.layers) > len(known):
        # Not one violation each: their number, and the time to compare them, would be the caller's to choose.
        wrong.add("layers", f"at most {len(known)} layers, each once; got {len(options.layers)}")
        return offered[:1]
    layers = options.layers or (offered if preset.all_layers else offered[:1])
    for i, layer in enumerate(layers):
        if layer in model.capabilities.multi_map_layers and layer not in offered:
            explained = ", ".join(offered) or "no layer"
            wrong.add(f"layers[{i}]", f"{quoted(layer)} is several maps at once: {preset.method} explains {explained}")
        elif layer not in known:
            wrong.add(f"layers[{i}]", f"unknown layer {quoted(layer)}; this model offers: {', '.join(offered)}")
        elif layer not in offered and preset.method is not Method.CAM:
            wrong.add(
                f"layers[{i}]", f"this model has no {preset.method} by {quoted(layer)}, only by {', '.join(offered)}"
            )
        elif layer in layers[:i]:
            wrong.add(f"layers[{i}]", f"duplicate layer {quoted(layer)}")
    if preset.method is Method.CAM and layers != offered[:1]:
        wrong.add("layers", f"{Method.CAM} explains the model's default layer only: {offered[0]}")
    return layers


def _check_predictions(options: Options, model: ServedModel, wrong: Violations) -> None:
    count, class_count = options.top_predictions, model.capabilities.class_count
    task = model.capabilities.task
    if count and not (task.traits.has_image_classes or task.traits.has_values):
        wrong.add("top_predictions", f"a model of {task} predicts no classes for the whole image")
    elif not 0 <= count <= class_count:
        wrong.add("top_predictions", f"must be in [0, {class_count}], the model's class count; got {count}")


def _score(options: Options, model: ServedModel, method: Method, preset: Preset, wrong: Violations) -> Score:
    score, offered = options.target_score, model.capabilities.scores
    if score is None:
        # An export may have another score than the logit; it has that one only.
        return offered[0] if len(offered) == 1 and method not in PRESETS else preset.score
    if not isinstance(score, Score):
        wrong.add("target_score", f"unknown target score {score}")
    elif score not in offered:
        wrong.add("target_score", f"model {model.name!r} does not support {score}; it supports: {', '.join(offered)}")
    elif method in PRESETS and preset.score is not Score.LOGIT and score is not preset.score:
        wrong.add("target_score", f"{method} explains the {preset.score}")
    else:
        return score
    return preset.score


def _aggregation(options: Options, method: Method, preset: Preset, wrong: Violations) -> Aggregation:
    aggregation = options.aggregation
    if aggregation is None:
        return preset.aggregation
    if not isinstance(aggregation, Aggregation):
        wrong.add("aggregation", f"unknown aggregation {aggregation}")
    elif preset.all_layers and aggregation is not preset.aggregation:
        wrong.add("aggregation", f"{method} makes the {preset.aggregation} of its layers' maps")
    else:
        return aggregation
    return preset.aggregation


def _augment(options: Options, model: ServedModel, wrong: Violations) -> bool:
    if options.augmentation and not (model.capabilities.has_options and model.capabilities.task.traits.can_flip):
        wrong.add("augmentation", f"model {model.name!r} does not support it")
    return options.augmentation


def _principal(options: Options, model: ServedModel, preset: Preset, wrong: Violations) -> bool:
    if options.principal_component:
        if not model.capabilities.has_options:
            wrong.add("principal_component", f"model {model.name!r} does not support it")
        elif not preset.method.traits.weights_activations:
            known = ", ".join(sorted(method for method in Method if method.traits.weights_activations))
            wrong.add("principal_component", f"{preset.method} does not weight activations; these methods do: {known}")
    return options.principal_component


def _metrics(options: Options, model: ServedModel, wrong: Violations) -> tuple[Metric, ...]:
    if not options.faithfulness:
        return ()
    task = model.capabilities.task
    if not (model.capabilities.has_options and task.traits.metrics):
        wrong.add("faithfulness", f"model {model.name!r} does not support it")
        return ()
    if len(options.metrics) > len(Metric):
        # Not one violation each: their number would be the caller's to choose.
        wrong.add("metrics", f"at most {len(Metric)} metrics, each once; got {len(options.metrics)}")
        return ()
    chosen: set[Metric] = set()
    for i, metric in enumerate(options.metrics):
        if not isinstance(metric, Metric):
            wrong.add(f"metrics[{i}]", f"unknown metric {metric}")
        elif metric in chosen:
            wrong.add(f"metrics[{i}]", f"duplicate metric {metric}")
        elif metric not in task.traits.metrics:
            wrong.add(f"metrics[{i}]", f"{metric} is not defined for a model of {task}")
        else:
            chosen.add(metric)
    return tuple(metric for metric in Metric if metric in (chosen or task.traits.default_metrics))
