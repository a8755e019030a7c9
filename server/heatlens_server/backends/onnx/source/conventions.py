"""How tools write down a model's preprocessing, labels and task, in metadata or in files beside a model.

Each function reads one convention, and tells nothing of a document that does not follow it.
"""

import math
from collections.abc import Callable

from heatlens_server.backends.onnx.source.documents import Section, Told
from heatlens_server.backends.onnx.source.hub import of_timm, of_transformers, of_transformers_model
from heatlens_server.config import IMAGENET_PREPROCESS
from heatlens_server.core.preprocess import ChannelOrder, Interpolation
from heatlens_server.core.tasks import Task

_HIGHEST = 255.0


def of_heatlens(document: Section) -> Told:
    """`preprocess` in the configuration's words, and names of classes under the usual keys."""
    values: dict[str, object] = {}
    if (given := document.section("preprocess")) is not None:
        values = {
            "resize_px": given.shorter_or_exact_px("resize_px"),
            "crop_px": given.size_px("crop_px"),
            "mean": given.numbers("mean"),
            "std": given.numbers("std"),
            "scale": given.number("scale"),
            "interpolation": given.interpolation("interpolation"),
            "channel_order": given.choice("channel_order", {order.value: order for order in ChannelOrder}),
        }
    names = next(
        (key for key in ("labels", "classes", "class_names") if isinstance(document.values.get(key), list)), ""
    )
    return Told(values, document.labels(names))


def of_ultralytics(document: Section) -> Told:
    """Ultralytics' metadata: Python literals under `task`, `imgsz`, `names` (ultralytics/engine/exporter.py)."""
    if "names" not in document or not {"task", "imgsz", "stride"} & document.values.keys():
        return Told()
    size_px, task = document.size_px("imgsz"), document.text("task") if "task" in document else "detect"
    values: dict[str, object] = {
        "mean": (0.0,),
        "std": (1.0,),
        "scale": 1.0,
        "interpolation": Interpolation.BILINEAR,
        "channel_order": ChannelOrder.RGB,
    }
    if size_px is not None:
        # ultralytics.data.augment: classify_transforms crops the centre, LetterBox pads with gray.
        is_cropped = task == "classify"
        values["resize_px"] = size_px[0] if is_cropped and size_px[0] == size_px[1] else size_px
        values |= {"crop_px": size_px, "letterbox": not is_cropped}
    tasks = {"classify": Task.CLASSIFICATION, "detect": Task.DETECTION}
    return Told(values, document.labels("names"), tasks.get(task))


def of_paddle(document: Section) -> Told:
    """The metadata of Paddle's exports: `character`, one class a line."""
    lines = document.values.get("character")
    return Told(labels=tuple(lines.splitlines()) if isinstance(lines, str) else ())


_NOMINAL_RANGES = {
    # scale, mean and std, so that values are in the range.
    "nominalrange_0_255": (255.0, 0.0, 1.0),
    "normalized_0_1": (1.0, 0.0, 1.0),
    "normalized_1_1": (1.0, 0.5, 0.5),
    "nominalrange_16_235": (219.0, -16.0, 1.0),
}
"""By the lower-case value of Image.NominalPixelRange."""

_PIXEL_FORMATS = {
    **dict.fromkeys(("bgr8", "bgra8"), ChannelOrder.BGR),
    **dict.fromkeys(("rgb8", "rgba8"), ChannelOrder.RGB),
    "gray8": None,
    "gray16": None,
}


def of_image_metadata(document: Section) -> Told:
    """ONNX's metadata of images, `Image.BitmapPixelFormat` and `Image.NominalPixelRange`; Custom Vision's keys.

    https://onnx.ai/onnx/repo-docs/MetadataProps.html; keys and values are case insensitive.
    `Image.ColorSpaceGamma` is not read: images are taken as they are stored, which is sRGB.
    """
    entries = {str(key).lower(): value for key, value in document.values.items()}
    image = Section(document.origin, entries)
    vision = "customvision.preprocess."
    values: dict[str, object] = {}
    if (order := image.choice("image.bitmappixelformat", _PIXEL_FORMATS)) is not None:
        values["channel_order"] = order
    if (levels := image.choice("image.nominalpixelrange", _NOMINAL_RANGES)) is not None:
        scale, mean, std = levels
        means, stds = (
            image.numbers(f"{vision}normalizemean") or (0.0,),
            image.numbers(f"{vision}normalizestd") or (1.0,),
        )
        # Custom Vision's are of values in that range.
        values |= {
            "scale": scale,
            "mean": tuple(mean + std * value for value in means),
            "std": tuple(std * value for value in stds),
        }
    target = [image.number(f"{vision}target{side}") or 0 for side in ("height", "width")]
    crop = [image.number(f"{vision}crop{side}") or 0 for side in ("height", "width")]
    if all(target):
        target_px = image.as_size_px(f"{vision}targetheight", (*target,))
        is_cropped = all(crop)
        values["resize_px"] = min(target_px) if is_cropped else target_px
        values["crop_px"] = image.as_size_px(f"{vision}cropheight", (*crop,)) if is_cropped else target_px
    method = str(entries.get("customvision.postprocess.method", ""))
    tasks = {"ClassificationMultiClass": Task.CLASSIFICATION, "ClassificationMultiLabel": Task.MULTI_LABEL}
    return Told(values, task=tasks.get(method))


