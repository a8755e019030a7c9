"""From a model's configuration to an engine that has explained an image."""

from dataclasses import dataclass

import numpy as np

from heatlens_server.config import ModelConfig
from heatlens_server.engines.base import Engine, MapSpec, TopK
from heatlens_server.engines.torch_engine import TorchEngine
from heatlens_server.errors import ModelLoadError
from heatlens_server.imaging.preprocess import PreprocessSpec
from heatlens_server.models.load import load_model


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A loaded, warmed-up model.

    Attributes:
        engine: runs it.
        preprocess: from source image to input pixels.
        version: of the weights.
        labels: one per class; empty if unknown.
    """

    engine: Engine
    preprocess: PreprocessSpec
    version: str
    labels: tuple[str, ...]


def build(config: ModelConfig) -> BuiltModel:
    """Load a model, make its engine and warm it up with a batch of one and a full one.

    `engine = "auto"` is the torch engine.

    Raises:
        ModelLoadError: with a message that may be shown to clients.
    """
    model = load_model(config)
    engine = TorchEngine(model, device=config.device, precision=config.precision)
    try:
        _check_method(engine, config)
        _warm_up(engine, config)
    except BaseException:
        engine.close()
        raise
    return BuiltModel(engine, model.preprocess, model.version, model.labels)


def _check_method(engine: Engine, config: ModelConfig) -> None:
    methods = engine.info.methods
    if config.method not in methods:
        raise ModelLoadError(f"method {config.method} is not supported; this model supports: {', '.join(methods)}")


def _warm_up(engine: Engine, config: ModelConfig) -> None:
    """Run what the first caller would otherwise wait for; on a GPU also the largest batch, to see that it fits."""
    info = engine.info
    spec = MapSpec(method=config.method, layers=info.layers[:1], upsample=False)
    sizes = {1} if info.device == "cpu" else {1, config.batching.max_batch_size}
    for size in sorted(sizes):
        images = np.zeros((size, info.input_height_px, info.input_width_px, 3), dtype=np.uint8)
        try:
            results = engine.explain(images, [TopK(1)] * size, spec)
        except MemoryError:
            raise ModelLoadError(f"out of memory on {info.device} with a batch of {size}") from None
        if not all(np.isfinite(result.logits).all() and np.isfinite(result.maps).all() for result in results):
            raise ModelLoadError("the model gives scores or maps that are not finite: are its weights right?")
