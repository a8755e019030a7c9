"""Files that were exported for a fixed number of images take any number, or are found to mix them."""

from functools import partial

import numpy as np
import onnx.parser
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from fixed_batch_networks import (
    PX,
    BatchStatistics,
    Centred,
    ChannelsLast,
    Compared,
    Confused,
    Coordinates,
    Dense,
    Excited,
    First,
    Grouped,
    Residual,
    Shuffled,
    Squeezed,
    TiledMask,
    Tokens,
    Untrained,
    Windows,
    export,
    images,
    seeded,
)
from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image
from heatlens_server.backends.onnx.gradient.tape import BATCH
from heatlens_server.backends.onnx.gradient.values import know, open_graph
from heatlens_server.backends.onnx.source.batch import free_batch, runs_in_batches

SequenceFirst = partial(Tokens, sequence_first=True)
CONVOLUTIONAL = (Residual, Dense, Shuffled, Excited, Coordinates, ChannelsLast, Grouped, Squeezed)
EXPORTS = [
    *((kind, opset, False) for kind in (*CONVOLUTIONAL, Windows, TiledMask) for opset in (11, 17)),
    # Of older opsets PyTorch cannot export these.
    *((kind, opset, False) for kind in (Tokens, SequenceFirst) for opset in (14, 17)),
    *((kind, 18, True) for kind in (Coordinates, Tokens)),
]


class Opened:
    """A file, and whether it takes and keeps apart any number of images."""

    def __init__(self, path, px=PX):
        self.model = read_file(path)
        image = find_image(self.model)
        self.image, self.shape = image.value, image.shape(px, px)
        self.is_free = free_batch(self.model, self.image, self.shape)

    def keeps_apart(self, outputs=None):
        return runs_in_batches(self.model, self.image, self.shape, outputs or self.model.graph.outputs)

    def run(self, batch):
        return open_graph(self.model).run(None, {self.image.name: np.asarray(batch)})[0]


@pytest.mark.parametrize(("kind", "opset", "dynamo"), EXPORTS)
def test_a_file_for_one_image_takes_any_number(tmp_path, kind, opset, dynamo):
    module = seeded(kind)
    opened = Opened(export(module, tmp_path / "model.onnx", opset=opset, dynamo=dynamo))
    assert opened.is_free
    assert opened.keeps_apart()
    for count in (1, 3, 4):
        batch = images(count, module)
        with torch.no_grad():
            expected = module(batch).reshape(count, -1).numpy()
        np.testing.assert_allclose(opened.run(batch), expected, atol=1e-5 * np.abs(expected).max())
    known = know(opened.model, opened.image, opened.shape)
    assert known.shapes[opened.model.graph.outputs[0]] == (BATCH, 5)
    assert opened.image.shape[0] == "batch"


@pytest.mark.parametrize("kind", [BatchStatistics, Centred, First])
def test_a_file_that_loses_images_is_not_freed(tmp_path, kind):
    assert not Opened(export(seeded(kind), tmp_path / "model.onnx")).is_free


@pytest.mark.parametrize("kind", [Compared, Confused])
def test_a_file_that_mixes_images_is_told(tmp_path, kind):
    opened = Opened(export(seeded(kind), tmp_path / "model.onnx"))
    assert opened.is_free
    assert not opened.keeps_apart()


def test_a_file_that_is_refused_stays_as_it_is(tmp_path):
    module = seeded(Centred)
    opened = Opened(export(module, tmp_path / "model.onnx"))
    assert not opened.is_free
    batch = images(1, module)
    with torch.no_grad():
        np.testing.assert_allclose(opened.run(batch), module(batch).numpy(), atol=1e-6)
    assert list(opened.image.shape) == [1, 3, PX, PX]


def test_a_file_for_several_images_takes_any_number(tmp_path):
    module = seeded(Windows)
    opened = Opened(export(module, tmp_path / "model.onnx", count=2))
    assert opened.is_free
    assert opened.keeps_apart()
    with torch.no_grad():
        np.testing.assert_allclose(opened.run(images(3, module)), module(images(3, module)).numpy(), atol=1e-6)


def test_entries_for_several_images_may_differ(tmp_path):
    """A constant of two entries in a file for two images: which one a third image has is not known."""
    assert not Opened(export(seeded(Coordinates), tmp_path / "model.onnx", count=2)).is_free


def test_one_scale_for_the_batch_is_no_batch(tmp_path):
    path = export(seeded(Residual), tmp_path / "float.onnx")
    quantize_dynamic(path, tmp_path / "model.onnx", weight_type=QuantType.QUInt8)
    opened = Opened(tmp_path / "model.onnx")
    assert "DynamicQuantizeLinear" in {node.op_type for node in opened.model.graph}
    assert not opened.keeps_apart()


