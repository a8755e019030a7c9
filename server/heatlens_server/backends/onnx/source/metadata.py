"""How images become a file's input, and what its classes are called: what is told, and what is assumed."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.find import ImageInput
from heatlens_server.backends.onnx.source.conventions import CONVENTIONS
from heatlens_server.backends.onnx.source.documents import (
    LONGEST_PX,
    MAX_BYTES,
    Section,
    Told,
    can_read_yaml,
    read_beside,
)
from heatlens_server.backends.onnx.source.inside import find_inside
from heatlens_server.backends.onnx.source.statistics import contradiction
from heatlens_server.config import (
    IMAGENET_PREPROCESS,
    ModelConfig,
    PreprocessConfig,
    given_channels,
    lay_over,
    scaled_resize,
)
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.labels import read_labels
from heatlens_server.core.preprocess import ChannelOrder, PreprocessSpec
from heatlens_server.core.tasks import Task

_BESIDE = (
    "metadata_properties.json",
    "preprocessor_config.json",
    "config.json",
    "pipeline.json",
    "inference.yml",
)
"""Files that tools write beside a model: Custom Vision, transformers and timm, MMDeploy, Paddle."""

_NAMES_BESIDE = "labels.txt"
"""As Custom Vision writes it."""

_TOGETHER = (
    ("resize_px", "crop_px", "letterbox"),
    ("mean", "std", "scale"),
    ("interpolation",),
    ("channel_order",),
)
"""Fields that make sense together only, so that they are taken from one place."""

_COLORED = frozenset({3, 4})


@dataclass(frozen=True, slots=True)
class FileSettings:
    """What is known about a file's model beside its graph.

    Attributes:
        preprocess: how images become its input.
        assumptions: what was found or assumed about that, one sentence each, with the key that overrides it.
        task: what the model does; None if nothing tells.
        names: of classes, with what tells them, the strongest first.
        is_size_assumed: whether nothing tells the size of its input.
    """

    preprocess: PreprocessSpec
    assumptions: tuple[str, ...]
    task: Task | None
    names: tuple[tuple[str, tuple[str, ...]], ...]
    is_size_assumed: bool

    def labels_for(self, class_count: int, config: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of so many classes, and what is to be said of them; empty if nothing tells so many.

        Raises:
            ModelLoadError: the configured file has another number.
        """
        if config.labels is not None:
            return read_labels(config.labels, class_count), ()
        for origin, names in self.names:
            if len(names) == class_count:
                return names, (f"The classes' names are those of {origin}; labels overrides that.",)
        return (), tuple(
            f"The file has {class_count} classes, and {origin} names {len(names)}: they are left out; set labels."
            for origin, names in self.names
        )


def read_settings(
    path: Path, model: ir.Model, image: ImageInput, config: ModelConfig, *, is_whole: bool = False
) -> FileSettings:
    """Gather what is told about a file's preprocessing, labels and task, the strongest first.

    The configuration; normalisation in the graph; the file's metadata; files beside it; ImageNet's usual values, which
    are said.

    Args:
        path: of the file.
        model: from `read_file`.
        image: its input.
        config: the model's configuration.
        is_whole: whether the task is about the whole image, so that nothing is cut off unless that is told.

    Raises:
        ModelLoadError: a document is broken, or what it tells or the configuration says is impossible; names the
            document and the key, and no path.
    """
    _check_image(image, config.preprocess)
    told = [(document.origin, read(document)) for document in _documents(path, model) for read in CONVENTIONS]
    base, tellers = _merged(told, image, is_whole=is_whole)
    base, tellers = _with_inside(base, tellers, model, image)
    guessed = {name for names in _TOGETHER for name in names if name not in tellers} - {"letterbox"}
    if _fixed_px(image):
        guessed.discard("crop_px")
    resolved = lay_over(
        base,
        config.preprocess,
        channels=image.channels,
        guessed=guessed,
        told={
            origin[0].upper() + origin[1:]: {name for name, teller in tellers.items() if teller == origin}
            for origin in dict.fromkeys(tellers.values())
        },
    )
    _check_input(resolved.spec, image)
    contradicted = (
        "" if config.preprocess.mean and config.preprocess.std else contradiction(model, image, resolved.spec)
    )
    return FileSettings(
        preprocess=resolved.spec,
        assumptions=(*resolved.assumptions, *filter(None, [contradicted]), *_left_out(path)),
        task=next((one.task for _origin, one in told if one.task is not None), None),
        names=tuple((origin, one.labels) for origin, one in told if one.labels) or tuple(_names_beside(path)),
        is_size_assumed="crop_px" in guessed and config.preprocess.crop_px is None,
    )


def _documents(path: Path, model: ir.Model) -> Iterator[Section]:
    yield Section("the file's metadata", dict(model.metadata_props))
    for name in dict.fromkeys((f"{path.stem}.json", *_BESIDE)):
        if (document := read_beside(path.with_name(name))) is not None:
            yield document


