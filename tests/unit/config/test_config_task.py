"""What a model does, as far as its configuration says."""

import pytest

from heatlens_server.config import load_config
from heatlens_server.core.errors import ConfigError


def load(tmp_path, text):
    file = tmp_path / "server.toml"
    file.write_text(f"models = [{{ name = 'a', source = 'timm:x', {text} }}]")
    return load_config(file).models[0]


def test_it_is_found_out_unless_it_is_said(tmp_path):
    assert load(tmp_path, "weights = 'none'").task == "auto"
    assert load(tmp_path, "task = 'multi-label-classification', engine = 'onnxruntime'").task.startswith("multi")
    sizes = load(tmp_path, "task = 'segmentation', preprocess = { resize_px = 300, max_side_px = 500 }").preprocess
    assert (sizes.resize_px, sizes.crop_px, sizes.max_side_px) == (300, None, 500)


def test_pixels_of_segmentation(tmp_path):
    plain = load(tmp_path, "task = 'segmentation'")
    assert (plain.activation, plain.threshold) == ("auto", None)
    model = load(tmp_path, "task = 'segmentation', activation = 'sigmoid', threshold = 0.25")
    assert (model.activation, model.threshold) == ("sigmoid", 0.25)


def test_files_have_every_task(tmp_path):
    (tmp_path / "m.onnx").touch()
    file = tmp_path / "server.toml"
    source = f"source = 'onnx:{tmp_path / 'm.onnx'}'"
    text = "task = 'detection', engine = 'onnxruntime', activation = 'softmax', detector = 'detr', boxes = 'xyxy'"
    file.write_text(f"models = [{{ name = 'a', {source}, {text} }}]")
    (model,) = load_config(file).models
    assert (model.detector, model.boxes, model.activation) == ("detr", "xyxy", "softmax")
    file.write_text(f"models = [{{ name = 'a', {source}, task = 'segmentation', detector = 'nms' }}]")
    with pytest.raises(ConfigError, match=r"models\[0\]\.detector: is for detection by"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task = 'detection', detector = 'yolov8'", 'models[0].detector: is for detection by "onnx:" sources'),
        ("task = 'detection', boxes = 'xyxy'", 'models[0].boxes: is for detection by "onnx:" sources'),
        ("task = 'detection', activation = 'softmax'", "models[0].activation: is for segmentation, and task is"),
        ("task = 'segmentaton'", "models[0].task: "),
        ("task = 'detection', engine = 'onnxruntime'", 'models[0].engine: "onnxruntime" runs exports'),
        ("task = 'embedding', engine = 'torchscript'", 'models[0].engine: "torchscript" runs exports'),
        ("preprocess = { max_side_px = 0 }", "models[0].preprocess.max_side_px: "),
        ("task = 'segmentation', activation = 'relu'", "models[0].activation: "),
        ("task = 'embedding', activation = 'sigmoid'", "models[0].activation: is for segmentation, and task is"),
        ("task = 'detection', threshold = 0.5", "models[0].threshold: is for segmentation, and task is 'detection'"),
        ("task = 'segmentation', threshold = 0", "models[0].threshold: "),
        ("task = 'segmentation', threshold = 1.0", "models[0].threshold: "),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_exports_are_of_classifiers(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    file = tmp_path / "server.toml"
    file.write_text(f"models = [{{ name = 'a', source = 'export:{tmp_path / 'bundle'}', task = 'detection' }}]")
    with pytest.raises(ConfigError, match=r"models\[0\]\.task: exports are of classifiers, not for detection"):
        load_config(file)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_files_are_computed_in_fp32(tmp_path, precision):
    (tmp_path / "m.onnx").write_bytes(b"")
    model = {"name": "m", "source": f"onnx:{tmp_path / 'm.onnx'}"}
    with pytest.raises(
        ConfigError, match=rf"models\[0\]\.precision: ONNX files are computed in fp32, not in {precision}"
    ):
        load_config(None, {"models": [{**model, "precision": precision}]})
    (loaded,) = load_config(None, {"models": [{**model, "precision": "fp32"}]}).models
    assert loaded.precision == "fp32"
