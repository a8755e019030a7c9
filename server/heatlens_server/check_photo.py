"""What a model says about a photo and about its mirror image, and what looks wrong about that."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from heatlens import Heatmap, PixelBox
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.fleet.built_model import BuiltModel
from heatlens_server.fleet.warm_up import run_trial
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.preprocess import fit_source

_MAX_PIXELS = 89_478_485

_LEAST_MAP_CORRELATION = 0.3
"""Maps of a photo and of its mirror image, mirrored back, correlate more than that where they show the same thing."""

_LEAST_TIMES_CHANCE = 2.0
"""A network that knows what it sees gives its class more than so many times the probability of a guess."""

_LEAST_CHANGE = 1e-4
"""A photo and a black image change logits by more than this share of the largest."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sight:
    """One image as a model explains it by its default method.

    Attributes:
        image: what the model saw.
        result: what it said; its first explanation counts. Without one, nothing was found to explain.
    """

    image: FittedImage
    result: ImageResult

    @property
    def found(self) -> bool:
        """Whether there is an explanation."""
        return bool(self.result.class_ids)

    @property
    def map_values(self) -> Float32Array:
        """The first map, (h, w) in [0, 1]."""
        values: Float32Array = self.result.maps[0]
        return values

    @property
    def is_flat(self) -> bool:
        """Whether nothing speaks for what is explained."""
        return not self.result.scales[0]


def explain_photo(model: BuiltModel, photo: Path, overlay: Path) -> Iterator[str]:
    """Explain a photo and its mirror image, and draw the photo's map over it.

    Args:
        model: its engine takes images of the photo's size.
        photo: an image file.
        overlay: where the picture is written; its suffix says its type.

    Yields:
        One line of report each; those that begin with "warning" are about what looks wrong.

    Raises:
        OSError: the photo cannot be read, or the picture not written.
        InvalidArgument: the photo cannot be decoded, or its values or channels are not for the model.
        ModelLoadError: the model cannot be run.
    """
    preprocess = model.preprocess
    source = decode_image(photo.read_bytes(), max_pixels=_MAX_PIXELS, channels=preprocess.channels, field=photo.name)
    seen = _sight(model, fit_source(source, preprocess))
    yield from (f"warning: {warning}" for warning in seen.image.warnings)
    if not seen.found:
        yield f"{photo.name}: the model finds nothing to explain"
        return
    other = dataclasses.replace(source, values=np.ascontiguousarray(source.values[:, ::-1]))
    mirrored = _sight(model, fit_source(other, preprocess))
    black = _sight(model, dataclasses.replace(seen.image, pixels=np.zeros_like(seen.image.pixels)))
    yield f"{photo.name}: {said(model, seen)}"
    yield f"maps of the layers, width x height: {', '.join(_map_sizes(model, seen.image))}"
    yield f"{photo.name} mirrored: {said(model, mirrored) if mirrored.found else 'nothing to explain'}"
    yield from (f"warning: {warning}" for warning in warnings_of(model.engine.info, seen, mirrored, black))
    _draw(seen, photo, overlay)
    yield f"the map over the photo: {overlay}"


def said(model: BuiltModel, sight: Sight) -> str:
    """A model's answer in words: the class, how sure the model is of it, and the size of the map."""
    result, class_id = sight.result, sight.result.class_ids[0]
    label = f" ({model.labels[class_id]})" if model.labels else ""
    if result.findings is not None:
        finding = result.findings[0]
        sure = f", {finding.probability:.1%}" if finding.value is None else f", value {finding.value:.6g}"
    else:
        probabilities = model.engine.info.task.traits.class_probabilities(result.logits)
        sure = f", {probabilities[class_id]:.1%}" if len(probabilities) else f", {result.logits[class_id]:.4g}"
    height_px, width_px = sight.map_values.shape
    return f"class {class_id}{label}{sure}, map of {width_px}x{height_px}{', flat' if sight.is_flat else ''}"


def warnings_of(info: Capabilities, seen: Sight, mirrored: Sight, black: Sight) -> Iterator[str]:
    """What looks wrong about a model's answers to a photo, its mirror image and a black image of the same size."""
    if seen.is_flat:
        yield "the map is flat: nothing in the photo speaks for the class"
    logits, other = seen.result.logits, black.result.logits
    if logits.size and np.abs(logits - other).max() <= _LEAST_CHANGE * np.abs(logits).max():
        yield "the scores are those of a black image: does the network see the photo? look at [models.preprocess]"
    probabilities = info.task.traits.class_probabilities(logits)
    if len(probabilities) > _LEAST_TIMES_CHANCE and probabilities.max() < _LEAST_TIMES_CHANCE / len(probabilities):
        yield (
            f"no class has more than {probabilities.max():.2%}, little more than chance: are the weights and "
            "[models.preprocess] those of the training?"
        )
    if not mirrored.found or not info.task.traits.can_flip:
        return
    if mirrored.result.class_ids[0] != seen.result.class_ids[0]:
        yield "the mirror image is taken for another class: the maps are not of one thing"
    elif not (seen.is_flat or mirrored.is_flat):
        correlation = _correlation(seen.map_values, mirrored.map_values[:, ::-1])
        if correlation < _LEAST_MAP_CORRELATION:
            yield f"the mirror image's map, mirrored back, hardly is the photo's (correlation {correlation:.2f})"


def _map_sizes(model: BuiltModel, image: FittedImage) -> Iterator[str]:
    """Every layer that the method of `_sight` explains, with the size of its map."""
    method = _method_of_one_run(model)
    layers = model.engine.info.layers_of(method.as_preset.method)
    for layer in layers[:1] if method is Method.CAM else layers:
        (result,) = run_trial(model.engine, image.pixels[None], method, layer=layer)
        yield f"{layer} {result.maps.shape[2]}x{result.maps.shape[1]}"


def _sight(model: BuiltModel, image: FittedImage) -> Sight:
    (result,) = run_trial(model.engine, image.pixels[None], _method_of_one_run(model))
    return Sight(image, result)


def _method_of_one_run(model: BuiltModel) -> Method:
    """The default method, or, if that takes many runs, the first that takes one and explains every layer."""
    others = (method for method in model.engine.info.requestable_methods if method is not Method.CAM)
    return next(method for method in (model.method, *others) if not method.as_preset.method.traits.in_steps)


def _draw(sight: Sight, photo: Path, overlay: Path) -> None:
    """Write the map over the photo, as the SDK draws it."""
    image, result = sight.image, sight.result
    heatmap = Heatmap(
        values=sight.map_values,
        scale=float(result.scales[0]),
        offset=float(result.offsets[0]),
        region=PixelBox(*dataclasses.astuple(image.region)),
        placed=False,
        source_size=(image.source_width_px, image.source_height_px),
    )
    overlay.parent.mkdir(parents=True, exist_ok=True)
    heatmap.save(overlay, photo)


def _correlation(one: Float32Array, other: Float32Array) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1]) if one.size > 1 and one.std() and other.std() else 1.0
