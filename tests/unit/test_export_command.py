"""Options of `heatlens-server export`: what they mean, and what is said about wrong ones."""

from pathlib import Path

import pytest

import tiny_models
from heatlens_server.config import ModelConfig, PreprocessConfig
from heatlens_server.core.errors import ConfigError, ExportError, ModelLoadError
from heatlens_server.core.graph_spec import Format, InputKind, Output
from heatlens_server.core.methods import Method, Score
from heatlens_server.export_command import describe, find_model, parse_options, run_export

TINY = """
[[models]]
name = "tiny"
source = "python:tiny_models:tiny"
[[models]]
name = "other"
source = "python:tiny_models:tiny_mlp"
"""
DEFAULTS = {
    "file_format": "onnx",
    "layer": "",
    "method": "",
    "classes": "1",
    "precision": "fp32",
    "outputs": "all",
    "input_kind": "float",
    "verify": True,
    "folder": Path("out"),
}


def tiny(source="tiny", layers=("body", "stem")):
    tiny_models.make_all()
    preprocess = PreprocessConfig(resize_px=64, crop_px=64)
    return ModelConfig(name="tiny", source=f"python:tiny_models:{source}", layers=layers, preprocess=preprocess)


def options(**changes):
    return parse_options(**{**DEFAULTS, "file_format": "torchscript", **changes})


def test_defaults():
    parsed = parse_options(**DEFAULTS)
    assert (parsed.file_format, parsed.method, parsed.classes, parsed.input) == (Format.ONNX, None, 1, InputKind.FLOAT)
    assert parsed.outputs == tuple(Output)


def test_values():
    parsed = options(method="layer-cam", classes="any", outputs="cam, logits,cam", input_kind="uint8", precision="fp16")
    assert (parsed.method, parsed.classes, parsed.input) == (Method.LAYER_CAM, None, InputKind.UINT8)
    assert parsed.outputs == (Output.LOGITS, Output.CAM)
    assert options(outputs="all,cam").outputs == tuple(Output)
    assert options(classes="12").classes == 12


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"file_format": "onnxx"}, "--format: 'onnxx' is none of onnx, torchscript, pt2; did you mean onnx?"),
        ({"method": "gradcam"}, "--method: 'gradcam' is none of cam, grad-cam,"),
        ({"target_score": "softmax"}, "--target-score: 'softmax' is none of logit, probability,"),
        ({"outputs": "cam,logit"}, "--outputs: 'logit' is none of logits, class_id, activations, gradients,"),
        ({"outputs": ","}, "--outputs: names none of logits,"),
        ({"input_kind": "int8"}, "--input: 'int8' is none of float, uint8"),
        ({"precision": "bf16"}, "--precision: must be fp32 or fp16, not 'bf16'"),
        ({"classes": "0"}, "--classes: must be a number from 1 on, or \"any\", not '0'"),
        ({"classes": "²"}, "--classes: must be a number from 1 on"),
        ({"classes": "-1"}, "--classes: must be a number from 1 on"),
    ],
)
def test_wrong_values_are_named_with_the_choices(wrong, message):
    with pytest.raises(ConfigError) as caught:
        parse_options(**{**DEFAULTS, **wrong})
    assert str(caught.value).startswith(message)


def test_models_are_found_by_name_or_source(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(TINY)
    assert find_model("other", path, "").source == "python:tiny_models:tiny_mlp"
    assert find_model("efficientnet_lite0", None, "").source == "embedded:efficientnet_lite0"
    found = find_model("torchvision:resnet18", None, "none")
    assert (found.name, found.source, found.weights) == ("resnet18", "torchvision:resnet18", "none")
    assert find_model("timm:resnet18.a1_in1k", None, "").name == "resnet18.a1_in1k"
    assert find_model("python:tiny_models:tiny", None, "").name == "tiny"


@pytest.mark.parametrize(
    ("model", "with_config", "weights", "message"),
    [
        ("othr", True, "", "MODEL: there is no model 'othr', only tiny, other; did you mean other?"),
        ("tiny", True, "none", "--weights: goes with a source such as torchvision:resnet50"),
        ("timm:resnet18", True, "", "--config: goes with a model's name, not with a source such as timm:resnet18"),
        ("tf:resnet18", False, "", 'MODEL: must be "onnx:FILE",'),
        ("timm:resnet18", False, "no/such.pth", "--weights: the file does not exist"),
    ],
)
def test_wrong_models(tmp_path, model, with_config, weights, message):
    path = tmp_path / "server.toml"
    path.write_text(TINY)
    with pytest.raises(ConfigError) as caught:
        find_model(model, path if with_config else None, weights)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "refine-cam"}, "--method: refine-cam is made of several layers' maps, and a graph has one: export"),
        ({"method": "score-cam"}, "--method: score-cam is no function of a layer's activations and gradients"),
        ({"method": "eigen-cam", "target_score": "contrast"}, "--target-score: eigen-cam differentiates nothing"),
        ({"method": "finer-cam", "target_score": "logit"}, "--target-score: finer-cam explains the contrast, not"),
    ],
)
def test_what_no_graph_of_one_layer_holds(tmp_path, wrong, message):
    with pytest.raises(ConfigError) as caught:
        run_export(tiny(), options(folder=tmp_path / "out", **wrong), tell=lambda _: None)
    assert str(caught.value).startswith(message)


