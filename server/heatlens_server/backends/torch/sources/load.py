"""From a model's configuration to a loaded model."""

import torch
from torch import nn

from heatlens_server.backends.torch.sources.backbone_layers import discover_for_detection, discover_for_segmentation
from heatlens_server.backends.torch.sources.layers import Discovery, discover
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.sources.pixel_classes import find_threshold
from heatlens_server.backends.torch.sources.sources import IMAGENET_PREPROCESS, load_source
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.config import ModelConfig, PreprocessConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.labels import read_labels
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Task


def load_model(config: ModelConfig) -> LoadedModel:
    """Load a model on the CPU in fp32 and find out what can be explained about it. Runs it once.

    Labels come from the configured file, else from the source if it has as many as the model has classes.

    Raises:
        ModelLoadError: it cannot be loaded; the message names no path.
    """
    source = load_source(config)
    preprocess = resolve_preprocess(source.preprocess, config.preprocess)
    module = source.module.to("cpu", torch.float32).eval().requires_grad_(False)
    discovery = _discover(config, source.task, module, preprocess)
    threshold, assumptions = find_threshold(config, source.task, discovery.class_count)
    labels = source.labels if len(source.labels) == discovery.class_count else ()
    if config.labels is not None:
        labels = read_labels(config.labels, discovery.class_count)
    return LoadedModel(
        name=config.name,
        version=config.version or weights_version(module),
        module=module,
        preprocess=preprocess,
        labels=labels,
        class_count=discovery.class_count,
        layers=discovery.layers,
        task=source.task,
        grids=discovery.grids,
        threshold=threshold,
        assumptions=assumptions,
    )


def _discover(config: ModelConfig, task: Task, module: nn.Module, preprocess: PreprocessSpec) -> Discovery:
    grids = {layer: grid.grid for layer, grid in config.grids.items()}
    size = preprocess.sample_px
    if task is Task.SEGMENTATION:
        return discover_for_segmentation(module, size, config.layers, grids=grids)
    if task is Task.DETECTION:
        if grids:
            raise ModelLoadError("grids: the layers of a detector return feature maps, or several by name")
        return discover_for_detection(module, size, config.layers)
    return discover(module, size, config.layers, grids=grids, scored=task is not Task.EMBEDDING)


def resolve_preprocess(base: PreprocessSpec | None, changes: PreprocessConfig) -> PreprocessSpec:
    """Lay the configured values over the source's. With only crop_px set, resize_px keeps its ratio to it.

    Args:
        base: the source's own; None if it cannot be expressed, and then both sizes must be configured.
        changes: the configuration's.

    Raises:
        ModelLoadError: the result is impossible.
    """
    if base is None:
        if changes.resize_px is None or changes.crop_px is None or changes.mean is None or changes.std is None:
            raise ModelLoadError(
                "preprocess: this model's own preprocessing is not supported; set resize_px, crop_px, mean and std"
            )
        base = IMAGENET_PREPROCESS
    crop_px = base.crop_px
    if changes.crop_px is not None:
        crop_px = (changes.crop_px, changes.crop_px) if isinstance(changes.crop_px, int) else changes.crop_px
    resize_px = changes.resize_px
    if resize_px is None:
        resize_px = base.resize_px if crop_px is None else _scaled_resize(base, crop_px)
    max_side_px = changes.max_side_px
    if max_side_px is None and crop_px is None:
        max_side_px = base.max_side_px
    try:
        return PreprocessSpec(
            resize_px=resize_px,
            crop_px=crop_px,
            mean=changes.mean or base.mean,
            std=changes.std or base.std,
            interpolation=changes.interpolation or base.interpolation,
            max_side_px=max_side_px,
        )
    except ValueError as error:
        raise ModelLoadError(f"preprocess: {error}") from error


def _scaled_resize(base: PreprocessSpec, crop_px: tuple[int, int]) -> int | tuple[int, int]:
    if base.crop_px is None or base.resize_px is None:
        return max(crop_px)
    if isinstance(base.resize_px, int):
        return round(base.resize_px * max(crop_px) / max(base.crop_px))
    return (
        round(base.resize_px[0] * crop_px[0] / base.crop_px[0]),
        round(base.resize_px[1] * crop_px[1] / base.crop_px[1]),
    )
