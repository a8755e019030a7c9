"""Files that are wrong, or made to take memory, time or other files: refused by name, and nothing of them is run."""

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from onnx import SparseTensorProto, TensorProto, helper, numpy_helper

from heatlens_server.backends.onnx.gradient import values
from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image, find_scores
from heatlens_server.backends.onnx.gradient.values import know
from heatlens_server.core.causes import with_causes
from heatlens_server.core.errors import ModelLoadError

FLOAT = TensorProto.FLOAT
HUGE = 1 << 40
MOST_BYTES = 100 << 20
"""What one refusal may take at most; most take none."""


def tensor(name, array, kind=np.int64):
    return numpy_helper.from_array(np.array(array, kind), name)


KERNEL = tensor("kernel", np.ones((4, 3, 3, 3)), np.float32)
ROW = tensor("row", np.ones((1, 1 << 18)), np.float32)
COLUMN = tensor("column", np.ones((1 << 18, 1)), np.float32)


def node(op, inputs, outputs="y", **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"the_{op}", **attributes)


def model(*nodes, initial=(), opset=20, functions=(), domains=(), lengths=("n", 3, 8, 8), output="y"):
    image = helper.make_tensor_value_info("x", FLOAT, lengths)
    scores = helper.make_tensor_value_info(output, FLOAT, None)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    graph = helper.make_graph(list(nodes), "net", [image], [scores], list(initial))
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def added(*nodes, **more):
    """A model that adds the largest element of a value k to the image."""
    return model(*nodes, node("ReduceMax", "k", "m", keepdims=0), node("Add", "x m"), **more)


def function(name, *nodes):
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    return helper.make_function("mine", name, ["a"], ["b"], list(nodes), imports)


def call(name, given="a", made="b"):
    return helper.make_node(name, [given], [made], domain="mine", name=f"call_{name}")


def of_functions(*functions):
    return model(call("f0", "x", "y"), functions=functions, domains=["mine"])


def doubling(depth):
    """Each function calls the next one twice."""
    inner = [
        function(f"f{place}", call(f"f{place + 1}", "a", "h"), call(f"f{place + 1}", "h", "b"))
        for place in range(depth)
    ]
    return of_functions(*inner, function(f"f{depth}", helper.make_node("Relu", ["a"], ["b"])))


def changed(change):
    """A right model, changed."""
    right = model(node("Conv", "x kernel", "c"), node("Relu", "c"), initial=[KERNEL])
    change(right)
    return right


def external(**entries):
    def change(right):
        stored = right.graph.initializer[0]
        stored.ClearField("raw_data")
        stored.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            stored.external_data.add(key=key, value=str(value))

    return changed(change)


def with_dims(*dims, keep=True):
    def change(right):
        right.graph.initializer[0].dims[:] = dims
        if not keep:
            right.graph.initializer[0].ClearField("raw_data")

    return changed(change)


def of_type(number):
    return changed(lambda right: setattr(right.graph.initializer[0], "data_type", number))


def sparse():
    stored = SparseTensorProto(values=tensor("loose", [1.0], np.float32), indices=tensor("at", [3]), dims=[HUGE])
    return changed(lambda right: right.graph.sparse_initializer.append(stored))


def branching(op):
    empty = helper.make_graph([], "body", [], [])
    names = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}[op]
    return model(node(op, "x", **dict.fromkeys(names, empty)))


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.onnx", b"x" * 1000)
    return file.getvalue()


