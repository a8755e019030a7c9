"""Where networks come from: torchvision, timm, a Python factory, or the package with the embedded weights."""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from heatlens_server.backends.torch.sources.checkpoints import Checkpoint, read_checkpoint
from heatlens_server.backends.torch.sources.headless import task_of
from heatlens_server.backends.torch.sources.own_generator import OwnGenerator
from heatlens_server.backends.torch.sources.own_preprocessing import OwnPreprocess, own_preprocess
from heatlens_server.backends.torch.sources.python_factory import call_factory
from heatlens_server.backends.torch.sources.source import DETECTION_PREPROCESS, MAX_SIDE_PX, SourcedModel, is_file
from heatlens_server.backends.torch.sources.weights import load_weights
from heatlens_server.config import IMAGENET_PREPROCESS, ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.extras import importing
from heatlens_server.core.tasks import Task

# For Python factories.
_SEGMENTATION_PREPROCESS = dataclasses.replace(
    IMAGENET_PREPROCESS, resize_px=None, crop_px=None, max_side_px=MAX_SIDE_PX
)

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
    task = None if config.task == "auto" else Task(config.task)
    checkpoint = read_checkpoint(Path(config.weights), config.weights_key) if is_file(config.weights) else None
    # Factories of the operator's draw from torch's generator, and may seed it: one at a time, each from the same state.
    with _drawing, torch.random.fork_rng(devices=[]):
        load = _loader(kind, config.source_folder)
        torch.manual_seed(0)
        # What is drawn must be the same at every start even if another model draws in its forward pass meanwhile.
        with OwnGenerator() if config.weights == "none" else contextlib.nullcontext():
            sourced = load(name, config.weights, checkpoint, task)
    if checkpoint is not None and checkpoint.assumption:
        sourced = dataclasses.replace(sourced, assumptions=(*sourced.assumptions, checkpoint.assumption))
    return sourced


def _loader(kind: str, folder: Path | None) -> _Load:
    """What loads sources of a kind. timm and torchvision take seconds to import, and most servers need one or none."""
    if kind == "python":
        return functools.partial(_load_python, folder=folder)
    with importing:
        if kind == "torchvision":
            from heatlens_server.backends.torch.sources.torchvision_models import load_torchvision  # noqa: PLC0415

            return load_torchvision
        from heatlens_server.backends.torch.sources.timm_models import load_embedded, load_timm  # noqa: PLC0415

        return load_timm if kind == "timm" else load_embedded


def _load_python(
    name: str, weights: str, checkpoint: Checkpoint | None, task: Task | None, *, folder: Path | None
) -> SourcedModel:
    """Call the operator's factory. What the network does not tell about its input is ImageNet's, and said."""
    if weights != "default" and checkpoint is None:
        raise ModelLoadError(f'weights of a Python factory are "default" (as it makes them) or a file, not {weights!r}')
    module = call_factory(name, folder)
    if checkpoint is not None:
        load_weights(module, checkpoint)
    task, assumptions = task_of(module, task)
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
