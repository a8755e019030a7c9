"""What a task tells the gRPC edge: what a request may ask for, and what is answered. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.limits import Limits
from heatlens_server.api.violations import Violations
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Metric
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import ClassIds, ClassTarget, Target, TopK
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.served_model import ServedModel

_OF_TASKS = {
    "mask": Task.SEGMENTATION,
    "return_mask": Task.SEGMENTATION,
    "reference_embedding": Task.EMBEDDING,
    "reference_image": Task.EMBEDDING,
    "min_score": Task.DETECTION,
}
"""Options that belong to one task."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for.

    Attributes:
        target: as far as it is known before the image is decoded.
        complete: makes the engine's target once it is; may raise InvalidArgument. None if `target` is that.
    """

    target: Target
    complete: Callable[[FittedImage], Target] | None = None


class TaskWire(Protocol):
    """How requests to and answers of models of one task look."""

    @property
    def predicts(self) -> bool:
        """Whether the image as a whole has predicted classes."""
        ...

    @property
    def mirrors(self) -> bool:
        """Whether maps can be averaged over mirror images; as `goals.base.TaskModel.mirrors`."""
        ...

    @property
    def measures(self) -> frozenset[Metric]:
        """The measures of faithfulness that are defined."""
        ...

    @property
    def recurs(self) -> bool:
        """Whether a class id tells which explanation of the next frame is of the same thing. It does not for boxes."""
        ...

    def wanted(self, options: pb.ExplainOptions, model: ServedModel, limits: Limits, wrong: Violations) -> Wanted:
        """Check what is asked for. The answer may be used if nothing was added to `wrong`."""
        ...

    def findings(self, result: ImageResult) -> Sequence[Finding]:
        """What is said about each explanation."""
        ...

    def probabilities(self, result: ImageResult) -> Float32Array:
        """The probability of every class for the image as a whole; empty unless it `predicts`."""
        ...


def refuse_others(options: pb.ExplainOptions, task: Task, wrong: Violations) -> None:
    """Add the options that only other tasks have."""
    for name, owner in _OF_TASKS.items():
        given = options.return_mask if name == "return_mask" else options.HasField(name)
        if given and owner is not task:
            wrong.add(f"options.{name}", f"is for models of {owner}, and this one is of {task}")


def class_target(
    options: pb.ExplainOptions,
    *,
    class_count: int,
    max_targets: int,
    wrong: Violations,
    default: ClassTarget,
    largest_k: int | None = None,
) -> ClassTarget:
    """The classes that a request names.

    Args:
        options: of the request.
        class_count: of the model.
        max_targets: the most classes in one request.
        wrong: takes what is wrong.
        default: what is wanted if the request names nothing.
        largest_k: the largest `top_k`; None: the model's classes and `max_targets` bound it.
    """
    kind = options.WhichOneof("target")
    if kind == "top_k":
        largest = min(class_count, max_targets) if largest_k is None else largest_k
        if not 1 <= options.top_k <= largest:
            wrong.add("options.top_k", f"must be in [1, {largest}]; got {options.top_k}")
        return TopK(options.top_k)
    if kind == "class_ids":
        ids = tuple(options.class_ids.values)
        _check_class_ids(ids, class_count, max_targets, wrong)
        return ClassIds(ids)
    return default


def _check_class_ids(ids: Sequence[int], class_count: int, max_targets: int, wrong: Violations) -> None:
    field = "options.class_ids.values"
    if not ids:
        wrong.add(field, "must name at least one class")
    if len(ids) > max_targets:
        # Not one violation each: their number would be the caller's to choose.
        wrong.add(field, f"at most {max_targets} classes in one request; got {len(ids)}")
        return
    for i, class_id in enumerate(ids):
        if not 0 <= class_id < class_count:
            wrong.add(f"{field}[{i}]", f"class id {class_id} is not in [0, {class_count})")
        elif class_id in ids[:i]:
            wrong.add(f"{field}[{i}]", f"duplicate class id {class_id}")
