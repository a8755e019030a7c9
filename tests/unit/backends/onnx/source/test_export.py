"""What is exported of files that mix images or are quantised."""

import functools
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import nn

import tiny_models
from heatlens_server.backends.onnx.source.export import export_file, parity_of
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.config import ModelConfig
from heatlens_server.core.graph_spec import GraphSpec, Output
from heatlens_server.core.methods import Method
from heatlens_server.export_command import describe
from onnx_files import write_onnx

PX = 64


class Calibration(CalibrationDataReader):
    """Images of noise, by which ranges of values are chosen."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self._images = iter([{"image": rng.normal(size=(1, 3, PX, PX)).astype(np.float32)} for _ in range(4)])

    def get_next(self):
        return next(self._images, None)


class Mixing(nn.Module):
    """Takes the mean image off."""

    def __init__(self):
        super().__init__()
        self.body = tiny_models.tiny_mlp()

    def forward(self, x):
        return self.body(x - x.mean(0, keepdim=True) * 0.5)


def exported(path, folder, method=Method.GRAD_CAM, *, verify=True):
    """Export a file; returns the manifest, and what was told."""
    loaded = load_file(path, ModelConfig(name="m", source=f"onnx:{path}"))
    told = []
    outputs = (Output.LOGITS, Output.CLASS_ID, Output.CAM)
    spec = GraphSpec(loaded.info.layers[0].name, method, outputs=outputs)
    judge = functools.partial(parity_of, loaded, spec, told.append) if verify else None
    manifest = export_file(loaded, spec, name="m", source="onnx:m", folder=folder, judge=judge, report=told.append)
    return manifest, told


def check_takes_one_image(manifest, folder):
    assert {one.shape[0] for one in (*manifest.inputs, *manifest.outputs)} == {1}
    session = onnxruntime.InferenceSession(folder / "m.onnx")
    shape = manifest.inputs[0].shape[1:]
    for count in (1, 3):
        feeds = {"image": np.zeros((count, *shape), np.float32), "class_index": np.full((count, 1), -1)}
        if count == 1:
            assert session.run(["cam"], feeds)[0].shape[:2] == (1, 1)
        else:
            with pytest.raises(Exception, match="Got invalid dimensions for input: image"):
                session.run(["cam"], feeds)


def test_a_file_that_mixes_images_becomes_a_graph_of_one_image(tmp_path):
    path = write_onnx(Mixing(), tmp_path / "mixing.onnx")
    manifest, told = exported(path, tmp_path / "out", Method.EIGEN_CAM)
    assert any("mixes the images of a batch: the graph takes one image" in line for line in told)
    assert manifest.parity["batch_sizes"] == (1,)
    check_takes_one_image(manifest, tmp_path / "out")


def test_one_scale_for_all_images_becomes_a_graph_of_one_image(tmp_path):
    path = write_onnx(tiny_models.tiny_mlp(), tmp_path / "float.onnx")
    quantize_dynamic(path, tmp_path / "dynamic.onnx", weight_type=QuantType.QUInt8)
    manifest, _ = exported(tmp_path / "dynamic.onnx", tmp_path / "out")
    assert manifest.parity["figures"]["cam"]["error"] < 1e-4
    check_takes_one_image(manifest, tmp_path / "out")
    compared = "passes, and gradients against differences in float64, on noise at batch sizes 1;"
    assert any(compared in line for line in describe(manifest, tmp_path / "out"))
    figures = {name: figure for name, figure in manifest.parity["figures"].items() if name != "gradients"}
    without = replace(manifest, parity={**manifest.parity, "figures": figures})
    assert any("against the file's own passes on noise at" in line for line in describe(without, tmp_path / "out"))


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator], ids=["QDQ", "QOperator"])
def test_a_quantised_file_is_compared_before_onnxruntime_optimises_it(tmp_path, form):
    path = write_onnx(tiny_models.tiny_mlp(), tmp_path / "float.onnx")
    quantize_static(path, tmp_path / "quantised.onnx", Calibration(), quant_format=form)
    manifest, told = exported(tmp_path / "quantised.onnx", tmp_path / "out")
    assert any("without onnxruntime's optimisations" in line for line in told)
    assert manifest.parity["batch_sizes"] == (1, 3)
    assert manifest.parity["informative_maps"]
    assert max(manifest.parity["figures"][name]["error"] for name in ("logits", "cam")) < 1e-5
