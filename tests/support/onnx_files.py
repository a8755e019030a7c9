"""ONNX files of networks, as other people's exporters write them."""

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.source.load import LoadedFile, load_file
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.config import ModelConfig
from heatlens_server.core.tasks import Task


class WithLayers(nn.Module):
    """A network that returns some of its layers' outputs behind its own."""

    def __init__(self, module: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._layers = layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept: dict[str, Tensor] = {}
        hooks = [
            self.module.get_submodule(layer).register_forward_hook(
                lambda _module, _given, output, layer=layer: kept.__setitem__(layer, output)
            )
            for layer in self._layers
        ]
        returned = self.module(x)
        for hook in hooks:
            hook.remove()
        outputs = returned if isinstance(returned, tuple) else (returned,)
        return *outputs, *(kept[layer] for layer in self._layers)


def write_onnx(
    module: nn.Module,
    path: Path,
    *,
    shape: Sequence[int] = (1, 3, 64, 64),
    layers: Sequence[str] = (),
    names: Sequence[str] = ("logits",),
    opset: int = 17,
    batch: int | None = None,
    **options: Any,
) -> Path:
    """Export a network as people do: with torch.onnx.export, the layers' outputs as further outputs.

    Args:
        module: the network.
        path: of the file.
        shape: of the input.
        layers: whose outputs the file returns too, under their names.
        names: of the network's own outputs.
        opset: of the file.
        batch: None for any; otherwise the file is for just so many images.
        options: more of torch.onnx.export's.
    """
    axes = {} if batch else {name: {0: "batch"} for name in ("image", *names, *layers)}
    copied = copy.deepcopy(module).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            WithLayers(copied, layers),
            (torch.zeros(batch or shape[0], *shape[1:]),),
            str(path),
            input_names=["image"],
            output_names=[*names, *layers],
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
            **options,
        )
    return path


def as_file(model: LoadedModel, **changes: Any) -> LoadedFile:
    """A loaded model, exported to a file and loaded from there."""
    preprocess = model.preprocess
    channels_last = {"mean": preprocess.mean, "std": preprocess.std, "scale": preprocess.scale}
    given: Mapping[str, Any] = {**channels_last, "resize_px": preprocess.resize_px, "crop_px": preprocess.crop_px}
    with TemporaryDirectory() as folder:
        shape = (1, preprocess.channels, *preprocess.input_px)
        path = write_onnx(model.module, Path(folder, "model.onnx"), shape=shape, layers=model.layers)
        config = ModelConfig(
            name="test",
            source=f"onnx:{path}",
            output="logits",
            layers=model.layers,
            task="auto" if model.task is Task.CLASSIFICATION else str(model.task),
            grids={layer: dataclasses.asdict(grid) for layer, grid in model.grids.items()},
            preprocess={key: value for key, value in given.items() if value is not None},
            **changes,
        )
        return load_file(path, config)


def engine_of_file(model: LoadedModel) -> NetworkEngine:
    """The engine for a loaded model's ONNX file."""
    return NetworkEngine(as_file(model), device="cpu", threads=1)
