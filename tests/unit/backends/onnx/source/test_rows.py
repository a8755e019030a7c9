"""What operators tell of whether they mix the images of a batch."""

import onnx
import onnx.parser
import pytest
import torch
import torchvision

from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image
from heatlens_server.backends.onnx.gradient.values import know
from heatlens_server.backends.onnx.source.rows import keeps_images_apart
from onnx_files import write_onnx


def is_apart(tmp_path, body, shape="N, 4, 6, 6"):
    text = f'<ir_version: 10, opset_import: ["" : 20]> net (float[{shape}] x) => (float[n, m] y) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    model = read_file(tmp_path / "m.onnx")
    return keeps_images_apart(model, know(model, find_image(model).value, (4, 6, 6)))


END = "p = GlobalAveragePool(z) y = Flatten(p)"


@pytest.mark.parametrize(
    "body",
    [
        "z = Relu(x)",
        "z = Softmax <axis: int = 1> (x)",
        "z = Concat <axis: int = 1> (x, x)",
        "w = Constant <value: tensor = float[4, 1, 1] {1.0, 2.0, 3.0, 4.0}> () z = Mul(x, w)",
        "a = Constant <value: tensor = int64[2] {2, 3}> () m = ReduceMean(x, a) z = Sub(x, m)",
        "t = Transpose <perm: ints = [0, 2, 3, 1]> (x) z = Transpose <perm: ints = [0, 3, 1, 2]> (t)",
        "s = Constant <value: tensor = int64[4] {-1, 2, 12, 6}> () z = Reshape(x, s)",
        "z = MatMul(x, x)",
    ],
)
def test_operators_that_keep_images_apart(tmp_path, body):
    assert is_apart(tmp_path, f"{body} {END}")


@pytest.mark.parametrize(
    "body",
    [
        "a = Constant <value: tensor = int64[1] {0}> () m = ReduceMean(x, a) z = Sub(x, m)",
        "z = Softmax <axis: int = 0> (x)",
        "t = Transpose <perm: ints = [1, 0, 2, 3]> (x) r = Relu(t) z = Transpose <perm: ints = [1, 0, 2, 3]> (r)",
        "a = Constant <value: tensor = int64[1] {0}> () z = CumSum(x, a)",
        "s = Shape <end: int = 1> (x) f = Cast <to: int = 1> (s) z = Div(x, f)",
    ],
)
def test_operators_that_mix_images_or_do_not_tell(tmp_path, body):
    assert not is_apart(tmp_path, f"{body} {END}")


def test_batch_normalisation_in_training_mixes_images(tmp_path):
    four = "float[4] {1.0, 1.0, 1.0, 1.0}"
    for mode, apart in ((0, True), (1, False)):
        body = f"""
            w = Constant <value: tensor = {four}> ()
            z{", m, v" if mode else ""} = BatchNormalization <training_mode: int = {mode}> (x, w, w, w, w)
        """
        assert is_apart(tmp_path, f"{body} {END}") == apart


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_convolutional_networks_need_no_trial(tmp_path, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.get_model(name)
    model = read_file(write_onnx(network, tmp_path / "m.onnx", shape=(1, 3, 64, 64)))
    assert keeps_images_apart(model, know(model, find_image(model).value, (3, 64, 64)))
