"""What queries ask of models of each task: one check per task. What is known about a task is in `core.tasks`."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from heatlens_server.api.checks import Limits, Violations, check_image, quoted
from heatlens_server.api.query import Options
from heatlens_server.api.reference_image import ReferenceImage
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import (
    ClassIds,
    ClassTarget,
    Detections,
    Direction,
    Pixels,
    Similarity,
    Target,
    TopK,
    Values,
)
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.imaging.mask import fit_mask, mask_from_tensor, vector_from_tensor

_DEFAULT_MIN_SCORE = 0.5

# A caller's text is compared with every label.
_COMPARED_CHARACTERS = 80

_NO_REFERENCE = Similarity(np.ones(1, np.float32))
"""Stands for the reference until it is known."""

_OPTIONS_OF_TASKS = tuple((name, task) for task in Task for name in sorted(task.traits.options))
"""The options that belong to one task, with that task."""

FinishTarget = Callable[[FittedImage], Target]
"""Makes the engine's target once the image is decoded. May raise InvalidArgument."""


_CheckTarget = Callable[[Options, ServedModel, Limits, Violations], tuple[Target, FinishTarget | None]]


def check_target(
    options: Options, model: ServedModel, limits: Limits, wrong: Violations
) -> tuple[Target, FinishTarget | None]:
    """Check what is wanted, and that no option of another task is given.

    Returns:
        The target as far as it is known before the image is decoded; and what makes the engine's target then, or None
        if the first is that. They may be used if nothing was found wrong.
    """
    task = model.capabilities.task
    for name, owner in _OPTIONS_OF_TASKS:
        value = getattr(options, name)
        if owner is not task and value is not None and value is not False:
            wrong.add(name, f"is for models of {owner}, and this one is of {task}")
    return _CHECKS[task](options, model, limits, wrong)


def _classification(
    options: Options, model: ServedModel, limits: Limits, wrong: Violations
) -> tuple[Target, FinishTarget | None]:
    """The classes; the most probable one if none is named."""
    return _classes(options, model, limits, wrong, default=TopK(1)), None


def _segmentation(
    options: Options, model: ServedModel, limits: Limits, wrong: Violations
) -> tuple[Target, FinishTarget | None]:
    """The classes; the one of most pixels if none is named. Over the pixels predicted as them, or over a mask."""
    classes = _classes(options, model, limits, wrong, default=TopK(1))
    if options.mask is None:
        return Pixels(classes), None
    sent = options.mask
    try:
        mask = mask_from_tensor(
            data_type=sent.data_type, shape=sent.shape, data=sent.data, max_pixels=limits.max_image_pixels
        )
    except InvalidArgument as error:
        wrong.add_error(error)
        return Pixels(classes), None
    return Pixels(classes), lambda image: Pixels(classes, fit_mask(mask, image))


def _detection(
    options: Options, model: ServedModel, limits: Limits, wrong: Violations
) -> tuple[Target, FinishTarget | None]:
    """The boxes above a score: the `top_k` best ones, or those of the classes named; all if neither is given."""
    min_score = _DEFAULT_MIN_SCORE if options.min_score is None else options.min_score
    if not 0 <= min_score <= 1:
        wrong.add("min_score", f"must be in [0, 1]; got {min_score:g}")
    # top_k counts boxes, and a class may have many.
    most = limits.max_targets
    chosen = _classes(options, model, limits, wrong, default=TopK(most), largest_k=most)
    if isinstance(chosen, ClassIds):
        return Detections(min_score, most, chosen.ids), None
    return Detections(min_score, max(1, chosen.k)), None


def _embedding(
    options: Options, model: ServedModel, limits: Limits, wrong: Violations
) -> tuple[Target, FinishTarget | None]:
    """The similarity to the reference embedding, or to the reference image's."""
    for name in ("top_k", "class_ids"):
        if getattr(options, name) is not None:
            wrong.add(name, "an embedding model has no classes: it explains the similarity to a reference")
    if options.reference_embedding is not None:
        sent = options.reference_embedding
        try:
            length = model.capabilities.class_count
            vector = vector_from_tensor(data_type=sent.data_type, shape=sent.shape, data=sent.data, length=length)
        except InvalidArgument as error:
            wrong.add_error(error)
            return _NO_REFERENCE, None
        return Similarity(vector), None
    if options.reference_image is None:
        wrong.add(
            "reference_embedding",
            "required: an embedding model explains the similarity to a reference, an embedding or an image",
        )
        return _NO_REFERENCE, None
    image = check_image(options.reference_image, model.preprocess, limits, wrong, field="reference_image")
    return _NO_REFERENCE, ReferenceImage(image, model.preprocess, limits)


