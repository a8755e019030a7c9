"""What running a network tells about its input: how many channels it takes, and what sides."""

import dataclasses

from torch import nn

from heatlens_server.backends.torch.sources.trace import run
from heatlens_server.config import (
    IMAGENET_PREPROCESS,
    PreprocessConfig,
    ResolvedPreprocess,
    given_channels,
    lay_over,
    resized,
)
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import MAX_CHANNELS, PreprocessSpec
from heatlens_server.core.tasks import Task

_TOLD = frozenset({"resize_px", "crop_px", "max_side_px", "mean", "std", "interpolation"})
"""What networks and their sources tell."""

_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
_TRIED_PX = 64


def resolve_preprocess(
    base: PreprocessSpec | None,
    changes: PreprocessConfig,
    *,
    module: nn.Module | None = None,
    task: Task = Task.CLASSIFICATION,
    guessed: frozenset[str] = frozenset(),
    told_by: str = "",
) -> ResolvedPreprocess:
    """Lay the configured values over the source's, and find by running the network what neither tells.

    Args:
        base: the source's own; None if it cannot be expressed, and then both sizes must be configured.
        changes: the configuration's.
        module: the network, in eval mode, of which the number of channels is found, and what sides it takes; None for
            as many as `base` has, and for any.
        task: what it does.
        guessed: names of those fields of `base` that are a guess.
        told_by: what of the network tells the others; empty if its source does.

    Raises:
        ModelLoadError: the result is impossible.
    """
    if base is None:
        if changes.resize_px is None or changes.crop_px is None or changes.mean is None or changes.std is None:
            raise ModelLoadError(
                "preprocess: this model's own preprocessing is not supported; set resize_px, crop_px, mean and std"
            )
        base = IMAGENET_PREPROCESS
    channels, assumptions = given_channels(changes), []
    if not channels:
        channels = base.channels
        if module is not None:
            channels = find_channels(module, resized(base, changes).sample_px, base.channels)
        if channels != base.channels:
            assumptions.append(_about_channels(channels))
    told = {f"The network's {told_by}": _TOLD - guessed} if told_by else {}
    resolved = lay_over(base, changes, channels=channels, guessed=guessed, told=told)
    spec = resolved.spec
    if task is Task.SEGMENTATION and module is not None and spec.crop_px is None and changes.pad_to_multiple is None:
        multiple = find_multiple(module, spec.sample_px, channels)
        if multiple > 1:
            spec = dataclasses.replace(spec, pad_to_multiple=multiple)
            assumptions.append(
                f"The network takes sides of multiples of {multiple} px: images are padded right and below; "
                "[models.preprocess] pad_to_multiple overrides that."
            )
    return ResolvedPreprocess(spec, (*assumptions, *resolved.assumptions))


def find_channels(module: nn.Module, size_px: tuple[int, int], usual: int) -> int:
    """How many channels a network's input has: those of its first convolution, if it runs on so many.

    Args:
        module: in eval mode. Left as it was.
        size_px: (height, width) of an input that it takes.
        usual: what is tried next, and the answer if it runs on none.
    """
    convolutions = (child for child in module.modules() if isinstance(child, nn.Conv2d))
    first = next(convolutions, None)
    if first is None or first.in_channels == usual:
        return usual
    others = (count for count in range(1, MAX_CHANNELS + 1) if count not in {first.in_channels, usual})
    for channels in (first.in_channels, usual, *others):
        if channels <= MAX_CHANNELS and _runs(module, size_px, channels):
            return channels
    return usual


def find_multiple(module: nn.Module, size_px: tuple[int, int], channels: int) -> int:
    """The least power of 2 that sides of images must be multiples of, for the network to run.

    Args:
        module: of any size of images, in eval mode. Left as it was.
        size_px: (height, width) of an input that it takes, if it takes any.
        channels: of its input.

    Raises:
        ModelLoadError: it takes one size only.
    """
    for multiple in _MULTIPLES:
        # Of each remainder that halving again and again may leave.
        steps = [step for step in _MULTIPLES if step >= multiple]
        sizes = [(_TRIED_PX + step, _TRIED_PX + _TRIED_PX + multiple) for step in steps]
        if all(_runs(module, size, channels) for size in sizes):
            return multiple
    if not _runs(module, size_px, channels):
        # It fails for another reason, which is told when it is run next.
        return 1
    raise ModelLoadError(
        "preprocess: the network runs on few sizes of images only: set crop_px, and resize_px, to one that it takes, "
        f"such as {list(size_px)}"
    )


def _runs(module: nn.Module, size_px: tuple[int, int], channels: int) -> bool:
    try:
        run(module, size_px, channels=channels)
    except ModelLoadError:
        return False
    return True


def _about_channels(channels: int) -> str:
    what = {1: "images become gray", 4: "images must have an alpha channel or be tensors of 4 channels"}
    means = what.get(channels, f"images must be of {channels} channels")
    s = "" if channels == 1 else "s"
    return f"The network takes {channels} channel{s}: {means}; [models.preprocess] channels overrides that."
