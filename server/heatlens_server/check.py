"""A dry run of one model: load it, explain one image, say what happened."""

import re
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from heatlens_server.check_photo import explain_photo
from heatlens_server.config import ModelConfig
from heatlens_server.core.causes import with_causes
from heatlens_server.core.errors import HeatlensError, ModelLoadError
from heatlens_server.fleet.build import build
from heatlens_server.fleet.built_model import BuiltModel
from heatlens_server.fleet.isolated_engine import build_isolated
from heatlens_server.fleet.warm_up import run_trial, trial_shape
from heatlens_server.scheduling.device_threads import device_names


def check_model(
    config: ModelConfig, write: Callable[[str], None], *, cache_dir: Path | None, photo: Path | None = None
) -> bool:
    """Load a model and explain one noise image with every method it supports, or run the first steps of it.

    A model that is not exported yet is run by torch, as a server does until it is.

    Args:
        config: the model.
        write: takes one line of report.
        cache_dir: where exports are kept; None for nowhere.
        photo: an image file to explain as well; None for none.

    Returns:
        Whether all went well.
    """
    try:
        if config.isolation == "process":
            built = build_isolated(config, cache_dir=cache_dir, log_format="console", log_level="error")
        else:
            at_once = not config.wait_for_export
            tell = partial(_tell, write, config)
            built = build(config, cache_dir=cache_dir, report=tell, at_once=at_once)
    except (Exception, SystemExit) as error:
        write(f"{config.key}: FAILED: {_reason(error)}")
        return False
    try:
        for line in _report(built, photo, Path(f"{re.sub(r'[^A-Za-z0-9._-]', '_', config.key)}-check.png")):
            write(f"{config.key}: {line}")
    except (Exception, SystemExit) as error:
        write(f"{config.key}: FAILED: {_reason(error)}")
        return False
    finally:
        built.close()
    return True


def warm_model(config: ModelConfig, write: Callable[[str], None], *, cache_dir: Path | None) -> bool:
    """Put a model's export into the cache, if it needs one, and open it once; arguments and result as `check_model`."""
    tell = partial(_tell, write, config)
    try:
        built = build(config, cache_dir=cache_dir, report=tell)
    except (Exception, SystemExit) as error:
        tell(f"FAILED: {_reason(error)}")
        return False
    built.close()
    tell(f"ready for {built.engine.info.engine_name}")
    return True


def _tell(write: Callable[[str], None], config: ModelConfig, line: str) -> None:
    write(f"{config.key}: {line}")


def _report(model: BuiltModel, photo: Path | None, overlay: Path) -> Iterator[str]:
    """Try a model, and say what it is.

    Raises:
        HeatlensError, ModelLoadError, MemoryError: a method fails, or the photo cannot be decoded.
        OSError: the photo cannot be read, or the picture not written.
    """
    info = model.engine.info
    image = np.random.default_rng(0).integers(0, 256, (1, *trial_shape(info)), dtype=np.uint8)
    for method in info.requestable_methods:
        if not all(result.is_finite for result in run_trial(model.engine, image, method)):
            raise ModelLoadError(f"{method} gave values that are not finite")
    yield from model.layer_choices
    yield from model.assumptions
    yield f"activation: {info.activation}"
    yield f"preprocess: {model.preprocess.in_words()}"
    if photo is not None:
        yield from explain_photo(model, photo, overlay)
    if model.next_engine:
        yield (
            f"{model.next_engine} takes over once the model is exported, which a server does beside its calls and "
            "`heatlens-server warm` beforehand"
        )
    size = f"{info.input_width_px}x{info.input_height_px} px" if info.input_width_px else "any size"
    yield (
        f"ok: {info.engine_name} on {', '.join(device_names(model.engines))} in {info.precision}, "
        f"{info.task}, {size}, {info.class_count or len(model.labels) or 'an unknown number of'} classes, "
        f"layers {', '.join(info.layers)}; methods {', '.join(info.requestable_methods)}"
    )


def _reason(error: BaseException) -> str:
    """Why a model failed, with the traceback of what is unexpected: a model's own code may raise anything."""
    if isinstance(error, (HeatlensError, ModelLoadError, MemoryError, OSError)):
        return with_causes(error)
    return "".join(traceback.format_exception(error)).rstrip()
