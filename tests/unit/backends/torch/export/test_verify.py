"""Verifying: what passes, what is measured, and that every kind of wrong is found."""

import shutil
import threading
from dataclasses import replace
from importlib.resources import files

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import export_networks
from export_networks import make
from heatlens_server.backends.torch.export import comparison
from heatlens_server.backends.torch.export.comparison import TOLERANCES, Tolerance
from heatlens_server.backends.torch.export.folder import export_graph
from heatlens_server.backends.torch.export.runtimes import open_graph
from heatlens_server.backends.torch.export.verify import PHOTOS, load_photos, verify
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format, GraphSpec, InputKind, Output
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from loaded_models import bundle, hook_count, network, user_export

FIGURES = ["logits", "activations", "weights", "cam", "cam_scale", "cam_offset"]


def check(model, exported, lines=None):
    folder, manifest = exported
    return verify(model, folder, manifest, report=(lines if lines is not None else []).append)


@pytest.mark.parametrize("file_format", Format)
@pytest.mark.parametrize("classes", [1, None])
def test_a_right_export_passes_with_figures(file_format, classes):
    model = make(export_networks.Staged)
    lines = []
    parity = check(model, user_export(model, file_format, GraphSpec("middle", classes=classes)), lines)
    assert (parity["judge"], parity["batch_sizes"], len(parity["photos"])) == ("float64", [1, 3, 4], 4)
    assert parity["compared_maps"] == (8 if classes else 3 + 3 + 2 * 4)
    assert 0 < parity["informative_maps"] <= parity["compared_maps"]
    assert sorted(parity["figures"]) == sorted(FIGURES)
    for figure in parity["figures"].values():
        assert 0 <= figure["error"] <= 1e-5
        assert 0 <= figure["torch_error"] <= 1e-5
        assert figure["bound"] == TOLERANCES["fp32"].error
    assert parity["figures"]["cam"]["error"] > 0
    assert lines == ["running the network in float64", "verifying layer middle"]
    assert hook_count(model.module) == 0
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp16"},
        {"input": InputKind.UINT8, "classes": 5},
        {"outputs": (Output.CAM,)},
        {"outputs": (Output.LOGITS, Output.GRADIENTS)},
        {"method": Method.LAYER_CAM, "outputs": (Output.CLASS_ID, Output.CAM_SCALE)},
    ],
)
def test_whatever_a_graph_holds_is_compared(changes):
    model = make(export_networks.Staged)
    spec = GraphSpec("last", **changes)
    parity = check(model, user_export(model, Format.TORCHSCRIPT, spec))
    names = {"weights" if output is Output.GRADIENTS else str(output) for output in spec.outputs} - {"class_id"}
    assert set(parity["figures"]) == names
    assert {figure["bound"] for figure in parity["figures"].values()} == {TOLERANCES[spec.precision].error}
    assert parity["compared_maps"] == (8 * min(spec.classes, 3) if Output.CAM in spec.outputs else 0)


SERVED = {"onnx": network, "torchscript": bundle}
"""What servers export."""


@pytest.mark.parametrize("kind", SERVED)
def test_every_graph_of_a_server_s_export_is_verified(kind):
    model = make(export_networks.Staged, "last", "first")
    exported = SERVED[kind](model)
    lines = []
    parity = check(model, exported, lines)
    assert parity["batch_sizes"] == [1, 3]
    assert parity["compared_maps"] == len(exported[1].graphs) * (2 + 3)
    assert parity["informative_maps"] > 0
    assert {"logits", "cam"} <= set(parity["figures"])
    assert lines[1:] == ["verifying layer last", "verifying layer first"]


def tampered(tmp_path, exported):
    """A copy of an ONNX export whose file is about to be changed."""
    folder, manifest = exported
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy", manifest, tmp_path / "copy" / manifest.graphs[0].file


def test_other_weights_are_found(tmp_path):
    model = make(export_networks.Staged)
    folder, manifest, path = tampered(tmp_path, user_export(model, Format.ONNX, GraphSpec("middle", classes=None)))
    graph = onnx.load(path)
    tensor = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[::7] *= 1.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, path)
    with pytest.raises(
        ExportError, match=r"test.onnx, layer middle: \w+ differs from float64 by .*, more than the 0.0001"
    ):
        check(model, (folder, manifest))


