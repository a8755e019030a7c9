"""What a file returns, and the task that this makes."""

from contextlib import suppress
from dataclasses import dataclass

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.find import ImageInput, Scores, find_scores
from heatlens_server.backends.onnx.gradient.tape import BATCH, Known
from heatlens_server.backends.onnx.network import Detector
from heatlens_server.backends.onnx.source.added import Added, NotReturned
from heatlens_server.backends.onnx.source.boxes import Suppression, find_boxes
from heatlens_server.backends.onnx.source.metadata import FileSettings
from heatlens_server.backends.onnx.source.pixels import find_pixels
from heatlens_server.backends.onnx.source.probabilities import as_logits
from heatlens_server.config import ModelConfig, find_threshold
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.labels import read_labels
from heatlens_server.core.output_form import OutputForm, task_of_form
from heatlens_server.core.tasks import Activation, OutputKind, Task

_SIDES = 2
"""The classes of a network of one output."""

_WITHOUT_CLASSES = frozenset({Task.REGRESSION, Task.EMBEDDING})


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a file returns.

    Attributes:
        scores: what is explained.
        task: what the network does.
        class_count: of classes, or of outputs.
        assumptions: what was found or assumed, one sentence each, with the key that overrides it.
        threshold: segmentation: as `core.engine.Capabilities.threshold`.
        boxes: detection: where, (N, A, 4).
        detector: detection: how boxes are read.
    """

    scores: Scores
    task: Task
    class_count: int
    assumptions: tuple[str, ...]
    threshold: float | None = None
    boxes: ir.Value | None = None
    detector: Detector | None = None


def find_outputs(
    model: ir.Model,
    known: Known,
    image: ImageInput,
    config: ModelConfig,
    *,
    settings: FileSettings,
    suppression: Suppression | None,
) -> tuple[Outputs, Known]:
    """Find the scores of a file: of the image, of its pixels or of boxes.

    Args:
        model: from `read_file`; what brings scores into the form that is explained is added to it.
        known: its shapes.
        image: its input.
        config: of the model.
        settings: that come with the file.
        suppression: what `boxes.cut_suppression` returned.

    Returns:
        The outputs, and what is known then.

    Raises:
        ModelLoadError: there are no such scores, or it is not clear which; names the outputs, or the key.
    """
    if isinstance(config.output, int):
        raise ModelLoadError("output: the outputs of a file have names, and no places")
    output = config.output or ""
    if config.task == "segmentation":
        return _of_pixels(model, known, image, config, output)
    is_told = config.task == "auto" and settings.task is Task.DETECTION
    if config.task == "detection" or config.detector != "auto" or suppression is not None or is_told:
        return _of_boxes(model, known, image, config, settings=settings, suppression=suppression)
    try:
        scores = find_scores(model, known, output)
    except ModelLoadError as error:
        if config.task == "auto":
            with suppress(NotReturned):
                return _of_boxes(model, known, image, config, settings=settings, suppression=suppression)
            with suppress(NotReturned):
                return _of_pixels(model, known, image, config, output)
        if (known_with_axis := _with_class_axis(model, known, output)) is not None:
            scores = find_scores(model, known_with_axis, output)
            return _of_image(model, known_with_axis, image, scores, config, settings=settings)
        if config.task != "auto":
            raise
        raise ModelLoadError(
            f'{error}; output = "NAME" says which to explain; of scores of pixels or boxes set task = "segmentation", '
            'or task = "detection" and detector = "yolov8", "yolov5", "detr" or "nms"'
        ) from error
    return _of_image(model, known, image, scores, config, settings=settings)


_KEPT_ON_AXIS = frozenset({"Identity", "Sigmoid"})


def _with_class_axis(model: ir.Model, known: Known, output: str) -> Known | None:
    """Give the one output that has a number for each image, (N,), an axis of its one class, (N, 1).

    Args:
        model: from `read_file`; the output is another value of the same name then.
        known: its shapes.
        output: its name; empty to find it.

    Returns:
        What is known then; None if there is no such output, or there are several.
    """
    found = [
        value
        for value in model.graph.outputs
        if output in {"", value.name}
        and known.shapes.get(value) == (BATCH,)
        and value.dtype is not None
        and value.dtype.is_floating_point()
    ]
    if len(found) != 1:
        return None
    (value,) = found
    # A sigmoid comes last again, where it is left behind.
    behind, at = [], value
    while (node := at.producer()) is not None and node.op_type in _KEPT_ON_AXIS and node.inputs[0] is not None:
        behind.append(node.op_type)
        at = node.inputs[0]
    added = Added(model, known)
    scores = added.op("Unsqueeze", [at, added.ints(1)], (BATCH, 1))
    for operator in reversed(behind):
        scores = added.op(operator, [scores], (BATCH, 1))
    name, value.name = value.name, f"{value.name}: one of each image"
    scores.name = name
    model.graph.outputs[model.graph.outputs.index(value)] = scores
    return added.finish()


def _of_image(
    model: ir.Model, known: Known, image: ImageInput, scores: Scores, config: ModelConfig, *, settings: FileSettings
) -> tuple[Outputs, Known]:
    kind = None if config.outputs == "auto" else OutputKind(config.outputs)
    about_output: tuple[str, ...] = ()
    form: OutputForm | None = None
    if config.task in _WITHOUT_CLASSES:
        if kind not in {None, OutputKind.LOGITS}:
            raise ModelLoadError(f"outputs: is for classifiers, and this model is for {config.task}")
    else:
        scores, known, form, about_output = as_logits(
            model, known, image, scores, preprocess=settings.preprocess, kind=kind
        )
    task, told = _task_of(config, scores, settings.task, form)
    _, about_threshold = _threshold(config, task, scores)
    class_count = _SIDES if task is Task.BINARY else scores.class_count
    return Outputs(scores, task, class_count, (*about_output, *told, *about_threshold)), known


def _of_pixels(
    model: ir.Model, known: Known, image: ImageInput, config: ModelConfig, output: str
) -> tuple[Outputs, Known]:
    scores, known, told = find_pixels(model, known, image, output)
    threshold, about_threshold = _threshold(config, Task.SEGMENTATION, scores)
    about_task = _about_pixels(scores) if config.task == "auto" else ""
    assumptions = (*filter(None, (told, about_task)), *about_threshold)
    return Outputs(scores, Task.SEGMENTATION, scores.class_count, assumptions, threshold=threshold), known


def _threshold(config: ModelConfig, task: Task, scores: Scores) -> tuple[float | None, tuple[str, ...]]:
    kind = OutputKind.PROBABILITIES if scores.activation else OutputKind.LOGITS
    shown = Activation(scores.activation or Activation.SOFTMAX)
    return find_threshold(config, task, scores.class_count, kind=kind, shown=shown)


def _of_boxes(
    model: ir.Model,
    known: Known,
    image: ImageInput,
    config: ModelConfig,
    *,
    settings: FileSettings,
    suppression: Suppression | None,
) -> tuple[Outputs, Known]:
    if config.labels is not None:
        name_count = len(read_labels(config.labels, 0))
    else:
        name_count = next((len(names) for _origin, names in settings.names), 0)
    is_told = config.task == "detection" or settings.task is Task.DETECTION
    found, known = find_boxes(
        model, known, image, config, suppression=suppression, name_count=name_count, is_told=is_told
    )
    if config.threshold is not None:
        raise ModelLoadError("threshold: is for segmentation; requests to a detector have min_score")
    about_task = () if config.task == "detection" else ('It makes the task "detection"; task overrides that.',)
    scores = found.scores
    outputs = Outputs(
        scores,
        Task.DETECTION,
        scores.class_count,
        (*found.told, *about_task),
        boxes=found.boxes,
        detector=found.detector,
    )
    return outputs, known


def _about_pixels(scores: Scores) -> str:
    return (
        f"The file has no scores of images, and its output {scores.output.name!r} is taken as those of pixels: the "
        f'task is "{Task.SEGMENTATION}"; output names another output, and task another task.'
    )


def _task_of(config: ModelConfig, scores: Scores, hint: Task | None, form: OutputForm | None) -> tuple[Task, list[str]]:
    """What a network that scores images does, and what is to be said about it.

    Raises:
        ModelLoadError: its probabilities are not those of the task that the configuration says.
    """
    told: list[str] = []
    if form is not None and config.task != "auto" and Task(config.task).traits.activation is not form.activation:
        return task_of_form(form, is_open=False), told
    if scores.activation and form is None:
        told.append(
            f"The file's output {scores.output.name!r} is the {scores.activation} of {scores.value.name!r}: maps "
            "explain that tensor's logits; output names another output."
        )
    if config.task != "auto":
        return Task(config.task), told
    if hint is not None and hint.traits.has_image_classes:
        told.append(f'What comes with the file makes the task "{hint}"; set task if it is another.')
        return hint, told
    if scores.class_count == 1:
        told.append(
            "The file has one output: it is taken as a binary classifier, whose class 1 has the sigmoid of "
            f'{scores.value.name!r}; set task = "regression" if the output is a value.'
        )
        return Task.BINARY, told
    if scores.activation == "sigmoid":
        told.append(f'Its sigmoid makes the task "{Task.MULTI_LABEL}"; set task if it is another.')
        return Task.MULTI_LABEL, told
    return Task.CLASSIFICATION, told
