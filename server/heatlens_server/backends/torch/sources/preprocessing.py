"""How images become the input of a network: what its source says, what the configuration says, and what is assumed."""

import dataclasses
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from torch import nn

from heatlens_server.backends.torch.sources.trace import run
from heatlens_server.config import PreprocessConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import MAX_CHANNELS, Interpolation, PreprocessSpec
from heatlens_server.core.tasks import Task

IMAGENET_PREPROCESS = PreprocessSpec(
    resize_px=256,
    crop_px=(224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation=Interpolation.BILINEAR,
)
"""What most networks that start from ImageNet weights use (torchvision's documentation)."""

_RGB_CHANNELS = 3
_LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601-2, of which gray images are made."""

_DIGITS = 3

_TOLD = ("resize_px", "crop_px", "max_side_px", "mean", "std", "interpolation")
"""What networks and their sources tell."""

_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
_TRIED_PX = 64


@dataclass(frozen=True, slots=True)
class ResolvedPreprocess:
    """How images become a network's input, and what of it is a guess.

    Attributes:
        spec: the values.
        assumptions: what was found or assumed, one sentence each, with the key that overrides it.
    """

    spec: PreprocessSpec
    assumptions: tuple[str, ...] = ()


def resolve_preprocess(
    base: PreprocessSpec | None,
    changes: PreprocessConfig,
    *,
    module: nn.Module | None = None,
    task: Task = Task.CLASSIFICATION,
    guessed: frozenset[str] = frozenset(),
    told_by: str = "",
) -> ResolvedPreprocess:
    """Lay the configured values over the source's. With only crop_px set, resize_px keeps its ratio to it.

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
    resize_px, crop_px, max_side_px = _sizes(base, changes)
    assumptions, converted = [], False
    try:
        spec = PreprocessSpec(
            resize_px=resize_px,
            crop_px=crop_px,
            mean=base.mean,
            std=base.std,
            interpolation=changes.interpolation or base.interpolation,
            max_side_px=max_side_px,
            window=None if changes.window == "auto" else changes.window,
            window_auto=changes.window == "auto",
            scale=changes.scale or base.scale,
            letterbox=bool(changes.letterbox),
            pad_to_multiple=changes.pad_to_multiple or base.pad_to_multiple,
        )
        channels = changes.channels or _given_channels(changes)
        if not channels:
            channels = base.channels if module is None else find_channels(module, spec.sample_px, base.channels)
            if channels != base.channels:
                assumptions.append(_about_channels(channels))
        if channels != base.channels and (changes.mean is None or changes.std is None):
            base, converted = _of_channels(base, channels), True
            assumptions.append(
                f"The mean and std of {channels} channel{_s(channels)} are assumed, from those of RGB: set "
                f"mean = {list(base.mean)} and std = {list(base.std)} in [models.preprocess], or what the network was "
                "trained with."
            )
        spec = dataclasses.replace(
            spec,
            mean=_per_channel("mean", changes.mean or base.mean, channels),
            std=_per_channel("std", changes.std or base.std, channels),
            channel_order=changes.channel_order or base.channel_order,
        )
        if task is Task.SEGMENTATION and module is not None and crop_px is None and changes.pad_to_multiple is None:
            multiple = find_multiple(module, spec.sample_px, channels)
            if multiple > 1:
                spec = dataclasses.replace(spec, pad_to_multiple=multiple)
                assumptions.append(
                    f"The network takes sides of multiples of {multiple} px: images are padded right and below; "
                    "[models.preprocess] pad_to_multiple overrides that."
                )
    except ValueError as error:
        raise ModelLoadError(f"preprocess: {error}") from error
    unset = {name for name in _TOLD if getattr(changes, name) is None}
    if changes.crop_px is not None or changes.letterbox:
        unset -= {"resize_px", "crop_px", "max_side_px"}
    if converted:
        unset -= {"mean", "std"}
    return ResolvedPreprocess(spec, (*assumptions, *_about_values(spec, unset, guessed, told_by)))


def _sizes(
    base: PreprocessSpec, changes: PreprocessConfig
) -> tuple[int | tuple[int, int] | None, tuple[int, int] | None, int | None]:
    """The sizes `resize_px`, `crop_px` and `max_side_px`."""
    crop_px = base.crop_px if changes.crop_px is None else _sides(changes.crop_px)
    resize_px = changes.resize_px
    if changes.letterbox:
        crop_px = crop_px if resize_px is None or changes.crop_px is not None else _sides(resize_px)
        resize_px = crop_px if resize_px is None else _sides(resize_px)
    elif resize_px is None:
        resize_px = base.resize_px if crop_px is None else _scaled_resize(base, crop_px)
    max_side_px = changes.max_side_px
    if max_side_px is None and crop_px is None:
        max_side_px = base.max_side_px
    return resize_px, crop_px, max_side_px


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


def _about_values(
    spec: PreprocessSpec, unset: AbstractSet[str], guessed: AbstractSet[str], told_by: str
) -> Iterator[str]:
    """What is said of values that are not configured: those that are a guess, and those that the network tells."""
    if (unset & guessed) - {"interpolation", "max_side_px"}:
        usual = "as of torchvision's detectors" if spec.mean == (0.0,) * spec.channels else "as for ImageNet"
        yield (
            f"Nothing tells how images become the network's input, so {spec.in_words(unset & guessed)} are assumed, "
            f"{usual}: set in [models.preprocess] what it was trained with."
        )
    if told_by and unset - guessed:
        words = spec.in_words(unset - guessed)
        yield f"The network's {told_by} gives {words}; [models.preprocess] overrides that."


def _about_channels(channels: int) -> str:
    what = {1: "images become gray", 4: "images must have an alpha channel or be tensors of 4 channels"}
    means = what.get(channels, f"images must be of {channels} channels")
    return f"The network takes {channels} channel{_s(channels)}: {means}; [models.preprocess] channels overrides that."


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _given_channels(changes: PreprocessConfig) -> int:
    """How many channels mean and std are given for; 0 if they do not tell: one value may stand for all."""
    return max((len(values) for values in (changes.mean, changes.std) if values and len(values) > 1), default=0)


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) not in {1, channels}:
        raise ValueError(f"{name} has {len(values)} values, for {channels} channels: give one, or one per channel")
    return tuple(values) * (channels if len(values) == 1 else 1)