def _fixed_px(image: ImageInput) -> tuple[int, int] | None:
    return (image.height_px, image.width_px) if image.height_px and image.width_px else None


def _merged(
    told: Sequence[tuple[str, Told]], image: ImageInput, *, is_whole: bool
) -> tuple[PreprocessSpec, dict[str, str]]:
    """What is told, over the usual values, at the file's size; and by field what tells it."""
    values: dict[str, Any] = {}
    tellers: dict[str, str] = {}
    for origin, one in told:
        for names in _TOGETHER:
            given = {name: one.values[name] for name in names if one.values.get(name) is not None}
            if given and tellers.keys().isdisjoint(names):
                values |= given
                tellers |= dict.fromkeys(given, origin)
    for name in {"mean", "std"} & values.keys():
        values[name] = values[name] * (image.channels if len(values[name]) == 1 else 1)
    if image.channels not in _COLORED:
        values.pop("channel_order", None)
        tellers.pop("channel_order", None)
    fixed_px = _fixed_px(image)
    crop_px = values.setdefault("crop_px", fixed_px or IMAGENET_PREPROCESS.input_px)
    # Of an oblong input nothing is cut off: its classes need not be about the middle.
    is_cropped = crop_px[0] == crop_px[1] and not is_whole
    usual = scaled_resize(IMAGENET_PREPROCESS, crop_px) if is_cropped else crop_px
    values.setdefault("resize_px", usual)
    try:
        base = dataclasses.replace(IMAGENET_PREPROCESS, **values)
        if fixed_px is not None and fixed_px != crop_px:
            resize_px = fixed_px if base.letterbox else scaled_resize(base, fixed_px)
            base = dataclasses.replace(base, resize_px=resize_px, crop_px=fixed_px)
    except ValueError as error:
        raise ModelLoadError(f"{' and '.join(dict.fromkeys(tellers.values()))}: {error}") from error
    return base, tellers


def _with_inside(
    base: PreprocessSpec, tellers: Mapping[str, str], model: ir.Model, image: ImageInput
) -> tuple[PreprocessSpec, dict[str, str]]:
    """What is told, less normalisation that the graph does itself, whatever documents say of the network in it."""
    inside = find_inside(model, image, base.input_px)
    if image.value.dtype is ir.DataType.UINT8:
        teller, highest = "the file's input, which is of bytes,", 255.0
    elif inside is not None and not inside.is_nothing:
        teller, highest = f"what the file does to its input first ({inside.in_words})", inside.highest
    else:
        return base, dict(tellers)
    found = dict.fromkeys(("mean", "std", "scale"), teller)
    base = dataclasses.replace(base, mean=(0.0,) * image.channels, std=(1.0,) * image.channels, scale=highest)
    if inside is not None and inside.is_bgr and "channel_order" not in tellers:
        base = dataclasses.replace(base, channel_order=ChannelOrder.BGR)
        found["channel_order"] = teller
    return base, {**tellers, **found}


def _check_image(image: ImageInput, changes: PreprocessConfig) -> None:
    if max(image.height_px, image.width_px) > LONGEST_PX:
        raise ModelLoadError(
            f"the file's input {image.value.name!r} is of {image.height_px} x {image.width_px} px: "
            f"sides are limited to {LONGEST_PX}"
        )
    if given_channels(changes) not in {0, image.channels}:
        raise ModelLoadError(
            f"preprocess: values are for {given_channels(changes)} channels, and the file's input has {image.channels}"
        )


def _check_input(spec: PreprocessSpec, image: ImageInput) -> None:
    """Check that the file takes what images become.

    Raises:
        ModelLoadError: it does not.
    """
    fixed_px = _fixed_px(image)
    if fixed_px is not None and spec.crop_px != fixed_px:
        raise ModelLoadError(f"preprocess: crop_px is {spec.crop_px}, and the file's input is of {fixed_px} px")
    are_bytes = spec.scale == 255.0 and not any(spec.mean) and set(spec.std) == {1.0}
    if image.value.dtype is ir.DataType.UINT8 and not are_bytes:
        raise ModelLoadError("preprocess: the file's input is of bytes: mean, std and scale must be 0, 1 and 255")


def _names_beside(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    beside = path.with_name(_NAMES_BESIDE)
    if beside.is_file() and beside.stat().st_size <= MAX_BYTES:
        yield f"{beside.name!r} beside it", read_labels(beside, 0)


def _left_out(path: Path) -> Iterator[str]:
    for name in _BESIDE:
        if name.endswith(".yml") and path.with_name(name).is_file() and not can_read_yaml():
            yield f"{name!r} is not read, as PyYAML is not installed: set in [models.preprocess] what it says."
