"""What a network that scores images or pixels returns, found by running it; and what that says of its task."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.sources.output_reading import (
    OutputName,
    OutputReading,
    SeenActivations,
    part_of,
    parts_of,
    shaped,
)
from heatlens_server.backends.torch.sources.trace import call
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.output_form import (
    SIGMOIDS,
    OutputForm,
    Rows,
    about_form,
    about_range,
    about_task,
    about_unseen,
    declared_form,
    found_form,
    possible_forms,
    probes,
    task_of_form,
)
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Activation, OutputKind, Task

_CONVENTIONAL = ("logits", "out")
"""What transformers and torchvision call the scores, if a network returns more than them."""

_FEATURES = frozenset({"pooler_output", "image_embeds"})
"""What transformers' networks without a classifier call their embedding."""

_ROUNDING = 1e-4
"""How far what is seen to make probabilities may be off from them."""


@dataclass(frozen=True, slots=True)
class FoundOutput:
    """What a network returns.

    Attributes:
        reading: how it becomes scores.
        task: what the network does.
        assumptions: what was found or assumed, one sentence each, with the key that overrides it.
    """

    reading: OutputReading
    task: Task
    assumptions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Scores:
    """What the network says about one image.

    Attributes:
        rows: (1, C), as it returns them; of segmentation (pixels, C).
        activation: what was seen to make them; None if nothing was.
        before: of the same shape, what that was given.
    """

    rows: Tensor
    activation: Activation | None = None
    before: Tensor | None = None


def find_output(
    module: nn.Module,
    preprocess: PreprocessSpec,
    *,
    task: Task,
    is_task_open: bool,
    part: OutputName | None = None,
    kind: OutputKind | None = None,
) -> FoundOutput:
    """Run a network on a few images and find which part of what it returns are its scores, and what they are.

    What they are: see `core.output_form.found_form`.

    Args:
        module: in eval mode. Left as it was.
        preprocess: how images become its input.
        task: what the network does, as far as its source says; not detection.
        is_task_open: whether that is a guess: then one output makes a binary classifier, sigmoids a multi-label one.
        part: which part of what it returns holds the scores; None to find it.
        kind: what that holds; None to find it.

    Raises:
        ModelLoadError: the network fails, no part or several parts may be the scores, or they are not of the task. The
            message names the key to set.
    """
    notes: list[str] = []
    images = (torch.from_numpy(image.transpose(2, 0, 1)[None].copy()) for image in probes(preprocess))
    said = (_say(module, image) for image in images)
    output, seen = next(said)
    of_pixels = task is Task.SEGMENTATION
    if part is None:
        part, found = _find_part(output, of_pixels=of_pixels)
        notes += found
    if is_task_open and part in _FEATURES:
        task = Task.EMBEDDING
        notes.append(
            f'The network returns features as {part!r}: it is taken as task = "{task}"; set task if it is another.'
        )
    scores = [_scores(output, seen, part, of_pixels=of_pixels)]
    width = scores[0].rows.shape[1]
    if is_task_open and task is Task.CLASSIFICATION and width == 1:
        task = Task.BINARY
        notes.append(
            "The network has one output: it is taken as a binary classifier, whose class 1 has the output's sigmoid; "
            'set task = "regression" if the output is a value.'
        )
    _check_width(task, width)
    if not (task.traits.has_image_classes or of_pixels):
        if kind not in {None, OutputKind.LOGITS}:
            raise ModelLoadError(f"outputs: is for classifiers, and this model is for {task}")
        return FoundOutput(OutputReading(part), task, tuple(notes))
    for output, seen in said:
        # Most networks are known to return logits after one image.
        if kind is OutputKind.LOGITS or not possible_forms([_array(one.rows) for one in scores]):
            break
        scores.append(_scores(output, seen, part, of_pixels=of_pixels))
    rows = [_array(one.rows) for one in scores]
    shows_sigmoid = all(_shows(one, SIGMOIDS) for one in scores)
    form = found_form(rows, shows_sigmoid=shows_sigmoid) if kind is None else declared_form(kind, rows)
    if form is None:
        if kind is None and possible_forms(rows):
            notes.append(about_range(len(scores)))
        reading = OutputReading(part, two_sided=task is Task.BINARY, of_pixels=of_pixels)
        return FoundOutput(reading, task, tuple(notes))
    if kind is None:
        notes.append(about_form(form))
    if form.activation is not task.traits.activation and not of_pixels:
        task = task_of_form(form, is_open=is_task_open)
        notes.append(about_task(form, task))
    is_seen = all(_shows(one, form) for one in scores)
    if not is_seen:
        notes.append(about_unseen(form))
    reading = OutputReading(
        part, form.kind, form.activation, is_seen, two_sided=task is Task.BINARY, of_pixels=of_pixels
    )
    return FoundOutput(reading, task, tuple(notes))


