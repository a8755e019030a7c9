"""Each tool's way to write down preprocessing, labels and task, as it is found in real files."""

import json

import pytest

from heatlens_server.backends.onnx.source.conventions import (
    CONVENTIONS,
    of_heatlens,
    of_image_metadata,
    of_mmdeploy,
    of_openvino,
    of_paddle,
    of_paddle_inference,
    of_ultralytics,
)
from heatlens_server.backends.onnx.source.documents import Section, Told, read_beside
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import ChannelOrder, Interpolation
from heatlens_server.core.tasks import Task


def told(read, values):
    return read(Section("the file's metadata", values))


def without_none(values):
    return {name: value for name, value in values.items() if value is not None}


ULTRALYTICS = {
    "description": "Ultralytics YOLOv8n-cls model trained on imagenet.yaml",
    "stride": "1",
    "task": "classify",
    "batch": "1",
    "imgsz": "[224, 224]",
    "names": "{0: 'tench', 1: \"Granny's apple\"}",
    "channels": "3",
}


def test_ultralytics_classifier():
    found = told(of_ultralytics, ULTRALYTICS)
    assert (found.labels, found.task) == (("tench", "Granny's apple"), Task.CLASSIFICATION)
    assert found.values == {
        "mean": (0.0,),
        "std": (1.0,),
        "scale": 1.0,
        "interpolation": Interpolation.BILINEAR,
        "channel_order": ChannelOrder.RGB,
        "resize_px": 224,
        "crop_px": (224, 224),
        "letterbox": False,
    }


def test_ultralytics_detector():
    found = told(of_ultralytics, {**ULTRALYTICS, "task": "detect", "imgsz": "[480, 640]"})
    assert found.task is Task.DETECTION
    assert (found.values["resize_px"], found.values["crop_px"], found.values["letterbox"]) == (
        (480, 640),
        (480, 640),
        True,
    )


def test_the_configurations_own_words():
    values = {
        "preprocess": {
            "resize_px": 40, "crop_px": 32, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "channel_order": "bgr",
            "interpolation": "nearest",
        },
        "labels": ["a", "b"],
    }  # fmt: skip
    found = told(of_heatlens, values)
    assert found.labels == ("a", "b")
    assert without_none(found.values) == {
        "resize_px": 40,
        "crop_px": (32, 32),
        "mean": (0.1, 0.2, 0.3),
        "std": (1.0, 1.0, 1.0),
        "channel_order": ChannelOrder.BGR,
        "interpolation": Interpolation.NEAREST,
    }
    assert told(of_heatlens, {"preprocess": {"resize_px": [40, 50]}}).values["resize_px"] == (40, 50)


@pytest.mark.parametrize(
    ("levels", "scale", "mean", "std"),
    [
        ("NominalRange_0_255", 255.0, (0.0,), (1.0,)),
        ("Normalized_0_1", 1.0, (0.0,), (1.0,)),
        ("normalized_1_1", 1.0, (0.5,), (0.5,)),
        ("NominalRange_16_235", 219.0, (-16.0,), (1.0,)),
    ],
)
def test_metadata_of_images(levels, scale, mean, std):
    found = told(of_image_metadata, {"Image.BitmapPixelFormat": "Bgr8", "Image.NominalPixelRange": levels})
    assert found.values == {"channel_order": ChannelOrder.BGR, "scale": scale, "mean": mean, "std": std}


CUSTOM_VISION = {
    "CustomVision.Metadata.Version": "1.1",
    "CustomVision.Postprocess.Method": "ClassificationMultiLabel",
    "CustomVision.Postprocess.Yolo.Biases": "null",
    "CustomVision.Preprocess.CropHeight": "0",
    "CustomVision.Preprocess.CropMethod": "FullImageShorterSide",
    "CustomVision.Preprocess.CropWidth": "0",
    "CustomVision.Preprocess.NormalizeMean": "[0.0, 0.0, 0.0]",
    "CustomVision.Preprocess.NormalizeStd": "[1.0, 1.0, 1.0]",
    "CustomVision.Preprocess.ResizeMethod": "ByShorterSideAlign32",
    "CustomVision.Preprocess.TargetHeight": "224",
    "CustomVision.Preprocess.TargetWidth": "224",
    "Image.BitmapPixelFormat": "Rgb8",
    "Image.ColorSpaceGamma": "SRGB",
    "Image.NominalPixelRange": "Normalized_0_1",
}


def test_custom_vision():
    found = told(of_image_metadata, CUSTOM_VISION)
    assert found.task is Task.MULTI_LABEL
    assert found.values == {
        "channel_order": ChannelOrder.RGB,
        "scale": 1.0,
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "resize_px": (224, 224),
        "crop_px": (224, 224),
    }
    cropped = {
        **CUSTOM_VISION,
        "CustomVision.Preprocess.TargetHeight": "256",
        "CustomVision.Preprocess.TargetWidth": "256",
        "CustomVision.Preprocess.CropHeight": "224",
        "CustomVision.Preprocess.CropWidth": "224",
        "CustomVision.Preprocess.NormalizeMean": "[123.0, 117.0, 104.0]",
        "Image.NominalPixelRange": "NominalRange_0_255",
    }
    found = told(of_image_metadata, cropped)
    assert (found.values["resize_px"], found.values["crop_px"]) == (256, (224, 224))
    assert (found.values["scale"], found.values["mean"]) == (255.0, (123.0, 117.0, 104.0))


