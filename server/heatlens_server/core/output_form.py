"""What the scores that a network returns are, judged by their values on a few images: logits, or probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Activation, OutputKind, Task

_ROUNDING = 1e-4
"""How far from 1 float32 may bring the sum of the probabilities of thousands of classes."""

Rows = npt.NDArray[Any]
"""What a network says about one image, (rows, C): one row of scores for it, or one for each of its pixels."""


@dataclass(frozen=True, slots=True)
class OutputForm:
    """What scores are that are no logits: of which kind, and by which activation."""

    kind: OutputKind
    activation: Activation


SOFTMAX = OutputForm(OutputKind.PROBABILITIES, Activation.SOFTMAX)
LOG_SOFTMAX = OutputForm(OutputKind.LOG_PROBABILITIES, Activation.SOFTMAX)
SIGMOIDS = OutputForm(OutputKind.PROBABILITIES, Activation.SIGMOID)


def probes(preprocess: PreprocessSpec) -> list[Float32Array]:
    """Images that differ in kind, as a network gets them, (H, W, C): noise, black, white, ramps, a chequerboard."""
    height_px, width_px = preprocess.sample_px
    shape = (height_px, width_px)
    down, across = np.meshgrid(np.linspace(0, 1, height_px), np.linspace(0, 1, width_px), indexing="ij")
    board = (np.floor(down * 8) + np.floor(across * 8)) % 2
    grays = (np.random.default_rng(0).random(shape), np.zeros(shape), np.ones(shape), down, across, board)
    gains, biases = np.array(preprocess.gains), np.array(preprocess.biases)
    return [(255.0 * gray[..., None] * gains + biases).astype(np.float32) for gray in grays]


def possible_forms(scores: Sequence[Rows]) -> set[OutputForm]:
    """What the scores of all images may be, beside logits."""
    return set.intersection(*(_possible(rows) for rows in scores))


def found_form(scores: Sequence[Rows], *, shows_sigmoid: bool) -> OutputForm | None:
    """What the scores of some images are; None for logits, which may well lie in [0, 1].

    Probabilities are what lies in [0, 1] and sums to 1 on every image, or what a sigmoid makes on each.
    Log-probabilities are what is never positive and whose exponentials sum to 1 on every image.

    Args:
        scores: of each image.
        shows_sigmoid: whether a sigmoid is known to make them.
    """
    possible = possible_forms(scores)
    if not shows_sigmoid:
        possible.discard(SIGMOIDS)
    return next((form for form in (SOFTMAX, LOG_SOFTMAX, SIGMOIDS) if form in possible), None)


def declared_form(kind: OutputKind, scores: Sequence[Rows]) -> OutputForm | None:
    """The same, if the configuration says the kind.

    Raises:
        ModelLoadError: they are not of it.
    """
    if kind is OutputKind.LOGITS:
        return None
    least, most = (0.0, 1.0) if kind is OutputKind.PROBABILITIES else (-np.inf, 0.0)
    for rows in scores:
        if not ((rows >= least) & (rows <= most)).all():
            raise ModelLoadError(
                f"outputs: the network returns values from {float(rows.min()):g} to {float(rows.max()):g}, "
                f'which are no {kind}: set "{OutputKind.LOGITS}"'
            )
    softmax = OutputForm(kind, Activation.SOFTMAX)
    return softmax if softmax in possible_forms(scores) else OutputForm(kind, Activation.SIGMOID)


def task_of_form(form: OutputForm, *, is_open: bool) -> Task:
    """The task of a network whose probabilities are another function of logits than its task's.

    Args:
        form: of its scores.
        is_open: whether nobody has said its task.

    Raises:
        ModelLoadError: the configuration says the task.
    """
    fitting = Task.CLASSIFICATION if form.activation is Activation.SOFTMAX else Task.MULTI_LABEL
    if is_open:
        return fitting
    raise ModelLoadError(
        f'task: the network returns {form.kind} by {form.activation}, which are those of "{fitting}": set that, or '
        f'outputs = "{OutputKind.LOGITS}" if they are none'
    )


def about_form(form: OutputForm) -> str:
    """What is to be said of a form that was found."""
    return (
        f"The network returns {form.kind}, and maps explain its logits; set outputs = "
        f'"{OutputKind.LOGITS}" if what it returns are logits.'
    )


def about_unseen(form: OutputForm) -> str:
    """What is to be said where logits are computed of what a network returns."""
    return (
        f"The function that makes the network's {form.kind} cannot be seen: logits are computed from them, and "
        "maps are flat where float32 rounds a probability to 0 or 1; let the network return its logits."
    )


def about_range(count: int) -> str:
    """What is to be said of logits that might be probabilities on all of some images."""
    return (
        f"The network's outputs lie in [0, 1] on {count} images, but it shows no sigmoid: they are taken "
        'as logits; set outputs = "probabilities" if they are probabilities.'
    )


def about_task(form: OutputForm, task: Task) -> str:
    """What is to be said where a form makes the task."""
    return f'Its {form.activation} makes the task "{task}"; set task if it is another.'


def _possible(rows: Rows) -> set[OutputForm]:
    found: set[OutputForm] = set()
    if ((rows >= 0) & (rows <= 1)).all():
        found.add(SIGMOIDS)
        if _is_one(rows):
            found.add(SOFTMAX)
    elif (rows <= 0).all() and _is_one(np.exp(rows.astype(np.float64))):
        found.add(LOG_SOFTMAX)
    return found


def _is_one(rows: Rows) -> bool:
    return rows.shape[1] > 1 and bool((np.abs(rows.astype(np.float64).sum(1) - 1.0) <= _ROUNDING).all())
