"""ONNX files: valid, right at every batch size in onnxruntime, and telling nothing of where they were made."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import export_networks
from export_networks import assert_true, make, normalised, pixels, tells_no_path, truth
from heatlens_server.backends.torch.export import onnx_file
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format, GraphSpec, Output
from loaded_models import network, user_export


def exported():
    model = make(export_networks.Staged)
    folder, manifest = user_export(model, Format.ONNX, GraphSpec("middle", classes=None))
    return model, folder / manifest.graphs[0].file


def test_file_is_valid_and_says_what_it_takes_and_gives():
    _, path = exported()
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [onnx_file.OPSET]
    assert {entry.domain for entry in model.opset_import} == {""}
    assert [info.name for info in model.graph.input] == ["image", "class_index"]
    assert [info.name for info in model.graph.output] == [str(output) for output in Output]
    shapes = {
        info.name: [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in (*model.graph.input, *model.graph.output)
    }
    batch, classes = shapes["class_index"]
    assert shapes["image"] == [batch, 3, export_networks.PX, export_networks.PX]
    assert shapes["cam"] == [batch, classes, 16, 16]
    assert shapes["gradients"] == [batch, classes, 6, 16, 16]
    assert isinstance(batch, str)
    assert isinstance(classes, str)


def test_any_batch_and_number_of_classes_agree_with_float64():
    model, path = exported()
    session = onnxruntime.InferenceSession(path)
    names = [str(output) for output in Output]
    for count, classes in ((1, 1), (5, 3)):
        images = pixels(count)
        orders = [np.random.default_rng(n).permutation(export_networks.CLASSES) for n in range(count)]
        class_ids = np.stack(orders)[:, :classes]
        values = session.run(names, {"image": normalised(images), "class_index": class_ids})
        assert_true(dict(zip(names, values, strict=True)), truth(model, "middle", images, class_ids))


def test_nothing_of_this_machine_is_in_a_file():
    _, path = exported()
    assert tells_no_path(path)
    assert not any(node.metadata_props or node.doc_string for node in onnx.load(path).graph.node)
    folder, _ = network(make(export_networks.Staged, "last", "first"))
    assert all(tells_no_path(file) for file in folder.iterdir())


class Complex(torch.nn.Module):
    def forward(self, values):
        return torch.linalg.eigvalsh(values)


def test_an_operator_without_a_translation_is_named():
    program = torch.export.export(Complex(), (torch.eye(3)[None],))
    with pytest.raises(ExportError, match=r"cannot be translated to ONNX \(.*eigh"):
        onnx_file.to_onnx(program, input_names=["values"], output_names=["found"])
