"""What is told of a file's preprocessing, labels and task: by whom, in which order, and what is assumed and said."""

import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image
from heatlens_server.backends.onnx.source.metadata import read_settings
from heatlens_server.config import IMAGENET_PREPROCESS, ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.preprocess import ChannelOrder, Interpolation
from heatlens_server.core.tasks import Task

RGB = (None, 3, 32, 32)


def network(shape=RGB, *, scaled_by=None, dtype=TensorProto.FLOAT, channels_last=False):
    """A file of five classes: an optional factor, a convolution, a mean."""
    channels = shape[3] if channels_last else shape[1]
    name, nodes = "image", []

    def then(operator, *inputs, **attributes):
        nonlocal name
        nodes.append(helper.make_node(operator, [name, *inputs], [f"v{len(nodes)}"], **attributes))
        name = f"v{len(nodes) - 1}"

    if dtype != TensorProto.FLOAT:
        then("Cast", to=TensorProto.FLOAT)
    if channels_last:
        then("Transpose", perm=[0, 3, 1, 2])
    if scaled_by is not None:
        then("Mul", "factor")
    then("Conv", "weights", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    then("ReduceMean", axes=[2, 3], keepdims=0)
    nodes[-1].output[0] = "logits"
    arrays = {"weights": np.ones((5, channels, 3, 3), np.float32), "factor": np.array(scaled_by or 1, np.float32)}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", dtype, ["n", *shape[1:]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def settings(folder, proto=None, *, metadata=None, beside=None, **config):
    proto = proto or network()
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, folder / "net.onnx")
    for name, content in (beside or {}).items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    model = read_file(folder / "net.onnx")
    config = ModelConfig(name="m", source="timm:resnet18", **config)
    found = read_settings(folder / "net.onnx", model, find_image(model), config)
    labels, about_labels = found.labels_for(5, config)
    return SimpleNamespace(
        preprocess=found.preprocess, labels=labels, assumptions=(*found.assumptions, *about_labels), task=found.task
    )


NAMES = ["a", "b", "c", "d", "e"]
YOLO = {"task": "classify", "imgsz": "[32, 32]", "names": str(dict(enumerate(NAMES)))}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "resample": 3,
}


def test_without_a_word_imagenets_values_are_assumed_and_said(tmp_path):
    found = settings(tmp_path)
    assert (found.preprocess.resize_px, found.preprocess.crop_px) == (37, (32, 32))
    assert (found.preprocess.mean, found.preprocess.std) == (IMAGENET_PREPROCESS.mean, IMAGENET_PREPROCESS.std)
    assert (found.labels, found.task) == ((), None)
    (said,) = found.assumptions
    assert said == (
        "Nothing tells how images become the network's input, so resize_px = 37, mean = [0.485, 0.456, 0.406], "
        'std = [0.229, 0.224, 0.225], interpolation = "bilinear", channel_order = "rgb", scale = 1.0 are assumed, as '
        "for ImageNet: set in [models.preprocess] what it was trained with."
    )


def test_the_size_that_a_file_leaves_open_is_assumed_too(tmp_path):
    found = settings(tmp_path, network((None, 3, "h", "w")))
    assert (found.preprocess.resize_px, found.preprocess.crop_px) == (256, (224, 224))
    assert "resize_px = 256, crop_px = [224, 224], mean" in found.assumptions[0]


def test_of_an_oblong_input_nothing_is_cut_off(tmp_path):
    found = settings(tmp_path, network((None, 3, 48, 192)))
    assert (found.preprocess.resize_px, found.preprocess.crop_px) == ((48, 192), (48, 192))


def test_a_gray_input(tmp_path):
    found = settings(tmp_path, network((None, 1, 28, 28)))
    assert (found.preprocess.mean, found.preprocess.std) == ((0.459,), (0.226,))
    assert any("mean = [0.459] and std = [0.226]" in said for said in found.assumptions)
    right = settings(tmp_path, network((None, 1, 28, 28)), metadata={"Image.NominalPixelRange": "Normalized_1_1"})
    assert (right.preprocess.mean, right.preprocess.std) == ((0.5,), (0.5,))
    # A colour's order is nothing for gray.
    gray = settings(tmp_path, network((None, 1, 28, 28)), metadata={"Image.BitmapPixelFormat": "Bgr8"})
    assert gray.preprocess.channel_order is ChannelOrder.RGB


