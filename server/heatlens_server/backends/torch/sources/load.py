"""From a model's configuration to a loaded model."""

import torch
from torch import nn

from heatlens_server.backends.torch.sources.backbone_layers import discover_for_detection, discover_for_segmentation
from heatlens_server.backends.torch.sources.layers import Discovery, discover
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.sources.pixel_classes import find_threshold
from heatlens_server.backends.torch.sources.preprocessing import resolve_preprocess
from heatlens_server.backends.torch.sources.sources import load_source
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.config import ModelConfig
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
    module = source.module.to("cpu", torch.float32).eval().requires_grad_(False)
    resolved = resolve_preprocess(source.preprocess, config.preprocess, module=module)
    preprocess = resolved.spec
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
        assumptions=(*assumptions, *resolved.assumptions),
    )


def _discover(config: ModelConfig, task: Task, module: nn.Module, preprocess: PreprocessSpec) -> Discovery:
    grids = {layer: grid.grid for layer, grid in config.grids.items()}
    size, channels = preprocess.sample_px, preprocess.channels
    if task is Task.SEGMENTATION:
        return discover_for_segmentation(module, size, config.layers, grids=grids, channels=channels)
    if task is Task.DETECTION:
        if grids:
            raise ModelLoadError("grids: the layers of a detector return feature maps, or several by name")
        return discover_for_detection(module, size, config.layers, channels=channels)
    return discover(module, size, config.layers, grids=grids, scored=task is not Task.EMBEDDING, channels=channels)
