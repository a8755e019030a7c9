"""What is particular to the onnxruntime engine: sessions, exports of either kind, failures, no torch."""

import dataclasses
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

import tiny_models
from heatlens_server.backends.onnx import engine as onnxruntime_engine
from heatlens_server.backends.onnx.cuda import GraphedSession
from heatlens_server.backends.onnx.engine import OnnxRuntimeEngine
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.graph_spec import Format, GraphSpec, InputKind, Output
from heatlens_server.core.methods import CLOSED_FORMS, Method, Score
from heatlens_server.core.targets import ClassIds, TopK
from loaded_models import bundle, loaded, noise, user_export

SPEC = MapSpec(Method.GRAD_CAM, ("body",), upsample=False)
TARGETS = [TopK(3), ClassIds((4,)), TopK(1), ClassIds((1, 2, 3, 9, 0)), TopK(10)]


def tiny_bundle():
    return bundle(loaded(tiny_models.tiny(), ("body", "stem")), Format.ONNX)


@pytest.fixture
def opened(monkeypatch):
    """The graphs that sessions are opened for, by name, and each session for as long as somebody holds it."""
    sessions: list[tuple[str, weakref.ref[onnxruntime.InferenceSession]]] = []
    real = onnxruntime_engine.open_session

    def noting(runtime, graph, options, choice):
        session, used = real(runtime, graph, options, choice)
        sessions.append((graph.name, weakref.ref(session)))
        return session, used

    monkeypatch.setattr(onnxruntime_engine, "open_session", noting)
    return sessions


def kept(opened) -> int:
    """How many of the sessions there still are."""
    gc.collect()
    return sum(session() is not None for _, session in opened)


