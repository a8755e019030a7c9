"""Files that move the pixels of their input before the first layer say so."""

import onnx
import pytest
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional

import tiny_models
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.config import ModelConfig
from onnx_files import write_onnx


class Prepared(nn.Module):
    """A network, and what is done to its input first."""

    def __init__(self, prepare):
        super().__init__()
        self.body, self.prepare = tiny_models.tiny(), prepare

    def forward(self, x):
        return self.body(self.prepare(x))


def told(path):
    loaded = load_file(path, ModelConfig(name="m", source=f"onnx:{path}"))
    return [sentence for sentence in loaded.assumptions if "before its first layer, and maps are laid" in sentence]


@pytest.mark.parametrize(
    ("prepare", "done"),
    [
        (lambda x: x.flip(-1), "mirrors"),
        (lambda x: (x.flip(2) - 0.5) * 4, "mirrors"),
        (lambda x: x.transpose(2, 3), "turns"),
        (lambda x: x.transpose(2, 3).flip(2), "turns"),
        (lambda x: x[:, :, 16:48, 16:48], "crops"),
        (lambda x: functional.interpolate(x[:, :, :32], scale_factor=(2.0, 1.0), mode="bilinear"), "crops"),
        (lambda x: functional.pad(x, (0, 32, 0, 32)), "pads"),
        (lambda x: functional.pad(x[:, :, 16:], (0, 0, 0, 16)), "crops and pads"),
    ],
)
def test_what_moves_pixels_is_said(tmp_path, prepare, done):
    (sentence,) = told(write_onnx(Prepared(prepare), tmp_path / "m.onnx"))
    assert sentence.startswith(f"The file {done} its input")


@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: (x / 255.0 - 0.5) / 0.25,
        lambda x: x[:, [2, 1, 0]],
        lambda x: functional.interpolate(x, scale_factor=2.0, mode="bilinear"),
        lambda x: functional.pad(x, (1, 1, 1, 1)),
        # Keras pads before it strides.
        lambda x: functional.pad(x, (0, 1, 0, 1)),
        lambda x: functional.pixel_unshuffle(x, 2)[:, :3],
        # What is left stays where it was.
        lambda x: functional.pad(x[:, :, 16:], (0, 0, 16, 0)),
        lambda x: x - x.mean((2, 3), keepdim=True),
    ],
)
def test_what_leaves_places_where_they_are_is_not(tmp_path, prepare):
    assert told(write_onnx(Prepared(prepare), tmp_path / "m.onnx")) == []


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_it_is_so_for_bytes_with_channels_last(tmp_path, is_mirrored):
    def prepare(x):
        planes = x.permute(0, 3, 1, 2) / 255
        return planes.flip(3) if is_mirrored else planes

    model = onnx.load(write_onnx(Prepared(prepare), tmp_path / "m.onnx", shape=(1, 64, 64, 3)))
    for node in model.graph.node:
        node.input[:] = ["floats" if name == "image" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.save(model, tmp_path / "bytes.onnx")
    assert [sentence.split()[2] for sentence in told(tmp_path / "bytes.onnx")] == ["mirrors"] * is_mirrored