RIGHT = model(node("Conv", "x kernel", "c"), node("Relu", "c"), initial=[KERNEL]).SerializeToString()
REFUSED = {
    # What is no file of ONNX.
    "nothing": (b"", "no operators"),
    "text": (b"no file at all", "is no ONNX file"),
    "random bytes": (np.random.default_rng(0).bytes(5000), "is no ONNX file"),
    "a cut file": (RIGHT[:-300], "is no ONNX file"),
    "a zip file": (zipped(), "is no ONNX file"),
    "no nodes": (model(), "no operators"),
    # Versions and operators.
    "opset 99": (model(node("Relu", "x"), opset=99), "opset 99"),
    "no opset": (changed(lambda right: right.ClearField("opset_import")), "opset 0"),
    "a conversion that does not exist": (
        model(node("Add", "x s", broadcast=1, axis=1), initial=[tensor("s", [1, 1, 1], np.float32)], opset=6),
        "cannot be converted from opset 6 to 20",
    ),
    "a custom operator": (model(node("Mine", "x", domain="mine"), domains=["mine"]), "mine.Mine of node 'the_Mine'"),
    "an operator of a runtime": (
        model(node("FusedConv", "x", domain="com.microsoft"), domains=["com.microsoft"]),
        "com.microsoft.FusedConv of node 'the_FusedConv'",
    ),
    "an operator that does not exist": (model(node("Nonesuch", "x")), "Nonesuch of node 'the_Nonesuch'"),
    **{op: (branching(op), f"{op} of node 'the_{op}'") for op in ("If", "Loop", "Scan")},
    "a quantised operator without inputs": (model(node("QLinearConv", "x")), "QLinearConv of node"),
    "an equation that is none": (model(node("Einsum", "x x", equation="....,,->>")), "Einsum of node 'the_Einsum'"),
    "a node without outputs": (model(node("Relu", "x", ""), node("Relu", "x")), "Relu of node 'the_Relu' has no"),
    # The graph.
    "a cycle": (model(node("Add", "x b", "a"), node("Relu", "a", "b"), node("Relu", "b")), "Add of node 'the_Add'"),
    "a value that nothing makes": (model(node("Add", "x ghost")), "'ghost', an input of node 'the_Add'"),
    "an output that nothing makes": (model(node("Relu", "x", "z")), "output 'y'"),
    "a value that is made twice": (model(node("Relu", "x"), node("Abs", "x")), "'y', an output of node 'the_Abs'"),
    "an output named as the input": (model(node("Relu", "x", "x"), node("Relu", "x")), "'x', an output"),
    "two tensors of one name": (changed(lambda right: right.graph.initializer.append(KERNEL)), "'kernel' is there"),
    "a function that calls itself": (of_functions(function("f0", call("f0"))), "'f0' of domain 'mine' calls itself"),
    "functions that call each other": (
        of_functions(function("f0", call("f1")), function("f1", call("f0"))),
        "'f0' of domain 'mine' calls itself",
    ),
    "a function of another opset": (
        changed(
            lambda right: right.functions.append(
                helper.make_function("mine", "Old", ["a"], ["b"], [call("Old")], [helper.make_opsetid("", 11)])
            )
        ),
        "function 'Old' is of opset 11",
    ),
    "functions of exponentially many nodes": (doubling(40), "its functions make a graph of more than"),
    "functions that are nested deep": (
        of_functions(
            *(function(f"f{place}", call(f"f{place + 1}")) for place in range(1500)),
            function("f1500", helper.make_node("Relu", ["a"], ["b"])),
        ),
        "nested too deep",
    ),
    # Tensors.
    "a claim of 2 GB": (with_dims(1 << 16, 1 << 13), "'kernel' says 2147483648 bytes"),
    "a claim of 2^80 bytes": (with_dims(HUGE, HUGE), "'kernel' says"),
    "a claim without data": (with_dims(HUGE, 3, 3, 3, keep=False), "'kernel' says"),
    "a negative length": (with_dims(-4, 3, 3, 3), "'kernel' has a negative length"),
    "a type that does not exist": (of_type(999), "'kernel' is of unknown type 999"),
    "no type": (of_type(0), "'kernel' is of unknown type 0"),
    "a sparse tensor": (sparse(), "'loose' is sparse"),
    "data outside of the folder": (external(location="../secret.bin"), "'kernel' lies outside"),
    "data at an absolute path": (external(location="/etc/passwd"), "'kernel' lies outside"),
    "data behind a link": (external(location="link"), "'kernel' lies outside"),
    "data that is missing": (external(location="missing.bin"), "'kernel': its data cannot be read: 'missing.bin' (Fi"),
    "data in a folder": (external(location="."), "'kernel': the file that holds it is too short"),
    "data beyond the end": (external(location="model.onnx", offset=10**9), "'kernel': the file that holds it"),
    "data before the start": (external(location="model.onnx", offset=-5), "'kernel': the file that holds it"),
    "data at no number": (external(location="model.onnx", offset="x"), "'kernel': its data cannot be read"),
    "data of another length": (external(location="model.onnx", length=HUGE), "'kernel': the file that holds it"),
    # Sizes.
    "an image of 2^40 pixels": (model(node("Relu", "x"), lengths=("n", 3, HUGE, HUGE)), "input: 'x'"),
    "padding": (model(node("Conv", "x kernel", pads=[HUGE] * 4), initial=[KERNEL]), "Conv of node 'the_Conv': 'y'"),
    "no strides": (model(node("Conv", "x kernel", strides=[0, 0]), initial=[KERNEL]), "Conv of node 'the_Conv'"),
    "a repeated image": (
        model(node("Expand", "x s"), initial=[tensor("s", [1 << 33, 1 << 33, 1, 1, 1, 1])]),
        "Expand of node 'the_Expand': 'y'",
    ),
    "constants of a shape": (added(node("ConstantOfShape", "s", "k"), initial=[tensor("s", [HUGE])]), "'k' of shape"),
    "constants by Tile": (
        added(node("Tile", "t s", "k"), initial=[tensor("t", [1.0], np.float32), tensor("s", [HUGE])]),
        "Tile of node 'the_Tile': 'k'",
    ),
    "constants by Range": (
        added(
            node("Range", "a b c", "r"), node("Cast", "r", "k", to=FLOAT),
            initial=[tensor("a", 0), tensor("b", HUGE), tensor("c", 1)],
        ),
        "Range of node 'the_Range': 'r'",
    ),
    "constants by broadcasting": (added(node("Mul", "row column", "k"), initial=[ROW, COLUMN]), "Mul of node"),
    "constants by a product": (added(node("MatMul", "column row", "k"), initial=[ROW, COLUMN]), "MatMul of node"),
    "constants by Einsum": (
        added(node("Einsum", "row row row", "k", equation="xa,xb,xc->abc"), initial=[ROW]), "Einsum of node"
    ),
    "random numbers": (added(node("RandomNormal", "", "k", shape=[HUGE])), "RandomNormal of node"),
    "many constants": (
        added(
            *(node("ConstantOfShape", "s", f"k{place}") for place in range(20)),
            node("Sum", " ".join(f"k{place}" for place in range(20)), "k"), initial=[tensor("s", [1 << 26])],
        ),
        "ConstantOfShape of node 'the_ConstantOfShape': the constants",
    ),
    "an enlarged image": (
        model(
            helper.make_node("Resize", ["x", "", "s"], ["y"], "the_Resize"),
            initial=[tensor("s", [1, 1, 1e9, 1], np.float32)],
        ),
        "Resize of node 'the_Resize': 'y'",
    ),
    "an old enlarged image": (
        model(node("Upsample", "x", scales=[1.0, 1.0, 1e9, 1.0], mode="nearest"), opset=7), "Resize of node"
    ),
    "places that are computed from pixels": (
        added(
            node("NonZero", "x", "z"), node("Shape", "z", "s"), node("ReduceProd", "s", "r"),
            node("Mul", "r large", "q"), node("ConstantOfShape", "q", "k"), initial=[tensor("large", [1 << 30])],
        ),
        "scores",
    ),
    "a list of tensors": (
        model(node("SequenceConstruct", "x", "s"), node("ConcatFromSequence", "s", axis=0)), "'s' is no tensor"
    ),
}  # fmt: skip