def of_openvino(document: Section) -> Told:
    """OpenVINO Training Extensions' metadata: `model_info mean_values`, for values of 0 to 255, as text with spaces.

    `reverse_input_channels` is not read: whether it is from RGB or from BGR depends on who reads images.
    """
    keys = {key: f"model_info {key}" for key in ("mean_values", "scale_values", "labels", "resize_type", "multilabel")}
    values: dict[str, object] = {}
    for name, key in (("mean", keys["mean_values"]), ("std", keys["scale_values"])):
        if document.text(key).strip() if key in document else "":
            try:
                values[name] = tuple(float(number) for number in document.text(key).split())
            except ValueError as error:
                raise document.wrong(key, "must be numbers with spaces between them") from error
    if values:
        values = {"mean": (0.0,), "std": (1.0,), "scale": _HIGHEST} | values
    labels = tuple(document.text(keys["labels"]).split()) if keys["labels"] in document else ()
    task = Task.MULTI_LABEL if document.flag(keys["multilabel"]) else None
    return Told(values, labels, task)


def of_paddle_inference(document: Section) -> Told:
    """PaddleClas' and PaddleX' `inference.yml`: `PreProcess.transform_ops`, `PostProcess.Topk.label_list`."""
    before, after = document.section("PreProcess"), document.section("PostProcess")
    values: dict[str, object] = {}
    for step in before.sections("transform_ops") if before is not None else ():
        if (resize := step.section("ResizeImage")) is not None:
            shorter_px, exact_px = resize.size_px("resize_short"), resize.size_px("size")
            # (width, height), as in OpenCV.
            values["resize_px"] = shorter_px[0] if shorter_px else exact_px and exact_px[::-1]
            values["interpolation"] = resize.interpolation("interpolation")
        if (crop := step.section("CropImage")) is not None and (crop_px := crop.size_px("size")) is not None:
            values["crop_px"] = crop_px[::-1]
        if (normalize := step.section("NormalizeImage")) is not None:
            factor = _paddle_factor(normalize)
            values |= {
                "mean": normalize.numbers("mean") or IMAGENET_PREPROCESS.mean,
                "std": normalize.numbers("std") or IMAGENET_PREPROCESS.std,
                "scale": round(_HIGHEST * factor, 9),
                "channel_order": ChannelOrder.RGB,
            }
    if isinstance(values.get("resize_px"), tuple):
        values.setdefault("crop_px", values["resize_px"])
    for name in ("Topk", "MultiLabelThreshOutput"):
        if after is not None and (last := after.section(name)) is not None:
            given = last.values.get("label_list")
            names = tuple(str(label) for label in given) if isinstance(given, list) else ()
            return Told(values, names, Task.CLASSIFICATION if name == "Topk" else Task.MULTI_LABEL)
    return Told(values)


def _paddle_factor(normalize: Section) -> float:
    """`scale`, which may be text: "1.0/255.0"."""
    parts = str(normalize.values.get("scale", f"1/{_HIGHEST}")).split("/")
    try:
        factor = float(parts[0]) / math.prod(float(part) for part in parts[1:])
    except (ValueError, ZeroDivisionError) as error:
        raise normalize.wrong("scale", "must be a number or a quotient") from error
    return factor


def of_mmdeploy(document: Section) -> Told:
    """MMDeploy's `pipeline.json`: the steps of the task `Preprocess`, for values of 0 to 255."""
    pipeline = document.section("pipeline")
    values: dict[str, object] = {}
    for task in pipeline.sections("tasks") if pipeline is not None else ():
        for step in task.sections("transforms"):
            kind = step.text("type")
            if kind == "Resize" and not step.flag("keep_ratio") and "size" in step:
                sides = step.numbers("size") or ()
                # [256, -1] is the shorter side.
                values["resize_px"] = int(sides[0]) if sides[-1] < 0 else step.size_px("size")
                values["interpolation"] = step.interpolation("interpolation")
            elif kind == "CenterCrop":
                values["crop_px"] = step.size_px("crop_size")
            elif kind == "Normalize":
                order = ChannelOrder.RGB if step.flag("to_rgb") else ChannelOrder.BGR
                values |= {"mean": step.numbers("mean"), "std": step.numbers("std"), "scale": _HIGHEST}
                values["channel_order"] = order
    if isinstance(values.get("resize_px"), tuple):
        values.setdefault("crop_px", values["resize_px"])
    return Told(values)


CONVENTIONS: tuple[Callable[[Section], Told], ...] = (
    of_heatlens,
    of_ultralytics,
    of_timm,
    of_transformers,
    of_transformers_model,
    of_image_metadata,
    of_openvino,
    of_paddle,
    of_paddle_inference,
    of_mmdeploy,
)
"""All of them, in the order of strength where a document follows several."""
