"""What the Hugging Face hub's files say about a model: timm's `config.json`, and those of transformers."""

import math
from collections.abc import Mapping

from heatlens_server.backends.onnx.source.documents import Section, Told
from heatlens_server.config import IMAGENET_PREPROCESS
from heatlens_server.core.preprocess import ChannelOrder, Interpolation
from heatlens_server.core.tasks import Task

_HIGHEST = 255.0

_LEVIT_RESIZE = 256 / 224
_NEVER_CROPPED_PX = 384
"""ConvNeXt's processor resizes to sizes from this one on without cropping."""

_TASKS = {
    "single_label_classification": Task.CLASSIFICATION,
    "multi_label_classification": Task.MULTI_LABEL,
    "regression": Task.REGRESSION,
}
_HEADS = {
    "ForImageClassification": Task.CLASSIFICATION,
    "ForSemanticSegmentation": Task.SEGMENTATION,
    "ForObjectDetection": Task.DETECTION,
}


def of_timm(document: Section) -> Told:
    """Timm's `pretrained_cfg`, or the same keys at the top as in older files; `label_names` as on the Hugging Face hub.

    Defaults are those of timm.data.resolve_data_config.
    """
    configuration = document.section("pretrained_cfg") if "pretrained_cfg" in document else document
    if configuration is None or not {"input_size", "mean"} <= configuration.values.keys():
        return Told()
    channels_and_size = configuration.numbers("input_size") or ()
    if len(channels_and_size) != 3:
        raise configuration.wrong("input_size", "must be [channels, height, width]")
    height_px, width_px = configuration.as_size_px("input_size", channels_and_size[1:])
    crop_fraction = configuration.fraction("crop_pct") or 0.875
    values: dict[str, object] = {
        "mean": configuration.numbers("mean") or IMAGENET_PREPROCESS.mean,
        "std": configuration.numbers("std") or IMAGENET_PREPROCESS.std,
        "scale": 1.0,
        "interpolation": configuration.interpolation("interpolation") or Interpolation.BICUBIC,
        "channel_order": ChannelOrder.RGB,
    }
    mode = configuration.text("crop_mode")
    # "border" pads in a way that a PreprocessSpec cannot express.
    if mode != "border" and height_px == width_px:
        values |= {
            "resize_px": timm_resize(height_px, crop_fraction, is_squashed=mode == "squash"),
            "crop_px": (height_px, width_px),
        }
    labels, described = document.labels("label_names"), document.section("label_descriptions")
    if described is not None:
        # "tabby, tabby cat": synonyms of one class; the first is the usual name, as in torchvision.
        labels = tuple(str(described.values.get(label, label)).split(",", maxsplit=1)[0] for label in labels)
    return Told(values, labels)


def timm_resize(crop_px: int, crop_fraction: float, *, is_squashed: bool) -> int | tuple[int, int]:
    """What timm resizes images to before it crops a square (timm.data.transforms_factory.transforms_imagenet_eval).

    Args:
        crop_px: the side of the crop.
        crop_fraction: timm's `crop_pct`.
        is_squashed: whether images lose their proportions.
    """
    scaled_px = math.floor(crop_px / crop_fraction)
    return (scaled_px, scaled_px) if is_squashed else scaled_px


def of_transformers(document: Section) -> Told:
    """`preprocessor_config.json` of transformers: the image processors' attributes."""
    kind = document.text("image_processor_type") or document.text("feature_extractor_type")
    if not kind and "image_mean" not in document:
        return Told()
    mean, std = document.numbers("image_mean"), document.numbers("image_std")
    # The one processor without normalisation, which keeps the values of its base class.
    is_normalised = document.flag("do_normalize", default=not kind.startswith("MobileViT"))
    if mean is None or std is None or not is_normalised:
        mean, std = (0.0,), (1.0,)
    factor = document.number("rescale_factor") if document.flag("do_rescale", default=True) else 1.0
    scale = 1.0 if factor is None else _HIGHEST * factor
    if document.flag("rescale_offset"):
        mean = tuple(value + 1.0 for value in mean)
    if document.flag("include_top"):
        # EfficientNet's processor then divides by std once more.
        std = tuple(value**2 for value in std)
    values: dict[str, object] = {
        "mean": mean,
        "std": std,
        # 255 * 0.00392156862745098 is a little off 1.
        "scale": round(scale, 9),
        "interpolation": document.interpolation("resample"),
        "channel_order": ChannelOrder.BGR if document.flag("do_flip_channel_order") else ChannelOrder.RGB,
    }
    if document.flag("do_resize", default=True):
        values |= _transformers_sizes(document, kind)
    return Told(values)


def _transformers_sizes(document: Section, kind: str) -> dict[str, object]:
    crop_px = _height_and_width(document, "crop_size") if document.flag("do_center_crop") else None
    resize_px = exact_px = _height_and_width(document, "size")
    shorter_px = None
    if _is_section(document, "size"):
        size = document.section("size")
        shorter_px = size.size_px("shortest_edge") if size is not None else None
    elif crop_px is not None or "crop_pct" in document:
        # One number was the shorter side where a crop follows.
        shorter_px, resize_px = exact_px, None
    crop_fraction = document.fraction("crop_pct")
    if shorter_px is not None:
        side_px = shorter_px[0]
        if crop_fraction is not None and crop_px is None and side_px >= _NEVER_CROPPED_PX:
            return {"resize_px": shorter_px, "crop_px": shorter_px}
        if crop_fraction is not None or kind.startswith("Levit"):
            crop_px = crop_px or shorter_px
            side_px = int(side_px / crop_fraction if crop_fraction else side_px * _LEVIT_RESIZE)
        # Without a crop, inputs are of many sizes; a crop that is larger pads.
        return {"resize_px": side_px, "crop_px": crop_px} if crop_px and side_px >= max(crop_px) else {}
    return {"resize_px": resize_px, "crop_px": crop_px or resize_px}


def of_transformers_model(document: Section) -> Told:
    """`config.json` of transformers: `id2label`, `problem_type`, `architectures`, `image_size`."""
    if "id2label" not in document and "architectures" not in document:
        return Told()
    labels = document.labels("id2label")
    # The names of models that were given none.
    if labels == tuple(f"LABEL_{class_id}" for class_id in range(len(labels))):
        labels = ()
    architectures = document.values.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    heads = (task for name in names for head, task in _HEADS.items() if name.endswith(head))
    task = _TASKS.get(document.text("problem_type")) or next(heads, None)
    size_px = document.size_px("image_size")
    return Told({"resize_px": size_px, "crop_px": size_px}, labels, task)


def _is_section(section: Section, key: str) -> bool:
    return isinstance(section.values.get(key), Mapping)


def _height_and_width(section: Section, key: str) -> tuple[int, int] | None:
    """A size as transformers writes it: a number, a list, or a mapping with height and width."""
    if not _is_section(section, key):
        return section.size_px(key)
    size = section.section(key)
    if size is None or "height" not in size or "width" not in size:
        return None
    return size.as_size_px("height", (size.number("height") or 0, size.number("width") or 0))