def _regression(
    options: Options, model: ServedModel, limits: Limits, wrong: Violations
) -> tuple[Target, FinishTarget | None]:
    """The values of the outputs named, of the first one if none is; what makes them larger unless the other is said."""
    if options.top_k is not None:
        wrong.add("top_k", "values have no order: name outputs by class_ids")
    direction = Direction.INCREASE if options.direction is None else options.direction
    if not isinstance(direction, Direction):
        wrong.add("direction", f"unknown direction {direction}")
        direction = Direction.INCREASE
    chosen = _classes(options, model, limits, wrong, default=ClassIds((0,)))
    return Values(chosen.ids if isinstance(chosen, ClassIds) else (0,), direction), None


def _classes(
    options: Options,
    model: ServedModel,
    limits: Limits,
    wrong: Violations,
    *,
    default: ClassTarget,
    largest_k: int | None = None,
) -> ClassTarget:
    """The classes that a query names.

    Args:
        options: of the query.
        model: that is asked.
        limits: in force.
        wrong: takes what is wrong.
        default: what is wanted if the query names nothing.
        largest_k: the largest `top_k`; None: the model's classes and `max_targets` bound it.
    """
    class_count = model.class_count
    if options.top_k is not None:
        largest = min(class_count, limits.max_targets) if largest_k is None else largest_k
        if not 1 <= options.top_k <= largest:
            wrong.add("top_k", f"must be in [1, {largest}]; got {options.top_k}")
        return TopK(options.top_k)
    labels = options.class_labels
    if options.class_ids is None:
        return default
    ids = options.class_ids.ids
    if (count := len(ids) + len(labels)) > limits.max_targets:
        # Not one violation each: their number would be the caller's to choose.
        wrong.add("class_ids.ids", f"at most {limits.max_targets} classes in one request; got {count}")
        return default
    _check_class_ids(ids, class_count, wrong, required=not labels)
    return ClassIds((*ids, *_ids_of_labels(labels, ids, model, wrong)))


def _check_class_ids(ids: Sequence[int], class_count: int, wrong: Violations, *, required: bool) -> None:
    field = "class_ids.ids"
    if required and not ids:
        wrong.add(field, "must name at least one class")
    for i, class_id in enumerate(ids):
        if class_id < 0 or (class_count and class_id >= class_count):
            known = f"in [0, {class_count})" if class_count else "0 or more"
            wrong.add(f"{field}[{i}]", f"class id {class_id} is not {known}")
        elif class_id in ids[:i]:
            wrong.add(f"{field}[{i}]", f"duplicate class id {class_id}")


def _ids_of_labels(labels: Sequence[str], ids: Sequence[int], model: ServedModel, wrong: Violations) -> list[int]:
    """The classes that labels stand for; 0 for those that are wrong."""
    found: list[int] = []
    for i, label in enumerate(labels):
        field = f"class_labels[{i}]"
        count = model.labels.count(label)
        if not model.labels:
            wrong.add(field, f"model {model.name!r} has no labels: name classes by id")
        elif not count:
            near = difflib.get_close_matches(label[:_COMPARED_CHARACTERS], model.labels, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            wrong.add(field, f"model {model.name!r} has no label {quoted(label)}{hint}")
        elif count > 1:
            wrong.add(field, f"{count} classes have the label {quoted(label)}: name the class by id")
        elif (class_id := model.labels.index(label)) in (*ids, *found):
            wrong.add(field, f"duplicate class {quoted(label)}")
        else:
            found.append(class_id)
            continue
        found.append(0)
    return found


_CHECKS: Mapping[Task, _CheckTarget] = MappingProxyType(
    {
        Task.CLASSIFICATION: _classification,
        Task.MULTI_LABEL: _classification,
        Task.BINARY: _classification,
        Task.REGRESSION: _regression,
        Task.SEGMENTATION: _segmentation,
        Task.DETECTION: _detection,
        Task.EMBEDDING: _embedding,
    }
)
