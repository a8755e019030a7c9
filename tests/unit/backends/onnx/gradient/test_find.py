"""What is found in files: image, scores, and the tensors that lie on the image."""

import numpy as np
import onnx.parser
import pytest

from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image, find_layers, find_scores
from heatlens_server.backends.onnx.gradient.values import know
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Grid, Layout

RNG = np.random.default_rng(0)


def found_in(tmp_path, text, size_px=(32, 32), **weights):
    """Parse a graph, give it random weights of these shapes, and find everything in it."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    for name, shape in weights.items():
        array = (RNG.normal(size=shape) * 0.3).astype(np.float32) if isinstance(shape, tuple) else shape
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    model = read_file(path)
    image = find_image(model)
    known = know(model, image.value, image.shape(*size_px))
    scores = find_scores(model, known)
    return image, scores, find_layers(model, known, image, scores)


CONVOLUTIONS = """
    a = Conv <pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]> (x, w1)
    b = Relu(a)
    c = Conv <pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]> (b, w2)
    d = Relu(c)
    p = GlobalAveragePool(d)
    f = Flatten(p)
"""
WEIGHTS = {"w1": (8, 3, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 5)}


def names(layers):
    return [layer.value.name for layer in layers]


def test_a_convolutional_network_with_a_softmax(tmp_path):
    text = f"net (float[N, 3, 32, 32] x) => (float[N, 5] y) {{ {CONVOLUTIONS} z = MatMul(f, w3) y = Softmax(z) }}"
    image, scores, layers = found_in(tmp_path, text, **WEIGHTS)
    assert (image.channels, image.height_px, image.width_px, image.channels_last) == (3, 32, 32, False)
    assert (scores.value.name, scores.class_count, scores.activation) == ("z", 5, "softmax")
    assert names(layers) == ["d", "b"]
    assert [(layer.channels, layer.height, layer.width, layer.grid) for layer in layers] == [
        (16, 8, 8, Grid()),
        (8, 16, 16, Grid()),
    ]


def test_a_softmax_is_seen_behind_its_quantisation(tmp_path):
    text = f"""net (float[N, 3, 32, 32] x) => (float[N, 5] y) {{ {CONVOLUTIONS} z = MatMul(f, w3) s = Softmax(z)
        q = QuantizeLinear(s, step, zero) y = DequantizeLinear(q, step, zero) }}"""
    quantised = {"step": np.array(1 / 255, np.float32), "zero": np.array(0, np.uint8)}
    _image, scores, _layers = found_in(tmp_path, text, **WEIGHTS, **quantised)
    assert (scores.value.name, scores.output.name, scores.activation) == ("z", "y", "softmax")


def test_a_head_without_training_hides_nothing(tmp_path):
    text = f"net (float[N, 3, 32, 32] x) => (float[N, 5] y) {{ {CONVOLUTIONS} y = MatMul(f, w3) }}"
    _image, scores, layers = found_in(tmp_path, text, **{**WEIGHTS, "w3": np.zeros((16, 5), np.float32)})
    assert (scores.activation, names(layers)) == ("", ["d", "b"])


def test_a_maximum_over_all_places_reads_them_all(tmp_path):
    """Of one image no more places than there are channels: 16 of 64."""
    text = """net (float[N, 3, 64, 64] x) => (float[N, 5] y) {
        a = Conv <strides: ints = [4, 4]> (x, w1)
        b = Relu(a)
        c = Conv <strides: ints = [2, 2]> (b, w2)
        d = Relu(c)
        p = GlobalMaxPool(d)
        f = Flatten(p)
        y = MatMul(f, w3)
    }"""
    weights = {"w1": (8, 3, 4, 4), "w2": (16, 8, 2, 2), "w3": (16, 5)}
    assert names(found_in(tmp_path, text, (64, 64), **weights)[2]) == ["d", "b"]


def test_channels_last_of_gray_images_of_any_size(tmp_path):
    text = f"""net (float[N, H, W, 1] image) => (float[N, 5] y) {{
        x = Transpose <perm: ints = [0, 3, 1, 2]> (image) {CONVOLUTIONS} z = MatMul(f, w3) y = Sigmoid(z) }}"""
    image, scores, layers = found_in(tmp_path, text, (24, 48), **{**WEIGHTS, "w1": (8, 1, 3, 3)})
    assert (image.channels, image.height_px, image.width_px, image.channels_last) == (1, 0, 0, True)
    assert scores.activation == "sigmoid"
    assert (layers[0].height, layers[0].width) == (6, 12)


def test_keys_of_an_attention_are_no_layer_where_their_shape_is_computed(tmp_path):
    """As many tokens as a key has numbers, and as the image has places a side."""
    text = """net (float[N, 3, 32, 32] x) => (float[N, 5] y) {
        a = Conv <strides: ints = [8, 8]> (x, w1)
        b = Reshape(a, flat)
        t = Transpose <perm: ints = [0, 2, 1]> (b)
        l = MatMul(t, wk)
        s = Shape <start: int = 0, end: int = 1> (l)
        r = Concat <axis: int = 0> (s, rest)
        h = Reshape(l, r)
        k = Transpose <perm: ints = [0, 2, 1, 3]> (h)
        v = Flatten(k)
        z = MatMul(v, w3)
        y = Add(z, w4)
    }"""
    whole = {"flat": np.array([0, 32, 16]), "rest": np.array([16, 2, 16])}
    weights = {"w1": (32, 3, 8, 8), "wk": (32, 32), "w3": (512, 5), "w4": (5,)}
    _image, _scores, layers = found_in(tmp_path, text, **weights, **whole)
    assert [(layer.height, layer.width) for layer in layers] == [(4, 4)]


@pytest.mark.parametrize("behind", [0, 20, 60])
def test_what_a_class_token_reads_alone_is_no_layer(tmp_path, behind):
    """A transformer block behind a patch embedding: behind the attention, scores read the class token alone."""
    more = "\n".join(f"last{number + 1} = Add(last{number}, s)" for number in range(behind))
    text = f"""net (float[N, 3, 32, 32] x) => (float[N, 5] y) {{
        e = Conv <strides: ints = [8, 8]> (x, w1)
        shape = Constant <value_ints: ints = [0, 16, -1]> ()
        r = Reshape(e, shape)
        t = Transpose <perm: ints = [0, 2, 1]> (r)
        size = Shape <start: int = 0, end: int = 1> (x)
        rest = Constant <value_ints: ints = [1, 16]> ()
        whole = Concat <axis: int = 0> (size, rest)
        token = Expand(cls, whole)
        s = Concat <axis: int = 1> (token, t)
        n = LayerNormalization <axis: int = -1> (s, scale)
        q = MatMul(n, wq)
        k = MatMul(n, wk)
        v = MatMul(n, wv)
        kt = Transpose <perm: ints = [0, 2, 1]> (k)
        qk = MatMul(q, kt)
        attention = Softmax(qk)
        o = MatMul(attention, v)
        last0 = Add(s, o)
        {more}
        zero = Constant <value_int: int = 0> ()
        head = Gather <axis: int = 1> (last{behind}, zero)
        y = MatMul(head, w3)
    }}"""
    weights = {"w1": (16, 3, 8, 8), "cls": (1, 1, 16), "scale": (16,), "w3": (16, 5)}
    square = dict.fromkeys(("wq", "wk", "wv"), (16, 16))
    if behind == 60:
        with pytest.raises(ModelLoadError, match="layers names one"):
            found_in(tmp_path, text, **weights, **square)
        return
    _image, scores, layers = found_in(tmp_path, text, **weights, **square)
    assert scores.class_count == 5
    # Not the last ones, of which the class token alone is read; not q, k, v or the attention, 17 by 17.
    # Not "s" either: what goes around "n" is of its class token alone.
    assert names(layers) == ["n"]
    assert layers[0].grid == Grid(Layout.TOKENS, 1, 4, 4)
    assert not layers[0].is_bypassed


MAPS = """
    a = Conv <pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]> (x, w1)
    b = Relu(a)
    c = Conv <pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]> (b, w2)
    d = Relu(c)
