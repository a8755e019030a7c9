"""Files of the Hugging Face hub: our reading of them gives what transformers and timm themselves make of an image."""

import dataclasses
import json

import numpy as np
import pytest
import timm
import transformers
from PIL import Image
from skimage import data

from heatlens_server.backends.onnx.source.documents import Section, read_beside
from heatlens_server.backends.onnx.source.hub import of_timm, of_transformers, of_transformers_model
from heatlens_server.config import IMAGENET_PREPROCESS
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import ChannelOrder, Interpolation
from heatlens_server.core.tasks import Task
from heatlens_server.imaging.preprocess import fit, normalise

PHOTO = np.ascontiguousarray(data.astronaut()[:400, :400])


def spec_of(told):
    values = {name: value for name, value in told.values.items() if value is not None}
    for name in {"mean", "std"} & values.keys():
        values[name] = values[name] * (3 if len(values[name]) == 1 else 1)
    return dataclasses.replace(IMAGENET_PREPROCESS, **values)


def assert_same(spec, expected):
    found = normalise(fit(PHOTO, spec).pixels, spec)
    assert found.shape == expected.shape
    level = spec.scale / 255 / min(spec.std)
    # Resizing rounds by a level or two.
    assert np.abs(found - expected).max() < 2.1 * level
    assert np.abs(found - expected).mean() < 0.02 * level


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTImageProcessor", {}),
        ("DeiTImageProcessor", {}),
        ("BeitImageProcessor", {}),
        ("CLIPImageProcessor", {}),
        ("MobileNetV2ImageProcessor", {}),
        ("SegformerImageProcessor", {}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
        ("ConvNextImageProcessor", {}),
        ("PoolFormerImageProcessor", {}),
        ("LevitImageProcessor", {}),
        ("EfficientNetImageProcessor", {}),
        ("EfficientNetImageProcessor", {"rescale_offset": True, "include_top": False, "rescale_factor": 1 / 127.5}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 288}}),
        ("ViTImageProcessor", {"do_normalize": False, "resample": 3}),
        ("ViTImageProcessor", {"do_rescale": False, "image_mean": [127.0] * 3, "image_std": [50.0] * 3}),
    ],
)
def test_what_processors_of_transformers_do(tmp_path, name, options):
    processor = getattr(transformers, name)(**options)
    processor.save_pretrained(tmp_path)
    told = of_transformers(read_beside(tmp_path / "preprocessor_config.json"))
    expected = processor(Image.fromarray(PHOTO), return_tensors="np")["pixel_values"][0]
    assert_same(spec_of(told), np.asarray(expected))


@pytest.mark.parametrize(
    ("size", "more", "expected"),
    [
        (224, {}, {"resize_px": (224, 224), "crop_px": (224, 224)}),
        (256, {"do_center_crop": True, "crop_size": 224}, {"resize_px": 256, "crop_px": (224, 224)}),
        (224, {"crop_pct": 0.875}, {"resize_px": 256, "crop_px": (224, 224)}),
        # A crop that is larger than what is resized pads, and inputs of many sizes have no crop: nothing is told.
        ({"shortest_edge": 224}, {"do_center_crop": True, "crop_size": 256}, {}),
        ({"shortest_edge": 224}, {}, {}),
        ({"longest_edge": 1333}, {}, {}),
    ],
)
def test_sizes_of_older_files(size, more, expected):
    told = of_transformers(Section("x", {"image_processor_type": "X", "size": size, **more}))
    sizes = {key: told.values[key] for key in ("resize_px", "crop_px") if told.values.get(key) is not None}
    assert sizes == expected


def test_the_configuration_of_a_transformers_model(tmp_path):
    config = transformers.ViTConfig(
        image_size=64, id2label={0: "cat", 1: "dog"}, problem_type="multi_label_classification"
    )
    config.save_pretrained(tmp_path)
    told = of_transformers_model(read_beside(tmp_path / "config.json"))
    assert (told.labels, told.task) == (("cat", "dog"), Task.MULTI_LABEL)
    assert told.values == {"resize_px": (64, 64), "crop_px": (64, 64)}


def test_names_that_were_not_given_are_none_and_the_head_tells_the_task():
    told = of_transformers_model(
        Section("x", {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "architectures": ["ViTForImageClassification"]})
    )
    assert (told.labels, told.task) == ((), Task.CLASSIFICATION)


@pytest.mark.parametrize(
    "name", ["resnet50.a1_in1k", "vit_tiny_patch16_224", "tf_efficientnet_lite0", "beit_base_patch16_224"]
)
def test_what_timm_does(tmp_path, name):
    configuration = timm.get_pretrained_cfg(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architecture": "x", "pretrained_cfg": configuration.to_dict()}))
    told = of_timm(read_beside(path))
    resolved = timm.data.resolve_data_config(pretrained_cfg=configuration.to_dict())
    expected = timm.data.create_transform(**resolved)(Image.fromarray(PHOTO))
    assert_same(spec_of(told), expected.numpy())
    # Older files have the keys at the top.
    assert of_timm(Section("x", configuration.to_dict())).values == told.values


def test_timms_names_modes_and_defaults():
    values = {
        "pretrained_cfg": {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "squash"},
        "label_names": ["n1", "n2"],
        "label_descriptions": {"n1": "tench, Tinca tinca"},
    }
    told = of_timm(Section("x", values))
    assert told.labels == ("tench", "n2")
    assert (told.values["resize_px"], told.values["crop_px"]) == ((109, 109), (96, 96))
    assert told.values["interpolation"] is Interpolation.BICUBIC
    assert told.values["channel_order"] is ChannelOrder.RGB
    values["pretrained_cfg"]["crop_mode"] = "border"
    assert "resize_px" not in of_timm(Section("x", values)).values


@pytest.mark.parametrize(
    ("read", "values", "what"),
    [
        (of_timm, {"mean": [1], "input_size": [3, 224]}, r"input_size must be \[channels"),
        (
            of_timm,
            {"pretrained_cfg": {"mean": [1], "input_size": [3, 8, 8], "crop_pct": 0}},
            r"pretrained_cfg.crop_pct",
        ),
        (of_timm, {"mean": "red", "input_size": [3, 8, 8]}, "mean cannot be read"),
        (of_transformers, {"image_mean": {}}, "image_mean must be finite numbers"),
        (of_transformers, {"image_mean": [1], "size": {"height": 1e8, "width": 2}}, "size.height must be a size"),
        (of_transformers, {"image_mean": [1], "size": {"shortest_edge": 8}, "crop_pct": 2}, "crop_pct must be in"),
        (of_transformers_model, {"id2label": {"x": "y"}}, "id2label must be the names"),
    ],
)
def test_wrong_files_are_refused_by_their_key(read, values, what):
    with pytest.raises(ModelLoadError, match=f"^'config.json': {what}"):
        read(Section("'config.json'", values))