def _say(module: nn.Module, image: Tensor) -> tuple[object, SeenActivations]:
    with SeenActivations() as seen:
        return call(module, image), seen


def _scores(output: object, seen: SeenActivations, part: OutputName | None, *, of_pixels: bool) -> _Scores:
    values = part_of(output, part)
    found = seen.before(values)
    rows = _rows(values, of_pixels=of_pixels)
    return _Scores(rows) if found is None else _Scores(rows, found[0], _rows(found[1], of_pixels=of_pixels))


def _rows(values: Tensor, *, of_pixels: bool) -> Tensor:
    """One row of scores for the image, or for each of its pixels."""
    scores = shaped(values, 1, of_pixels=of_pixels)
    return scores[0].flatten(1).T if of_pixels else scores


def _find_part(output: object, *, of_pixels: bool) -> tuple[OutputName | None, list[str]]:
    """Which part of what a network returned are its scores, and what is to be said about that."""
    if isinstance(output, Tensor):
        return None, []
    parts = dict(parts_of(output))
    fit = [part for part, values in parts.items() if _fits(values, of_pixels=of_pixels)]
    for name in _CONVENTIONAL:
        if name in fit:
            return name, []
    if len(fit) == 1:
        others = "" if len(parts) == 1 else f" of {len(parts)}"
        return fit[0], [f"The network's output {fit[0]!r}{others} is taken as its scores; set output to take another."]
    forms = ", ".join(f"{part!r} {tuple(values.shape)}" for part, values in parts.items()) or "no tensor"
    if fit:
        raise ModelLoadError(
            f"the network returns a {type(output).__name__} of {forms}: set output to the one that holds the scores, "
            f"such as output = {_toml(fit[0])}"
        )
    wanted = "(N, classes, h, w)" if of_pixels else "(N, classes)"
    raise ModelLoadError(
        f"the network must return logits of shape {wanted}, not a {type(output).__name__} of {forms}; task says "
        "what else it may be"
    )


def _fits(values: Tensor, *, of_pixels: bool) -> bool:
    try:
        shaped(values, 1, of_pixels=of_pixels)
    except ModelLoadError:
        return False
    return True


def _toml(part: OutputName) -> str:
    return f'"{part}"' if isinstance(part, str) else str(part)


def _check_width(task: Task, width: int) -> None:
    """Check that a network has as many outputs as its task takes."""
    if task is Task.BINARY and width != 1:
        raise ModelLoadError(
            f'task: a binary classifier has one output, and this network has {width}: set "classification", or '
            '"multi-label-classification" if classes do not exclude each other'
        )
    if task is Task.CLASSIFICATION and width == 1:
        raise ModelLoadError(
            'task: of one output the softmax is always 1: set "binary-classification", or "regression" if it is a value'
        )


def _array(values: Tensor) -> Rows:
    return values.detach().float().cpu().numpy()


def _shows(one: _Scores, form: OutputForm) -> bool:
    """Whether the scores were seen to be made by an activation of the classes' logits."""
    if one.before is None or one.activation is not form.activation:
        return False
    probabilities = one.before.softmax(1) if form.activation is Activation.SOFTMAX else one.before.sigmoid()
    made = probabilities if form.kind is OutputKind.PROBABILITIES else probabilities.log()
    return bool(torch.allclose(made, one.rows, atol=_ROUNDING))
