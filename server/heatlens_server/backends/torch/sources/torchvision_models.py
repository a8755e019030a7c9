"""torchvision's networks: classifiers, segmentation and detection, told apart by where their builders live."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torchvision
from torch import nn

from heatlens_server.backends.torch.sources.checkpoints import Checkpoint
from heatlens_server.backends.torch.sources.source import (
    DETECTION_PREPROCESS,
    MAX_SIDE_PX,
    SourcedModel,
    as_module,
    did_you_mean,
    downloading,
    is_file,
    triple,
)
from heatlens_server.backends.torch.sources.weights import build_with_weights
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.core.tasks import Task

_MODULES: Mapping[Task, Any] = MappingProxyType(
    {
        Task.CLASSIFICATION: torchvision.models,
        Task.SEGMENTATION: torchvision.models.segmentation,
        Task.DETECTION: torchvision.models.detection,
    }
)

# The two networks with training-only heads. Their official weights expect another normalisation, done inside the
# network (transform_input), for every user.
_WITH_AUXILIARY_HEADS = frozenset({"googlenet", "inception_v3"})

# What a classifier may be trained for instead.
_OF_CLASSIFIERS = (Task.MULTI_LABEL, Task.BINARY, Task.REGRESSION)

# torchvision sets their batch norms' epsilon to 0 when it loads COCO_V1 (`overwrite_eps`).
_WITHOUT_EPSILON = frozenset(
    {"fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "retinanet_resnet50_fpn"}
)


def load_torchvision(name: str, weights: str, checkpoint: Checkpoint | None, task: Task | None) -> SourcedModel:
    """Build one of torchvision's networks.

    Args:
        name: as `torchvision.models.get_model` takes it.
        weights: "default", "none", a member of the network's weights enum, or a file.
        checkpoint: what is in that file.
        task: the configured one; None for the builder's.

    Raises:
        ModelLoadError: there is no such network or weights, it is of another task, or they cannot be had or do not
            fit.
    """
    own_task = _task_of(name)
    if task not in {None, own_task, *(_OF_CLASSIFIERS if own_task is Task.CLASSIFICATION else ())}:
        raise ModelLoadError(f"task: torchvision's {name} is for {own_task}, not for {task}")
    entry = _entry(name, weights)
    if weights == "none":
        module = _build(name, own_task, entry, weights, None)
    elif checkpoint is not None:
        module = build_with_weights(
            lambda class_count: _build(name, own_task, entry, weights, class_count),
            checkpoint,
            own_count=len(entry.meta["categories"]) if own_task is Task.DETECTION else None,
        )
        if name in _WITHOUT_EPSILON and Path(weights).name == _file_name(entry) and entry.name == "COCO_V1":
            for child in module.modules():
                if isinstance(child, nn.BatchNorm2d):
                    child.eps = 0.0
    else:
        with downloading(f"torchvision:{name}"):
            module = as_module(torchvision.models.get_model(name, weights=entry, progress=False))
        if own_task is Task.SEGMENTATION:
            # The head of a training loss: its scores are not used.
            module.register_module("aux_classifier", None)
    return SourcedModel(
        module=module,
        preprocess=_preprocess(entry, own_task),
        labels=tuple(entry.meta["categories"]),
        task=task or own_task,
    )


def _task_of(name: str) -> Task:
    for task, module in _MODULES.items():
        if name in torchvision.models.list_models(module=module):
            return task
    names = [known for module in _MODULES.values() for known in torchvision.models.list_models(module=module)]
    raise ModelLoadError(
        f"source: torchvision has no model {name!r} for classification, segmentation or detection"
        f"{did_you_mean(name, names)}"
    )


def _entry(name: str, weights: str) -> Any:  # noqa: ANN401 - torchvision's enums are untyped
    """The member of a network's weights enum that says how images become its input, and what its classes are."""
    members = torchvision.models.get_model_weights(name)
    if weights in {"default", "none"}:
        return members.DEFAULT
    if is_file(weights):
        # One of torchvision's own files, under its own name, brings the transform it was trained with.
        own = [member for member in members if _file_name(member) == Path(weights).name]
        return own[0] if own else members.DEFAULT
    if weights in members.__members__:
        return members[weights]
    raise ModelLoadError(f"torchvision's {name} has no weights {weights!r}, only {', '.join(members.__members__)}")


def _file_name(entry: Any) -> str:  # noqa: ANN401 - torchvision's enums are untyped
    return str(entry.url).rpartition("/")[2]


def _build(name: str, task: Task, entry: Any, weights: str, class_count: int | None) -> nn.Module:  # noqa: ANN401
    options: dict[str, object] = {} if class_count is None else {"num_classes": class_count}
    if task is not Task.CLASSIFICATION:
        # Or else the backbone's ImageNet weights would be downloaded.
        options["weights_backbone"] = None
    elif name in _WITH_AUXILIARY_HEADS:
        options |= {"aux_logits": False, "init_weights": False, "transform_input": weights != "none"}
    elif name.startswith("vit_"):
        # Position embeddings are of one size, which differs from weights to weights.
        options["image_size"] = entry.meta["min_size"][0]
    return as_module(torchvision.models.get_model(name, weights=None, **options))


def _preprocess(entry: Any, task: Task) -> PreprocessSpec:  # noqa: ANN401 - torchvision's enums are untyped
    preset = entry.transforms()
    if task is Task.DETECTION:
        return DETECTION_PREPROCESS
    any_size = task is Task.SEGMENTATION
    return PreprocessSpec(
        resize_px=int(preset.resize_size[0]),
        crop_px=None if any_size else (int(preset.crop_size[0]), int(preset.crop_size[0])),
        mean=triple(preset.mean),
        std=triple(preset.std),
        interpolation=Interpolation(preset.interpolation.value),
        max_side_px=MAX_SIDE_PX if any_size else None,
    )