def _of_channels(base: PreprocessSpec, channels: int) -> PreprocessSpec:
    """The mean and std of RGB for other channels: of gray those of its luma, of any other their average."""

    def converted(values: Sequence[float]) -> tuple[float, ...]:
        if len(values) != _RGB_CHANNELS:
            return (round(sum(values) / len(values), _DIGITS),) * channels
        average = round(sum(values) / _RGB_CHANNELS, _DIGITS)
        if channels == 1:
            return (round(sum(weight * value for weight, value in zip(_LUMA, values, strict=True)), _DIGITS),)
        return (*values, average) if channels == _RGB_CHANNELS + 1 else (average,) * channels

    return dataclasses.replace(base, mean=converted(base.mean), std=converted(base.std))


def _sides(size_px: int | tuple[int, int]) -> tuple[int, int]:
    return (size_px, size_px) if isinstance(size_px, int) else size_px


def _scaled_resize(base: PreprocessSpec, crop_px: tuple[int, int]) -> int | tuple[int, int]:
    if base.crop_px is None or base.resize_px is None:
        return max(crop_px)
    if isinstance(base.resize_px, int):
        return round(base.resize_px * max(crop_px) / max(base.crop_px))
    return (
        round(base.resize_px[0] * crop_px[0] / base.crop_px[0]),
        round(base.resize_px[1] * crop_px[1] / base.crop_px[1]),
    )
