"""What every source of networks gives, and how the libraries behind them fail."""

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from heatlens_server.config import WEIGHT_FILE_SUFFIXES
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.core.tasks import Task

MAX_SIDE_PX = 1333
"""The longest side of inputs of any size, unless configured: what torchvision's detectors shrink images to."""

# Detectors normalise and resize images themselves.
DETECTION_PREPROCESS = PreprocessSpec(
    resize_px=None,
    crop_px=None,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    interpolation=Interpolation.BILINEAR,
    max_side_px=MAX_SIDE_PX,
)


@dataclass(frozen=True, slots=True)
class SourcedModel:
    """A network as its source gives it.

    Attributes:
        module: the network, with its weights.
        preprocess: what its source says about its input; None if that is beyond PreprocessSpec.
        labels: class names of the source's own classes, or empty. Only right if there are as many as classes.
        task: what it does.
        guessed: names of the fields of `preprocess` that neither the source nor the network tells.
        told_by: what of the network tells the other fields; empty if its source does.
        assumptions: what was assumed about it, in one sentence each that names the key that overrides it.
    """

    module: nn.Module
    preprocess: PreprocessSpec | None
    labels: tuple[str, ...]
    task: Task
    guessed: frozenset[str] = frozenset()
    told_by: str = ""
    assumptions: tuple[str, ...] = ()


@contextlib.contextmanager
def downloading(source: str) -> Iterator[None]:
    """Name what failed if weights cannot be fetched: network errors differ per library, and hold addresses and paths.

    Raises:
        ModelLoadError: the weights could not be fetched.
    """
    try:
        yield
    except Exception as error:
        raise ModelLoadError(
            f"the pretrained weights of {source} could not be fetched ({type(error).__name__}); "
            "give a weights file where there is no network"
        ) from error


def as_module(value: object) -> nn.Module:
    """What an untyped library says is a network.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"expected a module, got {type(value).__name__}")
    return value


def triple(values: object) -> tuple[float, float, float]:
    """One value per RGB channel.

    Raises:
        ModelLoadError: there are more or fewer.
    """
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ModelLoadError(f"expected one value per RGB channel, got {values}")
    red, green, blue = values
    return float(red), float(green), float(blue)


def is_file(weights: str) -> bool:
    """Whether `weights` of a configuration names a file."""
    return weights.endswith(WEIGHT_FILE_SUFFIXES)


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """A hint at names like a wrong one, for the end of an error message; empty if there are none."""
    found = difflib.get_close_matches(name, names, n=3)
    return f"; near: {', '.join(found)}" if found else ""