def test_torch_is_never_loaded(tmp_path):
    """Not by importing the engine, not by explaining."""
    folder, manifest = tiny_bundle()
    manifest.write(folder)
    program = """
import sys
from pathlib import Path
import numpy as np
from heatlens_server.core.methods import Method
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.targets import TopK
from heatlens_server.backends.onnx.engine import OnnxRuntimeEngine
from heatlens_server.backends.onnx.manifest import read_manifest

folder = Path(sys.argv[1])
engine = OnnxRuntimeEngine(folder, read_manifest(folder), threads=1)
images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
for method in engine.info.methods:
    for result in engine.explain(images, [TopK(2)] * 2, MapSpec(method, ("body",), True)):
        assert result.maps.shape == (2, 64, 64)
assert not {"torch", "torchvision", "timm", "onnx"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program, str(folder)], check=True)


def test_sessions_are_opened_when_they_are_asked_for(opened):
    engine = OnnxRuntimeEngine(*tiny_bundle(), threads=1)
    assert len(opened) == 1
    for _ in range(2):
        engine.explain(noise(1), [TopK(1)], MapSpec(engine.info.methods[0], ("body",), upsample=False))
        engine.explain(noise(1), [TopK(1)], MapSpec(Method.HI_RES_CAM, ("body",), upsample=False))
    assert len(opened) == len({name for name, _ in opened}) == 2


def test_only_so_many_sessions_are_kept_and_the_oldest_goes(opened, monkeypatch):
    monkeypatch.setattr(onnxruntime_engine, "_SESSIONS_BYTES", 0)
    engine = OnnxRuntimeEngine(*tiny_bundle(), threads=1)
    reference = TorchEngine(loaded(tiny_models.tiny()), device="cpu")
    default, *others = (MapSpec(method, ("body",), upsample=False) for method in engine.info.methods[:3])
    for spec in (default, others[0], default, others[1], default, others[0]):
        (result,) = engine.explain(noise(1), [ClassIds((3,))], spec)
        (expected,) = reference.explain(noise(1), [ClassIds((3,))], spec)
        np.testing.assert_allclose(result.maps, expected.maps, atol=1e-5)
        assert kept(opened) <= 2
    # The default's stays: it was used in between.
    assert len(opened) == 4


@pytest.mark.parametrize(("classes", "kind"), [(1, InputKind.FLOAT), (2, InputKind.UINT8)])
def test_exports_made_by_hand_are_served_too(classes, kind):
    """One graph, of a fixed number of classes, perhaps of normalised floats, with more outputs."""
    model = loaded(tiny_models.tiny_mlp())
    export = user_export(model, Format.ONNX, GraphSpec("body", classes=classes, input=kind))
    engine = OnnxRuntimeEngine(*export, device="cpu", threads=1)
    assert engine.info.methods == (Method.GRAD_CAM,)
    assert engine.info.layers == ("body",)
    reference = TorchEngine(model, device="cpu")
    for upsample in (False, True):
        spec = MapSpec(Method.GRAD_CAM, ("body",), upsample)
        results = zip(engine.explain(noise(5), TARGETS, spec), reference.explain(noise(5), TARGETS, spec), strict=True)
        for result, expected in results:
            assert result.class_ids == expected.class_ids
            np.testing.assert_allclose(result.maps, expected.maps, atol=1e-5)
            np.testing.assert_allclose(result.scales, expected.scales, rtol=1e-4)
            np.testing.assert_allclose(result.logits, expected.logits, atol=1e-5)


def test_it_says_what_it_can_do():
    model = loaded(tiny_models.tiny_mlp(), ("body", "stem"))
    engine = OnnxRuntimeEngine(*bundle(model, Format.ONNX), threads=1)
    reference = TorchEngine(model, device="cpu")
    methods = tuple(method for method in CLOSED_FORMS if method is not Method.CAM)
    assert engine.info == dataclasses.replace(
        reference.info,
        engine_name="onnxruntime",
        methods=methods,
        scores=(Score.LOGIT,),
        has_options=False,
        layers_by_method=dict.fromkeys((m for m in methods if m.traits.default_layer_only), ("body",)),
    )
    plain = MapSpec(Method.EIGEN_CAM, ("body",), upsample=False)
    assert engine.can(plain)
    assert engine.can(dataclasses.replace(plain, method=Method.LAYER_CAM, layers=("stem", "body")))
    for beyond in (
        {"layers": ("stem",)},
        {"method": Method.CAM},
        {"method": Method.SCORE_CAM},
        {"method": Method.GRAD_CAM, "score": Score.PROBABILITY},
        {"method": Method.GRAD_CAM, "principal": True},
        {"augment": True},
    ):
        assert not engine.can(dataclasses.replace(plain, **beyond))


def test_what_the_export_does_not_have_is_refused():
    engine = OnnxRuntimeEngine(*tiny_bundle(), threads=1)
    with pytest.raises(ValueError, match="no graph for layer 'head' and method grad-cam"):
        engine.explain(noise(1), [TopK(1)], MapSpec(Method.GRAD_CAM, ("head",), upsample=False))


def test_close_lets_go_of_the_sessions(opened):
    engine = OnnxRuntimeEngine(*tiny_bundle(), threads=1)
    engine.close()
    engine.close()
    assert (len(opened), kept(opened)) == (1, 0)
    with pytest.raises(ValueError, match="no graph"):
        engine.explain(noise(1), [TopK(1)], SPEC)


# Its map has as many pixels as there are in class_index, times the size given.
GREEDY = """
<ir_version: 10, opset_import: ["" : 20]>
greedy (uint8[N, 3, 64, 64] image, int64[N, K] class_index)
    => (float[N, 3] logits, int64[N, K] class_id, float[M] cam, float[N, K] cam_scale, float[N, K] cam_offset)
{
    floats = Cast <to = 1> (image)
    logits = ReduceMean <keepdims = 0> (floats, axes)
    class_id = Identity (class_index)
    cam_scale = Cast <to = 1> (class_index)
    cam_offset = Cast <to = 1> (class_index)
    count = Size (class_index)
    shape = Mul (count, factor)
    one = ReduceMax <keepdims = 1> (cam_scale)
    flat = Reshape (one, minus_one)
    cam = Expand (flat, shape)
}
"""


def test_an_allocation_that_fails_is_a_memory_error(tmp_path):
    greedy = onnx.parser.parse_model(GREEDY)
    for name, value in (("axes", [2, 3]), ("factor", [1 << 50]), ("minus_one", [-1])):
        greedy.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    _, manifest = tiny_bundle()
    onnx.save(greedy, tmp_path / "greedy.onnx")
    graph = dataclasses.replace(manifest.graphs[0], file="greedy.onnx", method=Method.GRAD_CAM)
    engine = OnnxRuntimeEngine(
        tmp_path, dataclasses.replace(manifest, graphs=(graph,), files={"greedy.onnx": ""}, class_count=3), threads=1
    )
    with pytest.raises(MemoryError):
        engine.explain(noise(1), [TopK(1)], SPEC)


def test_other_failures_are_not_memory_errors():
    engine = OnnxRuntimeEngine(*tiny_bundle(), threads=1)
    with pytest.raises(Exception, match="Got invalid dimensions") as caught:
        engine.explain(noise(1, px=32), [TopK(1)], SPEC)
    assert not isinstance(caught.value, MemoryError)
    # And it is still usable.
    assert engine.explain(noise(1), [TopK(1)], SPEC)[0].maps.shape == (1, 8, 8)


def test_a_damaged_graph_fails_at_load_without_naming_paths(tmp_path):
    _, manifest = tiny_bundle()
    for name in manifest.files:
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(ModelLoadError, match="onnxruntime cannot load the graph of layer 'body'") as caught:
        OnnxRuntimeEngine(tmp_path, manifest)
    assert str(tmp_path) not in str(caught.value)


def test_exports_that_are_not_for_it_fail_at_load():
    folder, manifest = tiny_bundle()
    with pytest.raises(ModelLoadError, match="the export is torchscript, not onnx"):
        OnnxRuntimeEngine(folder, dataclasses.replace(manifest, format=Format.TORCHSCRIPT))
    poor = dataclasses.replace(manifest.graphs[0], outputs=(Output.LOGITS, Output.CAM))
    with pytest.raises(ModelLoadError, match="does not return class_id, cam_scale, cam_offset"):
        OnnxRuntimeEngine(folder, dataclasses.replace(manifest, graphs=(poor,)))
    with pytest.raises(ModelLoadError, match="no graphs"):
        OnnxRuntimeEngine(folder, dataclasses.replace(manifest, graphs=()))


def test_missing_devices_are_said():
    folder, manifest = tiny_bundle()
    with pytest.raises(ModelLoadError, match="no device 'cuda:99'"):
        OnnxRuntimeEngine(folder, manifest, device="cuda:99")
    with pytest.raises(ModelLoadError, match="provider 'cuda' does not run on device 'cpu'"):
        OnnxRuntimeEngine(folder, manifest, device="cpu", provider="cuda")


def test_bound_tensors_give_what_plain_runs_give(monkeypatch):
    """The I/O binding that CUDA graphs need, on the CPU: all of it but the capturing."""
    folder, manifest = tiny_bundle()
    session = onnxruntime.InferenceSession(folder / manifest.graphs[0].file, providers=["CPUExecutionProvider"])
    names = list(manifest.graphs[0].outputs)
    bindings, bind = [], session.io_binding
    monkeypatch.setattr(session, "io_binding", lambda: bindings.append(bind()) or bindings[-1])
    graphed = GraphedSession(onnxruntime, session, outputs=names, device="cpu")
    pairs = []
    for count, classes in ((1, 1), (3, 1), (2, 1), (8, 1), (9, 1), (2, 3), (1, 1)):
        images = np.ascontiguousarray(noise(count, seed=len(pairs)).transpose(0, 3, 1, 2))
        feeds = {"image": images, "class_index": np.full((count, classes), -1, np.int64)}
        pairs.append((graphed.run(feeds), session.run(names, feeds)))
    # Compared at the end: a result that shares memory with a bound tensor would have changed by now.
    for outputs, expected in pairs:
        for one, other in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
    assert len(bindings) == 4  # of 1, 2, 4 and 8 images


def test_folders_are_only_read(tmp_path):
    folder, manifest = tiny_bundle()
    before = sorted(Path(folder).iterdir())
    OnnxRuntimeEngine(folder, manifest, threads=1).explain(noise(1), [TopK(1)], SPEC)
    assert sorted(Path(folder).iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_count": 7}, "logits is of shape .* class_count does not fit"),
        ({"classes": 3}, "class_index is of shape .* classes does not fit"),
        ({"classes": None}, "class_index is of shape .* classes does not fit"),
        ({"input": InputKind.UINT8}, "the graph takes float32 images, and its manifest's input is uint8"),
        ({"crop_px": (32, 32)}, "image is of shape .* preprocess.crop_px does not fit"),
    ],
)
def test_a_manifest_that_does_not_fit_its_graph_fails_at_load(changes, message):
    folder, manifest = user_export(loaded(tiny_models.tiny_mlp()), Format.ONNX, GraphSpec("body"))
    if "crop_px" in changes:
        changes = {"preprocess": dataclasses.replace(manifest.preprocess, **changes)}
    with pytest.raises(ModelLoadError, match=message):
        OnnxRuntimeEngine(folder, dataclasses.replace(manifest, **changes), device="cpu", threads=1)