def test_files_that_do_not_load_or_run_are_errors(tmp_path):
    model = make(export_networks.Staged)
    folder, manifest, path = tampered(tmp_path, user_export(model, Format.ONNX, GraphSpec("middle", classes=None)))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"onnxruntime cannot load test\.onnx") as caught:
        check(model, (folder, manifest))
    assert str(folder) not in str(caught.value)
    for file_format in (Format.TORCHSCRIPT, Format.PT2):
        with pytest.raises(ExportError, match=r"cannot load test\.onnx"):
            open_graph(path, file_format, tuple(Output))


def test_a_graph_that_is_of_another_model_is_found():
    model = make(export_networks.Staged)
    exported = user_export(model, Format.TORCHSCRIPT, GraphSpec("middle"))
    with torch.no_grad():
        model.module.head[3].bias[0] += 0.01
    with pytest.raises(ExportError, match=r"test\.ts, layer middle: logits differs from float64 by"):
        check(model, exported)


def test_a_manifest_that_says_something_else_is_found():
    model = make(export_networks.Staged)
    folder, manifest = user_export(model, Format.TORCHSCRIPT, GraphSpec("middle"))
    graph = replace(manifest.graphs[0], method=Method.LAYER_CAM)
    with pytest.raises(ExportError, match=r"(cam|cam_scale|cam_offset) differs from float64"):
        check(model, (folder, replace(manifest, graphs=(graph,))))
    outputs = tuple(replace(info, dtype="float16") if info.name == "cam" else info for info in manifest.outputs)
    with pytest.raises(ExportError, match=r"test.ts returns cam as float32 \(1, 1, 16, 16\), not as float16"):
        check(model, (folder, replace(manifest, outputs=outputs)))


class Unranked(nn.Module):
    """A scripted graph that explains class 0 where it is asked for the most probable one."""

    def __init__(self, graph: nn.Module, fill: int, absent: float) -> None:
        super().__init__()
        self.graph = graph
        self.fill = fill
        self.absent = absent

    def forward(self, image: torch.Tensor, class_index: torch.Tensor):
        outputs = self.graph(image, torch.where(class_index == -1, self.fill, class_index))
        cam = torch.where(class_index[..., None, None] == -2, self.absent, outputs[4])
        return outputs[0], outputs[1], outputs[2], outputs[3], cam, outputs[5], outputs[6]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("fill", "absent", "message"),
    [
        (0, 0.0, "does not rank classes by their logits"),
        (-1, 0.5, "cam is not zero where no class is wanted"),
        (-1, float("nan"), "cam is not zero where no class is wanted"),
    ],
)
def test_wrong_special_classes_are_found(tmp_path, fill, absent, message):
    model = make(export_networks.Staged)
    folder, manifest = user_export(model, Format.TORCHSCRIPT, GraphSpec("middle"))
    file = manifest.graphs[0].file
    torch.jit.save(torch.jit.script(Unranked(torch.jit.load(folder / file), fill, absent)), tmp_path / file)
    with pytest.raises(ExportError, match=message):
        check(model, (tmp_path, manifest))


def test_flat_maps_prove_nothing_and_it_is_said():
    model = make(export_networks.Untrained)
    lines = []
    parity = check(model, user_export(model, Format.TORCHSCRIPT, GraphSpec("middle")), lines)
    assert (parity["compared_maps"], parity["informative_maps"]) == (8, 0)
    assert lines[-1].startswith("warning: no map could be compared")


def test_a_network_that_gives_nan_is_not_verified():
    model = make(export_networks.Staged)
    exported = user_export(model, Format.TORCHSCRIPT, GraphSpec("middle"))
    with torch.no_grad():
        model.module.head[3].bias[0] = float("nan")
    with pytest.raises(ExportError, match="scores or gradients that are not finite"):
        check(model, exported)


class Doubling(export_networks.Staged):
    """Another network in float64: by its logits."""

    def forward(self, x):
        logits = super().forward(x)
        return logits * 2 if x.dtype == torch.float64 else logits