def test_metadata_of_the_file_survives_and_is_said(tmp_path):
    found = settings(tmp_path, metadata=YOLO)
    assert (found.labels, found.task) == (tuple(NAMES), Task.CLASSIFICATION)
    assert (found.preprocess.resize_px, found.preprocess.mean, found.preprocess.std) == (32, (0.0,) * 3, (1.0,) * 3)
    assert found.assumptions[0] == (
        "The file's metadata gives resize_px = 32, crop_px = [32, 32], mean = [0.0, 0.0, 0.0], std = [1.0, 1.0, 1.0], "
        'interpolation = "bilinear", channel_order = "rgb", scale = 1.0, letterbox = false; [models.preprocess] '
        "overrides that."
    )
    assert found.assumptions[1:] == ("The classes' names are those of the file's metadata; labels overrides that.",)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [False, True])
def test_metadata_of_a_file_of_torchs_exporters(tmp_path, dynamo):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    path = tmp_path / "exported.onnx"
    torch.onnx.export(net, (torch.zeros(1, 3, 32, 32),), path, dynamo=dynamo, external_data=False, verbose=False)
    assert settings(tmp_path, onnx.load(path), metadata=YOLO).labels == tuple(NAMES)


def test_metadata_is_stronger_than_files_beside_and_they_fill_what_it_leaves_open(tmp_path):
    metadata = {"Image.BitmapPixelFormat": "Bgr8"}
    beside = {
        "net.json": {"labels": NAMES, "preprocess": {"resize_px": 40}},
        "preprocessor_config.json": PROCESSOR,
        "config.json": {"id2label": {"0": "other"}, "problem_type": "multi_label_classification"},
    }
    found = settings(tmp_path, metadata=metadata, beside=beside)
    assert found.preprocess.channel_order is ChannelOrder.BGR
    assert (found.preprocess.resize_px, found.preprocess.crop_px) == (40, (32, 32))
    assert (found.preprocess.mean, found.preprocess.std) == ((0.5,) * 3, (0.25,) * 3)
    assert found.preprocess.interpolation is Interpolation.BICUBIC
    assert (found.labels, found.task) == (tuple(NAMES), Task.MULTI_LABEL)
    assert not any("Nothing tells" in said for said in found.assumptions)
    for teller in ("The file's metadata gives channel_order", "'net.json' gives resize_px = 40;",
                   "'preprocessor_config.json' gives mean"):  # fmt: skip
        assert any(said.startswith(teller) for said in found.assumptions)


def test_the_configuration_is_the_strongest(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join("vwxyz"))
    changes = {"mean": [0.1], "std": [0.2], "resize_px": [32, 32], "interpolation": "lanczos", "channel_order": "bgr"}
    found = settings(tmp_path, metadata=YOLO, preprocess=changes, labels=tmp_path / "names.txt")
    assert (found.preprocess.mean, found.preprocess.std) == ((0.1,) * 3, (0.2,) * 3)
    assert (found.preprocess.resize_px, found.preprocess.channel_order) == ((32, 32), ChannelOrder.BGR)
    assert found.labels == tuple("vwxyz")
    assert not any("mean" in said or "names" in said for said in found.assumptions)


def test_the_files_own_size_wins_and_the_ratio_stays(tmp_path):
    configuration = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.875}
    found = settings(tmp_path, beside={"config.json": {"pretrained_cfg": configuration}})
    assert (found.preprocess.resize_px, found.preprocess.crop_px) == (37, (32, 32))


def test_a_letterbox_is_of_the_files_size(tmp_path):
    found = settings(tmp_path, metadata={**YOLO, "task": "detect", "imgsz": "[64, 64]"})
    assert found.preprocess.letterbox
    assert (found.preprocess.resize_px, found.preprocess.crop_px) == ((32, 32), (32, 32))


@pytest.mark.parametrize("beside", [{}, {"preprocessor_config.json": PROCESSOR}])
def test_normalisation_inside_is_not_done_twice(tmp_path, beside):
    found = settings(tmp_path, network(scaled_by=1 / 255), beside=beside)
    assert (found.preprocess.mean, found.preprocess.std, found.preprocess.scale) == ((0.0,) * 3, (1.0,) * 3, 255.0)
    said = " ".join(found.assumptions)
    assert "What the file does to its input first (times [0.0039, 0.0039, 0.0039], plus [0.0, 0.0, 0.0]) gives" in said
    assert "scale = 255.0" in said


