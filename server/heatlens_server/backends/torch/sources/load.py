"""From a model's configuration to a loaded model."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from heatlens_server.backends.torch.sources.backbone_layers import discover_for_detection, discover_for_segmentation
from heatlens_server.backends.torch.sources.layers import Discovery, discover
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.backends.torch.sources.outputs import FoundOutput, find_output
from heatlens_server.backends.torch.sources.preprocessing import resolve_preprocess
from heatlens_server.backends.torch.sources.source import SourcedModel
from heatlens_server.backends.torch.sources.sources import load_source
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.config import ModelConfig, find_threshold
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.labels import read_labels
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import OutputKind, Task


def load_model(config: ModelConfig) -> LoadedModel:
    """Load a model in fp32, on the CPU or where its factory put it, and find out what can be explained about it.

    What the network returns is found by running it on a few images; see `outputs.find_output`.
    Labels come from the configured file, else from the source if it has as many as the model has classes.

    Raises:
        ModelLoadError: it cannot be loaded; the message names no path.
    """
    source = load_source(config)
    module = _placed(source.module, config.devices[0]).eval().requires_grad_(False)
    with _inputs_moved(module):
        resolved = resolve_preprocess(
            source.preprocess,
            config.preprocess,
            module=module,
            task=source.task,
            guessed=source.guessed,
            told_by=source.told_by,
        )
        preprocess = resolved.spec
        found = _find_output(config, source, module, preprocess)
        discovery = _discover(config, found, module, preprocess)
    threshold, assumptions = find_threshold(
        config, found.task, discovery.class_count, kind=found.reading.kind, shown=found.reading.activation
    )
    class_count = 2 if found.reading.two_sided else discovery.class_count
    labels = source.labels if len(source.labels) == class_count else ()
    if config.labels is not None:
        labels = read_labels(config.labels, class_count)
    return LoadedModel(
        name=config.name,
        version=config.version or weights_version(module),
        module=module,
        preprocess=preprocess,
        labels=labels,
        class_count=class_count,
        layers=discovery.layers,
        task=found.task,
        grids=discovery.grids,
        reading=found.reading,
        threshold=threshold,
        assumptions=(
            *source.assumptions,
            *found.assumptions,
            *discovery.assumptions,
            *assumptions,
            *resolved.assumptions,
        ),
    )


def _placed(module: nn.Module, device: str) -> nn.Module:
    """A network in fp32 on the CPU; on a GPU if its factory put it there, as its code may need one.

    Args:
        module: the network.
        device: the configured one: on "cpu" nothing stays on a GPU.
    """
    own = next((one.device for one in chain(module.parameters(), module.buffers()) if one.is_cuda), None)
    return module.to(torch.device("cpu") if own is None or device == "cpu" else own, torch.float32)


@contextlib.contextmanager
def _inputs_moved(module: nn.Module) -> Iterator[None]:
    """Move what a network on a GPU is run on to that GPU."""
    device = next((one.device for one in module.parameters() if one.is_cuda), None)
    if device is None:
        yield
        return
    handle = module.register_forward_pre_hook(lambda _module, inputs: tree_map_only(Tensor, _to(device), inputs))
    try:
        yield
    finally:
        handle.remove()


def _to(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device)


def _find_output(
    config: ModelConfig, source: SourcedModel, module: nn.Module, preprocess: PreprocessSpec
) -> FoundOutput:
    """What the network returns, and the task that this makes."""
    if source.task is Task.DETECTION:
        for key in ("output", "outputs"):
            if key in config.model_fields_set:
                raise ModelLoadError(f"{key}: is not for models of {source.task}")
        return FoundOutput(OutputReading(), source.task, ())
    return find_output(
        module,
        preprocess,
        task=source.task,
        is_task_open=config.task == "auto",
        part=config.output,
        kind=None if config.outputs == "auto" else OutputKind(config.outputs),
    )


def _discover(config: ModelConfig, found: FoundOutput, module: nn.Module, preprocess: PreprocessSpec) -> Discovery:
    task = found.task
    grids = {layer: grid.grid for layer, grid in config.grids.items()}
    size, channels = preprocess.sample_px, preprocess.channels
    if task is Task.SEGMENTATION:
        return discover_for_segmentation(
            module, size, config.layers, scores=found.reading.scores, grids=grids, channels=channels
        )
    if task is Task.DETECTION:
        if grids:
            raise ModelLoadError("grids: the layers of a detector return feature maps, or several by name")
        return discover_for_detection(module, size, config.layers, channels=channels)
    return discover(
        module,
        size,
        config.layers,
        grids=grids,
        scores=found.reading.scores,
        scored=task is not Task.EMBEDDING,
        channels=channels,
    )