"""


@pytest.mark.parametrize(
    "pooling",
    [
        # The variance reads places as well, later; without the mean beside it its square would be the layer.
        """m = GlobalAveragePool(d) e = Sub(d, m) q = Mul(e, e) v = GlobalAveragePool(q) s = Sqrt(v)
        p = Concat <axis: int = 1> (m, s)""",
        """o, r = Split <axis: int = 1, num_outputs: int = 2> (d) m = GlobalAveragePool(o) n = GlobalMaxPool(r)
        p = Concat <axis: int = 1> (n, m)""",
    ],
    ids=["mean-and-deviation", "halves"],
)
def test_the_default_is_what_all_paths_from_places_go_through(tmp_path, pooling):
    text = f"net (float[N, 3, 32, 32] x) => (float[N, 5] y) {{ {MAPS} {pooling} f = Flatten(p) y = MatMul(f, w3) }}"
    weights = {**WEIGHTS, "w3": (32 if "Sqrt" in pooling else 16, 5)}
    _image, _scores, layers = found_in(tmp_path, text, **weights)
    assert names(layers) == ["d", "b"]
    assert not layers[0].is_bypassed


def test_a_deviation_alone_is_explained_by_its_squares(tmp_path):
    """The mean that it takes off goes through them too."""
    text = f"""net (float[N, 3, 32, 32] x) => (float[N, 5] y) {{ {MAPS}
        m = GlobalAveragePool(d) e = Sub(d, m) q = Mul(e, e) v = GlobalAveragePool(q) s = Sqrt(v)
        f = Flatten(s) y = MatMul(f, w3) }}"""
    _image, _scores, layers = found_in(tmp_path, text, **WEIGHTS)
    assert (names(layers), layers[0].is_bypassed) == (["q", "b"], False)


@pytest.mark.parametrize(
    ("branch", "weight"),
    [
        ("e = Conv <strides: ints = [4, 4]> (x, w4)", (16, 3, 4, 4)),
        # A stem is before both of them, and finer.
        ("e = Conv <strides: ints = [2, 2]> (b, w4)", (16, 8, 2, 2)),
    ],
    ids=["from-the-image", "from-a-finer-map"],
)
def test_of_two_branches_the_last_stays_and_is_said_to_be_one_of_them(tmp_path, branch, weight):
    text = f"""net (float[N, 3, 32, 32] x) => (float[N, 5] y) {{ {MAPS} {branch} h = Relu(e)
        p = GlobalAveragePool(d) q = GlobalMaxPool(h) r = Concat <axis: int = 1> (p, q) f = Flatten(r)
        y = MatMul(f, w3) }}"""
    _image, _scores, layers = found_in(tmp_path, text, **{**WEIGHTS, "w3": (32, 5), "w4": weight})
    assert (names(layers)[0], layers[0].is_bypassed) == ("h", True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"net (float[N, 3, 32, 32] x) => (float[N, 16, h, w] d) {{ {CONVOLUTIONS} }}", "0 outputs look like scores"),
        (
            f"""net (float[N, 3, 32, 32] x) => (float[N, 5] y, float[N, 16] f)
            {{ {CONVOLUTIONS} y = MatMul(f, w3) }}""",
            "2 outputs look like scores (N, classes); the file's outputs: y (-1, 5), f (-1, 16)",
        ),
        (
            "net (float[N, 3, 32, 32] x, float[N, 3, 32, 32] z) => (float[N, 5] y) { y = Add(x, z) }",
            "2 inputs of the file look like images, not one: x (N, 3, 32, 32), z (N, 3, 32, 32)",
        ),
        ("net (float[N, 40] x) => (float[N, 5] y) { y = Relu(x) }", "0 inputs of the file look like images"),
        (
            "net (float[N, 3, 32, 32] x) => (float[N, 3072] y) { y = Flatten(x) }",
            "no tensor of the file lies on the image like a map",
        ),
    ],
)
def test_what_cannot_be_found_is_told_with_what_there_is(tmp_path, text, words):
    weights = {name: shape for name, shape in WEIGHTS.items() if name in text}
    with pytest.raises(ModelLoadError) as caught:
        found_in(tmp_path, text, **weights)
    assert words in str(caught.value)
