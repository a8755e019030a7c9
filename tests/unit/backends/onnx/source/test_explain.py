"""The explaining graph gives what the engine gives, which the contract of engines judges in float64."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import tiny_models
from heatlens_server.backends.onnx.gradient.tape import NotDifferentiable
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.source.explain import explaining_model
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.graph_spec import GraphSpec, InputKind, Output
from heatlens_server.core.methods import CLOSED_FORMS, Method, Score
from heatlens_server.core.targets import TopK
from loaded_models import noise
from onnx_files import write_onnx

IMAGES = noise(3)


class Tokens(nn.Module):
    """A transformer of one block behind a patch embedding, with a class token."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.block(tokens)[:, 0])


def seeded(factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return factory().eval()


def one_output():
    module = tiny_models.tiny_mlp()
    module.head[-1] = nn.Linear(32, 1)
    return module


NETWORKS = {"tiny": tiny_models.tiny, "mlp": tiny_models.tiny_mlp, "tokens": Tokens, "binary": one_output}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        name: load_file(
            write_onnx(seeded(factory), folder / f"{name}.onnx"),
            ModelConfig(
                name="m", source=f"onnx:{folder / name}.onnx", preprocess={"mean": [0.4], "std": [0.2], "crop_px": 64}
            ),
        )
        for name, factory in NETWORKS.items()
    }


def run(loaded, spec, count):
    proto = ir.to_proto(explaining_model(loaded, spec))
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    engine = NetworkEngine(loaded, device="cpu", threads=1)
    image = IMAGES.transpose(0, 3, 1, 2) if spec.input is InputKind.UINT8 else engine.planes(IMAGES)
    feeds = {"image": np.ascontiguousarray(image), "class_index": np.full((len(IMAGES), count), -1)}
    names = [output.name for output in session.get_outputs()]
    assert names == list(spec.outputs)
    map_spec = MapSpec(spec.method, (spec.layer,), upsample=False, score=spec.score)
    expected = engine.explain(IMAGES, [TopK(count)] * len(IMAGES), map_spec)
    return dict(zip(spec.outputs, session.run(None, feeds), strict=True)), expected


def check(found, expected):
    for n, result in enumerate(expected):
        np.testing.assert_allclose(found[Output.LOGITS][n], result.logits, atol=1e-5)
        assert tuple(found[Output.CLASS_ID][n]) == result.class_ids
        np.testing.assert_allclose(found[Output.CAM][n], result.maps, atol=1e-4)
        np.testing.assert_allclose(found[Output.CAM_SCALE][n], result.scales, rtol=1e-3, atol=1e-7)
    assert any(result.maps.any() for result in expected)


@pytest.mark.parametrize("input_kind", InputKind)
@pytest.mark.parametrize(("classes", "count"), [(1, 1), (2, 2), (None, 1), (None, 2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_number_of_classes_from_either_input(files, name, classes, count, input_kind):
    loaded = files[name]
    for layer in loaded.info.layers:
        spec = GraphSpec(layer.name, Method.GRAD_CAM, classes, input=input_kind)
        found, expected = run(loaded, spec, count)
        check(found, expected)
        size = (layer.channels, layer.height, layer.width)
        assert found[Output.ACTIVATIONS].shape == (3, *size)
        assert found[Output.GRADIENTS].shape == (3, count, *size)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_every_closed_form(files, method):
    loaded = files["tiny"]
    check(*run(loaded, GraphSpec(loaded.info.layers[0].name, method, 2), 2))


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("name", ["mlp", "binary"])
def test_every_score(files, name, score):
    loaded = files[name]
    check(*run(loaded, GraphSpec(loaded.info.layers[0].name, Method.LAYER_CAM, None, score=score), 2))


def test_maps_of_activations_alone_need_no_backward_pass(files):
    loaded = files["tiny"]
    without = tuple(output for output in Output if output is not Output.GRADIENTS)
    spec = GraphSpec(loaded.info.layers[0].name, Method.EIGEN_CAM, outputs=without)
    check(*run(loaded, spec, 1))
    written = [node.name or "" for node in explaining_model(loaded, spec).graph]
    assert not any(name.startswith("gradient") for name in written)


def test_the_network_stays_as_it_is(files):
    loaded = files["mlp"]
    before = ir.to_proto(loaded.model).SerializeToString(deterministic=True)
    explaining_model(loaded, GraphSpec(loaded.info.layers[0].name, classes=None))
    assert ir.to_proto(loaded.model).SerializeToString(deterministic=True) == before


def test_a_file_that_was_traced_with_one_image_takes_any_number(files):
    """It says that it does, and its class token was repeated once."""
    assert files["tokens"].info.takes_batches


class TwoAxes(nn.Module):
    """Compares every image with every other: what its backward pass reads has the images on two axes."""

    def __init__(self):
        super().__init__()
        self.body = tiny_models.tiny()

    def forward(self, x):
        features = self.body.body(self.body.stem(x))
        pooled = features.mean((2, 3))
        return self.body.head(torch.softmax(pooled @ pooled.T, 1) @ pooled)


def test_what_cannot_be_repeated_for_several_classes_is_named(tmp_path):
    path = write_onnx(TwoAxes(), tmp_path / "m.onnx")
    loaded = load_file(path, ModelConfig(name="m", source=f"onnx:{path}"))
    assert not loaded.info.takes_batches
    with pytest.raises(NotDifferentiable, match="several axes"):
        explaining_model(loaded, GraphSpec(loaded.info.layers[0].name, classes=2))
