"""A dry run of one model: load it, explain one image, say what happened."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.fleet.build import build
from heatlens_server.fleet.warm_up import is_finite, run_trial, trial_size_px


def check_model(config: ModelConfig, write: Callable[[str], None], *, cache_dir: Path | None) -> bool:
    """Load a model and explain one noise image with every method it supports, or run the first steps of it.

    Args:
        config: the model.
        write: takes one line of report.
        cache_dir: where exports are kept; None for nowhere.

    Returns:
        Whether all went well.
    """
    try:
        built = build(config, cache_dir=cache_dir, report=lambda line: write(f"{config.name}: {line}"))
    except ModelLoadError as error:
        write(f"{config.name}: FAILED: {error}")
        return False
    except (Exception, SystemExit) as error:  # a model's own code may raise anything
        write(f"{config.name}: FAILED: {error!r}")
        return False
    info = built.engine.info
    image = np.random.default_rng(0).integers(0, 256, (1, *trial_size_px(info), 3), dtype=np.uint8)
    try:
        for method in info.requestable_methods:
            if not all(is_finite(result) for result in run_trial(built.engine, image, method)):
                write(f"{config.name}: FAILED: {method} gave values that are not finite")
                return False
    except ModelLoadError as error:
        write(f"{config.name}: FAILED: {error}")
        return False
    finally:
        built.engine.close()
    for assumption in built.assumptions:
        write(f"{config.name}: {assumption}")
    size = f"{info.input_width_px}x{info.input_height_px} px" if info.input_width_px else "any size"
    write(
        f"{config.name}: ok: {info.engine_name} on {info.device} in {info.precision}, "
        f"{info.task}, {size}, {info.class_count} classes, "
        f"layers {', '.join(info.layers)}; methods {', '.join(info.requestable_methods)}"
    )
    return True
