"""How images become a model's input: what its source says, what the configuration says, and what is assumed."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from heatlens_server.config.model import PreprocessConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec

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


@dataclass(frozen=True, slots=True)
class ResolvedPreprocess:
    """How images become a network's input, and what of it is a guess.

    Attributes:
        spec: the values.
        assumptions: what was found or assumed, one sentence each, with the key that overrides it.
    """

    spec: PreprocessSpec
    assumptions: tuple[str, ...] = ()


def lay_over(
    base: PreprocessSpec,
    changes: PreprocessConfig,
    *,
    channels: int,
    guessed: AbstractSet[str] = frozenset(),
    told: Mapping[str, AbstractSet[str]] | None = None,
) -> ResolvedPreprocess:
    """Lay the configured values over the source's. With only crop_px set, resize_px keeps its ratio to it.

    Args:
        base: the source's own.
        changes: the configuration's.
        channels: of the network's input.
        guessed: names of those fields of `base` that are a guess.
        told: names of those fields of `base` that are worth a word, by what tells them, as "The file's metadata".

    Raises:
        ModelLoadError: the result is impossible.
    """
    assumptions, converted = [], False
    try:
        if channels != base.channels and (changes.mean is None or changes.std is None):
            base, converted = _of_channels(base, channels), True
            plural = "" if channels == 1 else "s"
            assumptions.append(
                f"The mean and std of {channels} channel{plural} are assumed, from those of RGB: set "
                f"mean = {list(base.mean)} and std = {list(base.std)} in [models.preprocess], or what the network was "
                "trained with."
            )
        spec = dataclasses.replace(
            resized(base, changes),
            mean=_per_channel("mean", changes.mean or base.mean, channels),
            std=_per_channel("std", changes.std or base.std, channels),
            channel_order=changes.channel_order or base.channel_order,
        )
    except ValueError as error:
        raise ModelLoadError(f"preprocess: {error}") from error
    # What follows from a value that is configured is not said either.
    unset = {item.name for item in dataclasses.fields(spec) if getattr(changes, item.name, None) is None}
    if changes.crop_px is not None or changes.letterbox:
        unset -= {"resize_px", "crop_px", "max_side_px"}
    if converted:
        unset -= {"mean", "std"}
    return ResolvedPreprocess(spec, (*assumptions, *_about_values(spec, unset, guessed, told or {})))


def given_channels(changes: PreprocessConfig) -> int:
    """How many channels a configuration is for; 0 if it does not tell: one value of mean or std may stand for all."""
    given = (len(values) for values in (changes.mean, changes.std) if values and len(values) > 1)
    return changes.channels or max(given, default=0)


def resized(base: PreprocessSpec, changes: PreprocessConfig) -> PreprocessSpec:
    """The source's values with what is configured but for those of channels, which are the source's still.

    Raises:
        ModelLoadError: the result is impossible.
    """
    letterbox = base.letterbox if changes.letterbox is None else changes.letterbox
    crop_px = base.crop_px if changes.crop_px is None else _sides(changes.crop_px)
    resize_px = changes.resize_px
    if letterbox:
        crop_px = crop_px if resize_px is None or changes.crop_px is not None else _sides(resize_px)
        resize_px = crop_px if resize_px is None else _sides(resize_px)
    elif resize_px is None:
        resize_px = base.resize_px if crop_px is None else scaled_resize(base, crop_px)
    max_side_px = changes.max_side_px
    if max_side_px is None and crop_px is None:
        max_side_px = base.max_side_px
    try:
        return PreprocessSpec(
            resize_px=resize_px,
            crop_px=crop_px,
            mean=base.mean,
            std=base.std,
            interpolation=changes.interpolation or base.interpolation,
            max_side_px=max_side_px,
            window=None if changes.window == "auto" else changes.window,
            window_auto=changes.window == "auto",
            scale=changes.scale or base.scale,
            letterbox=letterbox,
            pad_to_multiple=changes.pad_to_multiple or base.pad_to_multiple,
        )
    except ValueError as error:
        raise ModelLoadError(f"preprocess: {error}") from error


def scaled_resize(base: PreprocessSpec, crop_px: tuple[int, int]) -> int | tuple[int, int]:
    """What images are resized to for another crop than the source's, (height, width): in the same ratio to it."""
    if base.crop_px is None or base.resize_px is None:
        return max(crop_px)
    if isinstance(base.resize_px, int):
        return round(base.resize_px * max(crop_px) / max(base.crop_px))
    return (
        round(base.resize_px[0] * crop_px[0] / base.crop_px[0]),
        round(base.resize_px[1] * crop_px[1] / base.crop_px[1]),
    )


def _about_values(
    spec: PreprocessSpec, unset: AbstractSet[str], guessed: AbstractSet[str], told: Mapping[str, AbstractSet[str]]
) -> Iterator[str]:
    """What is said of values that are not configured: those that are a guess, and those that the network tells."""
    if (unset & guessed) - {"interpolation", "max_side_px"}:
        usual = "as of torchvision's detectors" if spec.mean == (0.0,) * spec.channels else "as for ImageNet"
        verb = "is" if len(unset & guessed) == 1 else "are"
        yield (
            f"Nothing tells how images become the network's input, so {spec.in_words(unset & guessed)} "
            f"{verb} assumed, {usual}: set in [models.preprocess] what it was trained with."
        )
    for teller, names in told.items():
        if unset & names:
            yield f"{teller} gives {spec.in_words(unset & names)}; [models.preprocess] overrides that."


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