def use(path):
    """What is done with a file: read, and everything found in it that needs no run."""
    read = read_file(path)
    image = find_image(read)
    known = know(read, image.value, image.shape(image.height_px or 8, image.width_px or 8))
    find_scores(read, known)


def saved(folder, content):
    (folder.parent / "secret.bin").write_bytes(bytes(432))
    (folder / "link").symlink_to(folder.parent / "secret.bin")
    path = folder / "model.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    return path


@pytest.mark.parametrize(("content", "words"), REFUSED.values(), ids=REFUSED)
def test_a_hostile_file_is_refused_by_name(tmp_path, monkeypatch, content, words):
    (tmp_path / "folder").mkdir()
    path = saved(tmp_path / "folder", content)
    if words != "scores":
        # Nothing is run. What depends on pixels alone is run as far as its size is bounded.
        monkeypatch.setattr(values, "open_packed", None)
    with pytest.raises(ModelLoadError) as caught:
        use(path)
    assert words in str(caught.value)
    # The operator reads of its causes too.
    assert str(tmp_path) not in with_causes(caught.value)
    assert "/" not in str(caught.value)


def test_a_right_file_is_read(tmp_path):
    (tmp_path / "folder").mkdir()
    assert [one.op_type for one in read_file(saved(tmp_path / "folder", RIGHT)).graph] == ["Conv", "Relu"]


def test_no_refusal_takes_memory(tmp_path):
    """All of them in one process: its peak is little above what it has after the imports."""
    (tmp_path / "folder").mkdir()
    for place, (content, _words) in enumerate(REFUSED.values()):
        path = tmp_path / "folder" / f"{place}.onnx"
        path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    script = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(__file__)!r}.rpartition("/")[0])
import test_hostile_files
from heatlens_server.core.errors import ModelLoadError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        test_hostile_files.use(path)
    except ModelLoadError:
        refused += 1
print(refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "folder"], capture_output=True, text=True, check=True, timeout=100
    )
    refused, extra_bytes = map(int, done.stdout.split())
    assert refused == len(REFUSED)
    assert extra_bytes < MOST_BYTES