def test_finer_cam_is_grad_cam_of_the_contrast(tmp_path):
    config = tiny("tiny_mlp", ("body",))
    manifest = run_export(config, options(method="finer-cam", folder=tmp_path / "finer"), tell=lambda _: None)
    (graph,) = manifest.graphs
    assert (graph.method, graph.score) == (Method.GRAD_CAM, Score.CONTRAST)
    assert "each explained class's contrast" in {info.name: info.meaning for info in manifest.outputs}["gradients"]
    assert describe(manifest, tmp_path / "finer")[0].startswith("tiny by body, grad-cam of the contrast, fp32")
    assert manifest.parity["figures"]["cam"]["error"] < 1e-3
    assert manifest.parity["informative_maps"]


def test_gradients_that_a_map_does_not_need_are_asked_for_by_name(tmp_path):
    for outputs, expected in (("all", False), ("all,gradients", True)):
        chosen = options(method="eigen-cam", outputs=outputs, verify=expected, folder=tmp_path / "out")
        manifest = run_export(tiny("tiny_mlp", ("body",)), chosen, tell=lambda _: None)
        assert (Output.GRADIENTS in manifest.graphs[0].outputs) is expected
    assert manifest.parity["informative_maps"]


def test_an_export_is_not_exported_again(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an export already"):
        find_model(f"export:{tmp_path}", None, "")


def test_export_and_what_is_said_about_it(tmp_path):
    lines = []
    config = tiny().model_copy(update={"method": Method.HI_RES_CAM})
    manifest = run_export(config, options(folder=tmp_path / "out"), tell=lines.append)
    (graph,) = manifest.graphs
    assert (graph.layer, graph.method) == ("body", Method.HI_RES_CAM)
    phases = [line.split(" s  ")[1] for line in lines]
    assert phases == [
        "loading tiny",
        "differentiating tiny by body",
        "writing tiny.ts",
        "running the network in float64",
        "verifying layer body",
    ]
    said = describe(manifest, tmp_path / "out")
    assert said[0] == "tiny by body, hi-res-cam, fp32, classes: 1"
    assert said[1].startswith(f"{tmp_path / 'out' / 'tiny.ts'}  0.")
    assert said[3].startswith(
        "verified against float64 on 4 photos at batch sizes 1, 3, 4; maps that could be compared: "
    )
    assert [line.split()[0] for line in said[4:]] == list(manifest.parity["figures"])


def test_layer_and_method_of_the_command_come_before_the_model_s(tmp_path):
    chosen = options(folder=tmp_path, layer="stem", method="cam", verify=False)
    with pytest.raises(
        ConfigError, match="--method: cam needs logits that are one linear layer over the pooled target"
    ):
        run_export(tiny(), chosen, tell=lambda _: None)
    manifest = run_export(tiny(), options(folder=tmp_path, layer="stem", verify=False), tell=lambda _: None)
    assert manifest.layers == ("stem",)
    assert describe(manifest, tmp_path)[-1] == "not verified"


@pytest.mark.parametrize(
    ("source", "changes", "error", "message"),
    [
        ("tiny", {"layer": "bodi"}, ConfigError, "--layer: there is no module 'bodi'; near: body"),
        ("tiny", {"classes": "11"}, ConfigError, "--classes: tiny has 10 classes, which is the most"),
        ("poisonous", {}, ExportError, "the network cannot be recorded for every batch size"),
        ("broken", {}, ModelLoadError, r"'tiny_models:broken' failed \(OSError\)"),
    ],
)
def test_what_does_not_fit_leaves_nothing(tmp_path, source, changes, error, message):
    with pytest.raises(error, match=message):
        run_export(tiny(source), options(folder=tmp_path / "out", **changes), tell=lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_is_a_wrong_option(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match=r"--output: .* is not empty and holds no earlier export"):
        run_export(tiny(), options(folder=tmp_path), tell=lambda _: None)


def test_a_folder_below_a_file_is_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("x")
    lines = []
    with pytest.raises(ConfigError, match=r"--output: .*file is not a folder"):
        run_export(tiny("broken"), options(folder=tmp_path / "file" / "child"), tell=lines.append)
    assert lines == []
