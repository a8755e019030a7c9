"""What networks themselves say about how images become their input: timm's, and those that tell their image's size."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from heatlens_server.backends.onnx.source.hub import timm_resize
from heatlens_server.backends.torch.sources.source import triple
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec

_SIZES = frozenset({"resize_px", "crop_px", "max_side_px"})
_VALUES = frozenset({"mean", "std", "interpolation"})

_CONFIGURATIONS = ("pretrained_cfg", "default_cfg")
_RGB_CHANNELS = 3
_LONGEST_PX = 8192


@dataclasses.dataclass(frozen=True, slots=True)
class OwnPreprocess:
    """What is known about the input of a network that comes without a word about it.

    Attributes:
        spec: the values.
        guessed: names of the spec's fields that the network does not tell.
        told_by: where the network tells the others; empty if it tells nothing.
    """

    spec: PreprocessSpec
    guessed: frozenset[str]
    told_by: str = ""


def own_preprocess(module: nn.Module, usual: PreprocessSpec) -> OwnPreprocess:
    """Ask a network, and the networks in it, how images become its input.

    The `pretrained_cfg` or `default_cfg` of timm's networks has everything. An `image_size`, of the network or of its
    `config` as in transformers, is the size alone: there, mean and std are in a file that is no part of the network.

    Args:
        module: the network.
        usual: what is taken where it does not tell; without a crop, images of any size are kept so.
    """
    for child in module.modules():
        for name in _CONFIGURATIONS:
            configuration = getattr(child, name, None)
            if isinstance(configuration, Mapping) and "mean" in configuration:
                spec = timm_preprocess(child, configuration)
                if spec is not None:
                    return _of_configuration(spec, usual, name)
    if usual.crop_px is not None:
        for child in module.modules():
            for owner, origin in ((getattr(child, "config", None), "config.image_size"), (child, "image_size")):
                size_px = _size_of(getattr(owner, "image_size", None))
                if size_px is not None:
                    spec = dataclasses.replace(usual, resize_px=size_px, crop_px=size_px)
                    return OwnPreprocess(spec, _VALUES, origin)
    return OwnPreprocess(usual, _VALUES | _SIZES)


def timm_preprocess(module: nn.Module, configuration: Mapping[str, Any]) -> PreprocessSpec | None:
    """Return timm's evaluation transform as a spec; None for padded (crop_mode "border") and oblong inputs.

    Args:
        module: the network. A vision transformer of another size than its configuration's tells so.
        configuration: its `pretrained_cfg`.
    """
    from timm.data.config import resolve_data_config  # noqa: PLC0415 - takes seconds

    data: dict[str, Any] = resolve_data_config(pretrained_cfg=configuration)  # type: ignore[no-untyped-call]
    channels, height_px, width_px = data["input_size"]
    if data["crop_mode"] == "border" or height_px != width_px or channels != _RGB_CHANNELS:
        return None
    made_for = _size_of(getattr(getattr(module, "patch_embed", None), "img_size", None))
    if made_for is not None and made_for[0] == made_for[1]:
        height_px, width_px = made_for
    return PreprocessSpec(
        resize_px=timm_resize(height_px, data["crop_pct"], is_squashed=data["crop_mode"] == "squash"),
        crop_px=(height_px, width_px),
        mean=triple(data["mean"]),
        std=triple(data["std"]),
        interpolation=Interpolation(data["interpolation"]),
    )


def _of_configuration(spec: PreprocessSpec, usual: PreprocessSpec, origin: str) -> OwnPreprocess:
    if usual.crop_px is not None:
        return OwnPreprocess(spec, frozenset(), origin)
    of_any_size = dataclasses.replace(usual, mean=spec.mean, std=spec.std, interpolation=spec.interpolation)
    return OwnPreprocess(of_any_size, _SIZES, origin)


def _size_of(value: object) -> tuple[int, int] | None:
    """(height, width), if a network's word for its image's size is one number or two."""
    sides = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    known = [side for side in sides if isinstance(side, int) and 1 <= side <= _LONGEST_PX]
    return (known[0], known[1]) if len(sides) == len(known) == 2 else None