def test_openvino_training_extensions():
    values = {
        "model_info mean_values": "123.675 116.28 103.53",
        "model_info scale_values": "58.395 57.12 57.375",
        "model_info labels": "cat dog",
        "model_info multilabel": "True",
        "model_info resize_type": "standard",
    }
    found = told(of_openvino, values)
    assert found.values == {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375), "scale": 255.0}
    assert (found.labels, found.task) == (("cat", "dog"), Task.MULTI_LABEL)


def test_paddles_metadata():
    assert told(of_paddle, {"character": "0\n90\n180\n270"}).labels == ("0", "90", "180", "270")


INFERENCE = """
Global:
  model_name: PP-LCNet_x1_0_doc_ori
PreProcess:
  transform_ops:
  - ResizeImage:
      resize_short: 256
      interpolation: bicubic
  - CropImage:
      size: 224
  - NormalizeImage:
      channel_num: 3
      mean: [0.485, 0.456, 0.406]
      order: ''
      scale: 1.0/255.0
      std: [0.229, 0.224, 0.225]
  - ToCHWImage: null
PostProcess:
  Topk:
    topk: 5
    label_list:
    - '0'
    - 90
"""


def test_paddles_inference_file(tmp_path):
    (tmp_path / "inference.yml").write_text(INFERENCE)
    found = of_paddle_inference(read_beside(tmp_path / "inference.yml"))
    assert (found.labels, found.task) == (("0", "90"), Task.CLASSIFICATION)
    assert found.values == {
        "resize_px": 256,
        "interpolation": Interpolation.BICUBIC,
        "crop_px": (224, 224),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "scale": 1.0,
        "channel_order": ChannelOrder.RGB,
    }


def test_paddles_exact_size_is_width_first():
    steps = [{"ResizeImage": {"size": [192, 48]}}, {"NormalizeImage": {"mean": 0.5, "std": 0.5, "scale": 0.00390625}}]
    found = told(of_paddle_inference, {"PreProcess": {"transform_ops": steps}})
    assert (found.values["resize_px"], found.values["crop_px"]) == ((48, 192), (48, 192))
    assert found.values["scale"] == 255 / 256


def test_mmdeploys_pipeline():
    steps = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "size": [256, -1], "backend": "pillow", "interpolation": "bilinear"},
        {"type": "CenterCrop", "crop_size": 224},
        {"type": "Normalize", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True},
        {"type": "ImageToTensor", "keys": ["img"]},
    ]
    task = {"type": "Task", "module": "Transform", "name": "Preprocess", "transforms": steps}
    found = told(of_mmdeploy, {"pipeline": {"input": ["img"], "tasks": [task, {"module": "Net"}]}})
    assert found.values == {
        "resize_px": 256,
        "interpolation": Interpolation.BILINEAR,
        "crop_px": (224, 224),
        "mean": (123.675, 116.28, 103.53),
        "std": (58.395, 57.12, 57.375),
        "scale": 255.0,
        "channel_order": ChannelOrder.RGB,
    }


@pytest.mark.parametrize("values", [{}, {"a": 1}, {"labels": "labels.txt"}, {"names": ["x"]}, {"model": {"b": [2]}}])
def test_documents_of_other_kinds_tell_nothing(values):
    for read in CONVENTIONS:
        found = told(read, values)
        assert (without_none(found.values), found.labels, found.task) == ({}, (), None)
    assert told(of_heatlens, {}) == Told()


@pytest.mark.parametrize(
    ("read", "values", "what"),
    [
        (of_ultralytics, {**ULTRALYTICS, "names": "{0: open('x')}"}, "names cannot be read"),
        (of_ultralytics, {**ULTRALYTICS, "imgsz": "[224, 0]"}, "imgsz must be a size"),
        (of_image_metadata, {"Image.BitmapPixelFormat": "Yuv"}, "image.bitmappixelformat must be one of"),
        (of_openvino, {"model_info mean_values": "1 b"}, "model_info mean_values must be numbers"),
        (of_paddle_inference, {"PreProcess": {"transform_ops": [{"NormalizeImage": {"scale": "1/0"}}]}},
         r"PreProcess.transform_ops\[0\].NormalizeImage.scale must be a number"),
        (of_mmdeploy, {"pipeline": []}, "pipeline must be a mapping"),
        (of_heatlens, {"preprocess": {"mean": json.dumps("x")}}, "preprocess.mean must be finite numbers"),
        (of_heatlens, {"preprocess": {"channel_order": "gbr"}}, "preprocess.channel_order must be one of rgb, bgr"),
    ],
)  # fmt: skip
def test_wrong_entries_are_refused_by_their_key(read, values, what):
    with pytest.raises(ModelLoadError, match=f"^the file's metadata: {what}"):
        told(read, values)
