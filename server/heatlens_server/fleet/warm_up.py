"""Running an engine once before its first caller does. No torch in here."""

import numpy as np

from heatlens_server.config import ModelConfig
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import Capabilities, Engine, MapSpec, SteppingEngine
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.methods import PRESETS, Method
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Detections, Pixels, Similarity, Target, TopK, Values
from heatlens_server.core.tasks import Task

_ANY_SIZE_PX = 256
"""The side of the image for a model that takes any."""

_FIRST_STEPS = 3
"""How many steps are tried of what may take hundreds: among the first are one of a single row and one of all rows."""


def check_method(engine: Engine, method: Method) -> None:
    """Raise ModelLoadError if an engine does not have a method."""
    methods = engine.info.requestable_methods
    if method not in methods:
        why = engine.info.why_not(method)
        raise ModelLoadError(f"method {method} is not supported{why}; this model supports: {', '.join(methods)}")


def family_method(config: ModelConfig, grid: Grid, task: Task | None = None) -> Method:
    """The configured method, or else the one that finds objects best in networks whose default layer has this grid.

    On tokens, Grad-CAM peaks on the object less often than chance, as the gradients of the tokens that the class token
    attends to stand beside those of all others in their mean; element-wise Grad-CAM does best. `python -m
    bench.defaults` measures it; docs/methods.md has the table. The score of a box depends on few places, and Grad-CAM
    weights channels by means over all of them: HiResCAM multiplies place by place. docs/tasks.md has the figures.
    """
    if "method" in config.model_fields_set:
        return config.method
    if grid.layout is Layout.TOKENS:
        return Method.ELEMENT_WISE_GRAD_CAM
    return Method.HI_RES_CAM if task is Task.DETECTION else config.method


def about_family(config: ModelConfig, grid: Grid, task: Task | None = None) -> tuple[str, ...]:
    """What is to be said about `family_method`."""
    method = family_method(config, grid, task)
    if method is config.method:
        return ()
    if grid.layout is Layout.TOKENS:
        why = f"the network's layers are tokens, on which {config.method} often misses the object"
    else:
        why = f"the score of a box depends on few places of the layer, over which {config.method} takes means"
    return (f"The default method is {method}, as {why}; method overrides that.",)


def default_method(config: ModelConfig, info: Capabilities, grid: Grid) -> tuple[Method, tuple[str, ...]]:
    """The method for requests that name none, and what is to be said about the choice.

    It is that of the network's family. Where the network has no gradients, and none is configured, it is one that needs
    none: CAM, which equals Grad-CAM where it is defined, or else Eigen-CAM.
    """
    why = info.refusals.get(config.method)
    if why is None or "method" in config.model_fields_set:
        return family_method(config, grid, info.task), about_family(config, grid, info.task)
    method = next(method for method in (Method.CAM, Method.EIGEN_CAM) if method in info.methods)
    return method, (f"The default method is {method} in place of {config.method}, as {why}; method overrides that.",)


def warm_up(engine: SteppingEngine, config: ModelConfig, method: Method) -> None:
    """Run what the first caller would otherwise wait for; on a GPU also the largest batch, to see that it fits.

    Raises:
        ModelLoadError: it does not fit, or what comes out is not finite.
    """
    info = engine.info
    sizes = {1} if info.device == "cpu" else {1, config.batching.max_batch_size}
    for size in sorted(sizes):
        try:
            results = run_trial(engine, np.zeros((size, *trial_shape(info)), dtype=np.uint8), method)
        except MemoryError:
            raise ModelLoadError(
                f"out of memory on {info.device} with a batch of {size}: lower batching.max_batch_size"
            ) from None
        if not all(result.is_finite for result in results):
            raise ModelLoadError("the model gives scores or maps that are not finite: are its weights right?")


def try_out(engine: SteppingEngine) -> None:
    """Have an engine explain one image of nothing; whatever that raises says that it does not work.

    Raises:
        ValueError: what comes out is not finite.
    """
    info = engine.info
    image = np.zeros((1, *trial_shape(info)), np.uint8)
    # A second engine is not loaded for this.
    own = [method for method in info.requestable_methods if method.as_preset.method not in info.fallback_methods]
    if not all(result.is_finite for result in run_trial(engine, image, own[0])):
        raise ValueError("scores or maps are not finite")


def run_trial(
    engine: SteppingEngine, images: ImageArray, method: Method, *, layer: str | None = None
) -> list[ImageResult]:
    """Explain images with a method and default options; if that takes steps, run the first few for the first image.

    Args:
        engine: has the method.
        images: uint8 (N, H, W, C), of `trial_shape`; a step runs the model on as many rows as there are images.
        method: one of `engine.info.requestable_methods`.
        layer: one that the method explains; None for its default.

    Returns:
        The results; nothing if steps are left.
    """
    info = engine.info
    preset = method.as_preset
    offered = info.layers_of(preset.method)
    spec = MapSpec(
        method=preset.method,
        layers=(layer,) if layer else offered if preset.all_layers else offered[:1],
        upsample=False,
        score=preset.score if method in PRESETS else info.scores[0],
        aggregation=preset.aggregation,
    )
    target = _target(info)
    if not spec.in_steps:
        return engine.explain(images, [target] * len(images), spec)
    steps = engine.steps(images[0], target, spec, rows=len(images))
    try:
        for _ in range(_FIRST_STEPS):
            next(steps)
    except StopIteration as stop:
        return [stop.value]
    finally:
        steps.close()
    return []


def trial_shape(info: Capabilities) -> tuple[int, int, int]:
    """(height, width, channels) of an image that a model takes."""
    return info.input_height_px or _ANY_SIZE_PX, info.input_width_px or _ANY_SIZE_PX, info.input_channels


def _target(info: Capabilities) -> Target:
    match info.task:
        case Task.SEGMENTATION:
            return Pixels(TopK(1))
        case Task.DETECTION:
            return Detections(min_score=0.0, max_count=1)
        case Task.REGRESSION:
            return Values((0,))
        case Task.EMBEDDING:
            return Similarity(np.ones(info.class_count, np.float32))
        case _:
            return TopK(1)


def check_answers(engine: Engine, method: Method) -> None:
    """Check that an engine's answers are of the shape that it says, for more than one class too.

    Of an exported folder, only the manifest says what is in it.

    Raises:
        ModelLoadError: they are not.
    """
    info = engine.info
    images = np.zeros((1, *trial_shape(info)), dtype=np.uint8)
    base = method.as_preset.method
    spec = MapSpec(method=base, layers=info.layers[:1], upsample=False, score=info.scores[0])
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