class Turning(export_networks.Staged):
    """Another network in float64: by its gradients alone."""

    def forward(self, x):
        logits = super().forward(x)
        if x.dtype != torch.float64:
            return logits
        others = logits.roll(1, dims=1)
        return logits.detach() + others - others.detach()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rounding_does_not_excuse_everything(precision):
    model = make(export_networks.Staged)
    exported = user_export(model, Format.TORCHSCRIPT, GraphSpec("middle", precision=precision))
    with pytest.raises(
        ExportError, match=rf"logits differs from float64 by 0.5, more than the {TOLERANCES[precision].forward_limit}"
    ):
        check(make(Doubling), exported)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("outputs", [tuple(Output), (Output.CAM,), (Output.GRADIENTS,)])
def test_maps_that_the_network_itself_misses_prove_nothing(outputs, precision):
    model = make(export_networks.Staged)
    spec = GraphSpec("middle", precision=precision, outputs=outputs, method=Method.HI_RES_CAM)
    with pytest.raises(ExportError, match=r"layer middle: (no map could be compared: the network|\w+ differs)"):
        check(make(Turning), user_export(model, Format.TORCHSCRIPT, spec))


def test_maps_of_activations_prove_nothing_about_gradients():
    """Eigen-CAM and the like agree, but what hangs on a class cannot be compared."""
    with pytest.raises(ExportError, match=r"layer last: no map could be compared"):
        check(make(Turning), network(make(export_networks.Staged)))


def test_no_comparable_map_is_an_error_if_there_were_maps(monkeypatch):
    model = make(export_networks.Staged, "last", "first")
    monkeypatch.setitem(comparison.TOLERANCES, "fp32", Tolerance(error=1e-4, forward_limit=0.0, limit=0.0))
    message = r"layer middle: no map could be compared: the network itself in fp32 misses all \d+ that are not flat"
    with pytest.raises(ExportError, match=message):
        check(model, user_export(make(export_networks.Staged), Format.TORCHSCRIPT, GraphSpec("middle")))
    parity = check(model, network(model))
    reasons = {entry["layer"]: entry["reason"] for entry in parity["left_out"]}
    assert list(reasons) == ["first"]
    assert "layer first: no map could be compared" in reasons["first"]
    assert len(parity["left_out"]) == sum(graph.layer == "first" for graph in network(model)[1].graphs)


@pytest.mark.parametrize("kind", SERVED)
def test_graphs_that_are_wrong_are_left_out_and_said_with_figures(kind):
    model, lines = make(export_networks.Edged, "last", "first"), []
    exported = SERVED[kind](model)
    parity = check(model, exported, lines)
    wrong = {(entry["layer"], entry["method"]) for entry in parity["left_out"]}
    if kind != "torchscript":
        assert wrong == {("first", method) for method in ("grad-cam-plus-plus", "layer-cam", "element-wise-grad-cam")}
        assert all("cam differs from float64 by 0.000" in entry["reason"] for entry in parity["left_out"])
    else:
        # Its graphs return the gradients themselves, which are wrong for every method.
        assert wrong == {("first", graph.method) for graph in exported[1].graphs if graph.layer == "first"}
        assert all("weights differs from float64 by 0.00" in entry["reason"] for entry in parity["left_out"])
    assert [line for line in lines if line.startswith("left out: ")] == [
        f"left out: {entry['reason']}" for entry in parity["left_out"]
    ]
    # What is wrong stands for nothing that is served.
    assert all(figure["error"] <= figure["bound"] for figure in parity["figures"].values())
    assert parity["figures"]["cam"]["bound"] == TOLERANCES["fp32"].error
    right = len(exported[1].graphs) - len(wrong)
    assert parity["compared_maps"] == right * (2 + 3)


def test_an_only_graph_is_compared_with_what_float32_determines():
    """As much as a change of two units in the last place of its weights does to the network, rounding may do to it."""
    model, lines = make(export_networks.Edged, "first"), []
    parity = check(model, user_export(model, Format.ONNX, GraphSpec("first", method=Method.LAYER_CAM)), lines)
    figure = parity["figures"]["cam"]
    assert 1e-4 < figure["error"] <= 1.1 * figure["torch_error"]
    assert figure["bound"] == TOLERANCES["fp32"].bound("cam", figure["torch_error"])
    assert parity["left_out"] == []
    assert [line for line in lines if "8 more times" in line]
    # Where such a change does nothing, it excuses nothing.
    with torch.no_grad():
        model.module.edge[0] = 0.5
    lines.clear()
    spec = GraphSpec("first", method=Method.LAYER_CAM, outputs=(Output.CAM,))
    with pytest.raises(ExportError, match=r"cam differs from float64 by 0\.0009\d, more than the 0\.0001 allowed"):
        check(model, user_export(make(export_networks.Edged, "first"), Format.ONNX, spec), lines)
    assert [line for line in lines if "8 more times" in line]