def test_scores_that_are_the_same_for_all_images_prove_nothing(tmp_path):
    opened = Opened(export(seeded(Untrained), tmp_path / "model.onnx"))
    assert opened.is_free
    assert not opened.keeps_apart()
    features = next(node for node in opened.model.graph if node.op_type == "Gemm").inputs[0]
    assert opened.keeps_apart([features])


def parsed(tmp_path, text, **weights):
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "model.onnx")
    return Opened(tmp_path / "model.onnx", px=4)


IMAGE = "net (float[1, 3, 4, 4] x) => (float[1, C] y)"
RNG = np.random.default_rng(0)


def weights(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        # As PyTorch writes as_strided: by the places of elements in memory.
        ("f = Reshape(x, all) p = Gather <axis = 0> (f, at) y = Flatten <axis = 1> (p)",
         {"all": np.array([48]), "at": np.arange(48)[::-1].reshape(1, 6, 8).copy()}),
        # Every axis is sliced, that of the images as well.
        ("s = Slice(x, start, end) y = Flatten(s)",
         {"start": np.array([0, 1, 0]), "end": np.array([1, 3, 2])}),
        ("t = Transpose <perm = [1, 0, 2, 3]> (x) f = Reshape(t,s) m = MatMul(f, w) y = ReduceSum <keepdims=0> (m, a)",
         {"s": np.array([3, 1, 16]), "w": weights(3, 16, 5), "a": np.array([0])}),
        ("t = Reshape(x, to) y = Einsum <equation = \"nck,ckd->nd\"> (t, w)",
         {"to": np.array([1, 3, 16]), "w": weights(3, 16, 5)}),
        ("e = Expand(x, to) p = ReduceMax <keepdims = 0> (e, axes) y = Reshape(p, flat)",
         {"to": np.array([1, 1, 3, 4, 4]), "axes": np.array([3]), "flat": np.array([1, -1])}),
        ("s = Size(x) c = Cast <to = 1> (s) h = Shape <start = 1> (x) r = Reshape(x, b) q = Div(r, c) y = Flatten(q)",
         {"b": np.array([0, -1])}),
        ("t = Transpose(x) f = Flatten <axis = 3> (t) m = MatMul(w, f) u = Transpose(m) y = Mul(u, u)",
         {"w": weights(5, 48)}),
        ("f = Flatten(x) i = Unsqueeze(f, one) g = GatherElements <axis = 2> (i, at) y = Flatten(g)",
         {"one": np.array([1]), "at": np.array([[[4, 1, 40]]])}),
    ],
)  # fmt: skip
def test_forms_of_other_exporters(tmp_path, text, more):
    opened = parsed(tmp_path, f"{IMAGE} {{ {text} }}", **more)
    before = open_graph(read_file(tmp_path / "model.onnx"))
    assert opened.is_free
    assert opened.keeps_apart()
    batch = RNG.random((3, 3, 4, 4)).astype(np.float32)
    expected = [before.run(None, {"x": batch[place : place + 1]})[0] for place in range(3)]
    np.testing.assert_allclose(opened.run(batch), np.concatenate(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("y = ReduceMean <keepdims = 0> (x, axes)", {"axes": np.array([0, 2])}),
        ("a = Gather <axis = 0> (x, at) y = Flatten(a)", {"at": np.array(0)}),
        ("e = Expand(x, to) y = Flatten(e)", {"to": np.array([2, 3, 4, 4])}),
        ("f = Flatten(x) t = Transpose(f) y = MatMul(f, t)", {}),
        ("t = Transpose(x) f = Flatten <axis = 3> (t) y = MatMul(f, w)", {"w": weights(1, 5)}),
        ("y = Concat <axis = 0> (x, x)", {}),
        ("f = Flatten(x) y = MatMul(v, w)", {"v": weights(1, 4), "w": weights(4, 5)}),
    ],
)
def test_where_images_are_lost(tmp_path, text, more):
    assert not parsed(tmp_path, f"{IMAGE} {{ {text} }}", **more).is_free


def test_a_file_of_any_number_of_images_is_left_as_it_is(tmp_path):
    opened = parsed(tmp_path, IMAGE.replace("[1, 3", "[N, 3") + " { y = Flatten(x) }")
    assert opened.is_free
    assert [node.op_type for node in opened.model.graph] == ["Flatten"]
    assert opened.keeps_apart()


def test_statistics_of_the_batch(tmp_path):
    ones = np.ones(3, np.float32)
    normalised = "n, m, v = BatchNormalization <training_mode = 1> (x, one, one, one, one)"
    opened = parsed(tmp_path, f"{IMAGE} {{ {normalised} s = Mul(n, n) y = GlobalMaxPool(s) }}", one=ones)
    assert opened.is_free
    assert not opened.keeps_apart()


def test_a_file_that_does_not_run_on_several_images(tmp_path):
    opened = parsed(tmp_path, IMAGE.replace("[1, 3", "[N, 3") + " { y = Reshape(x, to) }", to=np.array([1, 48]))
    assert not opened.keeps_apart()