def test_bytes(tmp_path):
    proto = network((None, 32, 32, 3), dtype=TensorProto.UINT8, channels_last=True)
    found = settings(tmp_path, proto, beside={"preprocessor_config.json": PROCESSOR})
    assert (found.preprocess.mean, found.preprocess.std, found.preprocess.scale) == ((0.0,) * 3, (1.0,) * 3, 255.0)
    with pytest.raises(ModelLoadError, match="input is of bytes: mean, std and scale must be 0, 1 and 255"):
        settings(tmp_path, network(dtype=TensorProto.UINT8), preprocess={"mean": [0.5]})


def test_names_of_another_number_are_left_out_and_that_is_said(tmp_path):
    found = settings(tmp_path, metadata={"character": "x\ny"}, beside={"labels.txt": "1\n2\n3\n4\n5\n"})
    assert found.labels == ()
    assert found.assumptions[-1] == (
        "The file has 5 classes, and the file's metadata names 2: they are left out; set labels."
    )


def test_names_beside(tmp_path):
    found = settings(tmp_path, beside={"labels.txt": "1\n2\n3\n4\n5\n"})
    assert found.labels == tuple("12345")
    assert found.assumptions[-1] == "The classes' names are those of 'labels.txt' beside it; labels overrides that."


def test_yaml_that_cannot_be_read_here_is_said(tmp_path, monkeypatch):
    beside = {"inference.yml": "PreProcess: {transform_ops: [{CropImage: {size: 8}}]}"}
    assert not any("PyYAML" in said for said in settings(tmp_path, beside=beside).assumptions)
    monkeypatch.setattr("heatlens_server.backends.onnx.source.documents.importlib.util.find_spec", lambda name: None)
    (said,) = [one for one in settings(tmp_path, beside=beside).assumptions if "PyYAML" in one]
    assert said.startswith("'inference.yml' is not read")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"preprocess": {"crop_px": 24}}, r"crop_px is \(24, 24\), and the file's input is of \(32, 32\) px"),
        ({"preprocess": {"channels": 1}}, "are for 1 channels, and the file's input has 3"),
        ({"preprocess": {"mean": [0, 0]}}, "are for 2 channels, and the file's input has 3"),
        ({"preprocess": {"resize_px": 16}}, "preprocess: resize_px"),
    ],
)
def test_what_the_configuration_says_must_fit_the_file(tmp_path, changes, what):
    with pytest.raises(ModelLoadError, match=what):
        settings(tmp_path, **changes)


@pytest.mark.parametrize(
    ("shape", "what"),
    [((None, 3, 9000, 32), "'image' is of 9000 x 32 px"), ((1 << 30, 3, 32, 32), "'image' is of 1073741824 images")],
)
def test_inputs_that_are_too_large_are_refused_before_anything_is_run(tmp_path, shape, what):
    proto = network(scaled_by=0.5, shape=(None, *shape[1:]))
    if shape[0]:
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = shape[0]
    with pytest.raises(ModelLoadError, match=what):
        settings(tmp_path, proto)


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({"beside": {"config.json": "{"}}, "^'config.json' cannot be read"),
        ({"beside": {"net.json": "[" * 1000}}, "^'net.json' cannot be read: it is nested"),
        ({"metadata": {**YOLO, "imgsz": "[0, 0]"}}, "^the file's metadata: imgsz must be a size"),
        ({"beside": {"preprocessor_config.json": {**PROCESSOR, "image_std": [0, 1, 1]}}},
         "^'preprocessor_config.json': mean and std must be finite, and std positive"),
        ({"beside": {"preprocessor_config.json": {**PROCESSOR, "rescale_factor": 0}}},
         "^'preprocessor_config.json': scale must be"),
        ({"beside": {"net.json": {"preprocess": {"resize_px": 16, "crop_px": 32}}}}, "^'net.json': resize_px"),
    ],
)  # fmt: skip
def test_hostile_documents_are_refused_by_their_names(tmp_path, told, what):
    with pytest.raises(ModelLoadError, match=what) as caught:
        settings(tmp_path, **told)
    assert str(tmp_path) not in str(caught.value)
