"""What a graph does to its input first, by running it."""

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image
from heatlens_server.backends.onnx.source.inside import find_inside

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inside_of(tmp_path, body, input_type="float[N, 3, 8, 8]", **constants):
    text = f'<ir_version: 8, opset_import: ["" : 17]> net ({input_type} x) => (float[N, 4] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    constants.setdefault("w", np.ones((4, 3, 3, 3)))
    for name, values in constants.items():
        array = np.asarray(values, np.float32 if np.asarray(values).dtype == np.float64 else None)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "net.onnx")
    model = read_file(tmp_path / "net.onnx")
    return find_inside(model, find_image(model), (8, 8))


def channels(values):
    return np.reshape(values, (1, 3, 1, 1)).astype(np.float32)


TAIL = "c = Conv <pads: ints = [1, 1, 1, 1]> (v, w) p = GlobalAveragePool(c) y = Flatten(p)"
HALF, ONE, TINY, WHITE = np.array(0.5), np.array(1.0), np.array(1 / 255), np.array(255.0)
CAFFE = (103.939, 116.779, 123.68)


def test_nothing(tmp_path):
    found = inside_of(tmp_path, f"v = Identity(x) {TAIL}")
    assert found.is_nothing
    assert (found.factors, found.offsets) == ((1.0,) * 3, (0.0,) * 3)


@pytest.mark.parametrize(
    ("body", "constants", "factors", "offsets", "highest", "is_bgr"),
    [
        ("v = Mul(x, s)", {"s": TINY}, (1 / 255,) * 3, (0,) * 3, 255, False),
        ("a = Sub(x, m) v = Div(a, s)", {"m": channels(MEAN), "s": channels(STD)},
         tuple(1 / np.array(STD)), tuple(-np.array(MEAN) / STD), 1, False),
        ("a = Mul(x, k) b = Sub(a, m) v = Div(b, s)", {"k": TINY, "m": channels(MEAN), "s": channels(STD)},
         tuple(1 / 255 / np.array(STD)), tuple(-np.array(MEAN) / STD), 255, False),
        ("a = Div(x, h) v = Sub(a, o)", {"h": np.array(127.5), "o": ONE}, (1 / 127.5,) * 3, (-1,) * 3, 255, False),
        ("a = Sub(x, h) v = Div(a, h)", {"h": HALF}, (2,) * 3, (-1,) * 3, 1, False),
        ("v = Mul(x, s)", {"s": WHITE}, (255,) * 3, (0,) * 3, 1, False),
        # Caffe's means, in the order of a file that takes BGR; and of one that takes RGB and turns it round.
        ("v = Sub(x, m)", {"m": channels(CAFFE)}, (1,) * 3, (-103.939, -116.779, -123.68), 255, True),
        ("a = Gather <axis: int = 1> (x, i) v = Sub(a, m)",
         {"i": np.array([2, 1, 0]), "m": channels(CAFFE)},
         (1,) * 3, (-123.68, -116.779, -103.939), 255, False),
        ("a = Resize <mode: string = \"linear\"> (x, , , z) v = Sub(a, o)",
         {"z": np.array([1, 3, 16, 16]), "o": np.array(0.5)}, (1,) * 3, (-0.5,) * 3, 1, False),
        # Padding and clipping change nothing but where they are.
        ("a = Clip(x, lo, hi) b = Pad(a, p2) v = Mul(b, s)",
         {"lo": np.array(0.0), "hi": np.array(255.0), "p2": np.array([0, 0, 2, 2, 0, 0, 2, 2]), "s": TINY},
         (1 / 255,) * 3, (0,) * 3, 255, False),
    ],
)  # fmt: skip
def test_normalisation_inside(tmp_path, body, constants, factors, offsets, highest, is_bgr):
    found = inside_of(tmp_path, f"{body} {TAIL}", **constants)
    np.testing.assert_allclose(found.factors, factors, rtol=1e-5)
    np.testing.assert_allclose(found.offsets, offsets, rtol=1e-5, atol=1e-6)
    assert (found.highest, found.is_bgr, found.is_nothing) == (highest, is_bgr, False)


def test_a_file_of_a_fixed_batch(tmp_path):
    found = inside_of(tmp_path, f"v = Mul(x, s) {TAIL}", "float[4, 3, 8, 8]", s=TINY)
    np.testing.assert_allclose(found.factors, (1 / 255,) * 3, rtol=1e-6)


def test_bytes_with_channels_last(tmp_path):
    body = f"a = Cast <to: int = 1> (x) b = Transpose <perm: ints = [0, 3, 1, 2]> (a) v = Mul(b, s) {TAIL}"
    found = inside_of(tmp_path, body, "uint8[N, 8, 8, 3]", s=TINY)
    np.testing.assert_allclose(found.factors, (1 / 255,) * 3, rtol=1e-6)


def test_a_computed_constant_and_slices_that_move_pixels_into_channels(tmp_path):
    body = """
        u = Unsqueeze(m, ax) a = Sub(x, u)
        b = Slice(a, s0, e, ax2, st) c1 = Slice(a, s1, e, ax2, st) v = Concat <axis: int = 1> (b, c1)
    """
    ints = {"ax": [0, 2, 3], "s0": [0, 0], "s1": [1, 1], "e": [8, 8], "ax2": [2, 3], "st": [2, 2]}
    arrays = {name: np.array(values) for name, values in ints.items()}
    found = inside_of(tmp_path, f"{body} {TAIL}", m=np.array(MEAN), w=np.ones((4, 6, 3, 3)), **arrays)
    np.testing.assert_allclose(found.offsets, -np.array(MEAN), rtol=1e-6)


def test_a_quantised_input_counts_as_nothing(tmp_path):
    body = f"q = QuantizeLinear(x, s, z) v = DequantizeLinear(q, s, z) {TAIL}"
    assert inside_of(tmp_path, body, s=np.array(4.8 / 255), z=np.array(113, np.uint8)).is_nothing


def test_a_channel_without_effect(tmp_path):
    assert inside_of(tmp_path, f"v = Mul(x, s) {TAIL}", s=channels((1, 0, 1))) is None
