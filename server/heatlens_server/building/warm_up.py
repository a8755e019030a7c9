"""Running an engine once before its first caller does. No torch in here."""

import numpy as np

from heatlens_server.cam.catalog import Method
from heatlens_server.config import ModelConfig
from heatlens_server.engines.base import Engine, ImageResult, MapSpec, TopK
from heatlens_server.errors import ModelLoadError


def check_method(engine: Engine, method: Method) -> None:
    """Raise ModelLoadError if an engine does not have a method."""
    methods = engine.info.methods
    if method not in methods:
        raise ModelLoadError(f"method {method} is not supported; this model supports: {', '.join(methods)}")


def warm_up(engine: Engine, config: ModelConfig, method: Method) -> None:
    """Run what the first caller would otherwise wait for; on a GPU also the largest batch, to see that it fits.

    Raises:
        ModelLoadError: it does not fit, or what comes out is not finite.
    """
    info = engine.info
    spec = MapSpec(method=method, layers=info.layers[:1], upsample=False)
    sizes = {1} if info.device == "cpu" else {1, config.batching.max_batch_size}
    for size in sorted(sizes):
        images = np.zeros((size, info.input_height_px, info.input_width_px, 3), dtype=np.uint8)
        try:
            results = engine.explain(images, [TopK(1)] * size, spec)
        except MemoryError:
            raise ModelLoadError(f"out of memory on {info.device} with a batch of {size}") from None
        if not all(np.isfinite(result.logits).all() and np.isfinite(result.maps).all() for result in results):
            raise ModelLoadError("the model gives scores or maps that are not finite: are its weights right?")


def check_answers(engine: Engine, method: Method) -> None:
    """Check that an engine's answers are of the shape that it says, for more than one class too.

    Of an export that somebody gives us, only the manifest says what is in it.

    Raises:
        ModelLoadError: they are not.
    """
    info = engine.info
    images = np.zeros((1, info.input_height_px, info.input_width_px, 3), dtype=np.uint8)
    spec = MapSpec(method=method, layers=info.layers[:1], upsample=False)
    for count in sorted({1, min(2, info.class_count)}):
        (result,) = engine.explain(images, [TopK(count)], spec)
        if result.logits.shape != (info.class_count,):
            raise ModelLoadError(
                f"the graph gives scores of shape {result.logits.shape}, and class_count is {info.class_count}"
            )
        if not _is_answer(result, count):
            raise ModelLoadError(f"the graph does not give one map, scale and offset for each of {count} classes")


def _is_answer(result: ImageResult, count: int) -> bool:
    return (
        result.maps.ndim == 3
        and result.maps.shape[0] == count
        and result.scales.shape == result.offsets.shape == (count,)
        and len(set(result.class_ids)) == count
        and all(0 <= class_id < len(result.logits) for class_id in result.class_ids)
    )