def test_what_is_not_finite_is_named(tmp_path):
    model = make(export_networks.Staged)
    folder, manifest, path = tampered(
        tmp_path, user_export(model, Format.ONNX, GraphSpec("middle", outputs=(Output.GRADIENTS,)))
    )
    graph = onnx.load(path)
    for tensor in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.dtype == np.float32 and values.ndim == 2:
            values[:] = np.nan
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, path)
    with pytest.raises(ExportError, match=r"test.onnx, layer middle: gradients are not finite"):
        check(model, (folder, manifest))


class SingleOnly(export_networks.Staged):
    """Has a dtype written into it, as some networks do."""

    def forward(self, x):
        return super().forward(x.float())


def test_a_network_that_does_not_run_in_float64_cannot_be_judged():
    model = make(SingleOnly)
    with pytest.raises(ExportError, match="the network cannot be run in float64 to verify the export"):
        check(model, user_export(model, Format.TORCHSCRIPT, GraphSpec("middle")))


def test_one_class(tmp_path):
    class Single(export_networks.Staged):
        def forward(self, x):
            return super().forward(x)[:, :1]

    model = replace(make(Single), class_count=1)
    manifest = export_graph(
        model,
        GraphSpec("last"),
        file_format=Format.TORCHSCRIPT,
        source="x",
        folder=tmp_path,
        report=lambda _: None,
    )
    parity = check(model, (tmp_path, manifest))
    assert parity["compared_maps"] == 8
    assert sorted(parity["figures"]) == sorted(FIGURES)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_are_as_many_as_before(two_threads):
    model, during = make(export_networks.Staged), []
    folder, manifest = user_export(model, Format.TORCHSCRIPT, GraphSpec("middle"))

    def run():
        verify(model, folder, manifest, report=lambda _: during.append(torch.get_num_threads()))

    run()
    assert (set(during), torch.get_num_threads()) == ({1}, 2)
    during.clear()
    elsewhere = threading.Thread(target=run)
    elsewhere.start()
    elsewhere.join()
    assert set(during) == {2}


FOLDER = files("heatlens_server.backends.torch.export") / "photos"


def test_photos_are_small_and_their_licences_are_told():
    told = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in PHOTOS:
        assert len((FOLDER / name).read_bytes()) <= 30_000
        assert f"`{name}`" in told


def test_photos_come_at_the_model_s_size_and_differ():
    images = load_photos(make(export_networks.Staged).preprocess)
    assert images.shape == (4, export_networks.PX, export_networks.PX, 3)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert all(images[a].std() > 20 and (a == b or np.any(images[a] != images[b])) for a in range(4) for b in range(4))


def test_oblong_inputs():
    spec = PreprocessSpec((300, 200), (299, 180), (0.5,) * 3, (0.5,) * 3, Interpolation.BICUBIC)
    assert load_photos(spec).shape == (4, 299, 180, 3)


class Dropping(export_networks.Staged):
    """Drops values out whatever mode it is in."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, training=True))


class Remembering(export_networks.Staged):
    """Counts its calls outside of its buffers."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls * 0.01)


class Alternating(export_networks.Staged):
    """Does every other call differently: in as many calls over the same photos, the same."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls % 2 * 0.01)


class Mixing(export_networks.Staged):
    """Centres what it sees over the batch."""

    def forward(self, x):
        logits = super().forward(x)
        return logits - 0.5 * logits.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Dropping, "different results for the same image: random operations, or state kept between calls"),
        (Remembering, "different results for the same image: random operations, or state kept between calls"),
        (Alternating, "in another batch: they depend on the other images, or on state kept between calls"),
        (Mixing, "different results for the same image in another batch: they depend on the other images"),
    ],
)
def test_a_network_that_disagrees_with_itself_is_no_judge(kind, message):
    model = make(export_networks.Staged)
    exported = user_export(model, Format.TORCHSCRIPT, GraphSpec("middle"))
    lines = []
    with pytest.raises(ExportError, match=message):
        check(make(kind), exported, lines)
    assert lines == ["running the network in float64"]
