"""What a file returns, and the task that this makes."""

from dataclasses import dataclass

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.find import ImageInput, Scores, find_scores
from heatlens_server.backends.onnx.gradient.tape import Known
from heatlens_server.backends.onnx.source.pixels import find_pixels
from heatlens_server.config import ModelConfig, find_threshold
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.tasks import Activation, OutputKind, Task

_SIDES = 2
"""The classes of a network of one output."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a file returns.

    Attributes:
        scores: what is explained.
        task: what the network does.
        class_count: of classes, or of outputs.
        threshold: segmentation: as `core.engine.Capabilities.threshold`.
        assumptions: what was found or assumed, one sentence each, with the key that overrides it.
    """

    scores: Scores
    task: Task
    class_count: int
    threshold: float | None
    assumptions: tuple[str, ...]


def find_outputs(
    model: ir.Model,
    known: Known,
    image: ImageInput,
    config: ModelConfig,
    hint: Task | None,
) -> tuple[Outputs, Known]:
    """Find the scores of a file, of the image or of its pixels.

    Args:
        model: from `read_file`; what brings scores into the form that is explained is added to it.
        known: its shapes.
        image: its input.
        config: of the model.
        hint: the task that comes with the file; None if nothing tells.

    Returns:
        The outputs, and what is known then.

    Raises:
        ModelLoadError: there are no such scores, or it is not clear which; names the outputs, or the key.
    """
    output = config.output if isinstance(config.output, str) else ""
    if config.task == "segmentation":
        task = Task.SEGMENTATION
        scores, known, *told = find_pixels(model, known, image, output)
    else:
        try:
            scores = find_scores(model, known, output)
        except ModelLoadError as no_scores:
            if config.task != "auto":
                raise
            try:
                scores, known, *told = find_pixels(model, known, image, output)
            except ModelLoadError as no_pixels:
                raise no_scores from no_pixels
            task = Task.SEGMENTATION
            told.append(_about_pixels(scores))
        else:
            task, told = _task_of(config, scores, hint)
    kind = OutputKind.PROBABILITIES if scores.activation else OutputKind.LOGITS
    shown = Activation(scores.activation or Activation.SOFTMAX)
    threshold, about_threshold = find_threshold(config, task, scores.class_count, kind=kind, shown=shown)
    class_count = _SIDES if task is Task.BINARY else scores.class_count
    assumptions = (*filter(None, told), *about_threshold)
    return Outputs(scores, task, class_count, threshold, assumptions), known


def _about_pixels(scores: Scores) -> str:
    return (
        f"The file has no scores of images, and its output {scores.output.name!r} is taken as those of pixels: the "
        f'task is "{Task.SEGMENTATION}"; output names another output, and task another task.'
    )


def _task_of(config: ModelConfig, scores: Scores, hint: Task | None) -> tuple[Task, list[str]]:
    """What a network that scores images does, and what is to be said about it."""
    told: list[str] = []
    if scores.activation:
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
