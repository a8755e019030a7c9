"""Graphs in PyTorch's own formats."""

import numpy as np
import pytest
import torch
from torch import nn

import export_networks
from export_networks import assert_true, make, normalised, pixels, run_torch, tells_no_path, truth
from heatlens_server.backends.torch.export.torch_files import to_pt2, to_torchscript
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format, GraphSpec, InputKind, Output
from loaded_models import user_export

NAMES = [str(output) for output in Output]


def test_any_batch_and_number_of_classes_agree_with_float64():
    model = make(export_networks.Staged)
    folder, manifest = user_export(model, Format.PT2, GraphSpec("last", classes=None))
    path = folder / manifest.graphs[0].file
    assert tells_no_path(path)
    module = torch.export.load(path).module()
    for count, classes in ((1, 1), (5, 3)):
        class_ids = (np.arange(count * classes).reshape(classes, count) % export_networks.CLASSES).T
        found = run_torch(module, NAMES, normalised(pixels(count)), class_ids)
        np.testing.assert_array_equal(found["class_id"], class_ids)
        assert_true(found, truth(model, "last", pixels(count), class_ids))


def test_a_graph_of_one_batch_size_is_refused():
    graph = torch.fx.Graph()
    image, class_index = graph.placeholder("image"), graph.placeholder("class_index")
    graph.output((graph.call_function(torch.ops.aten.reshape.default, (image, [2, -1])), class_index))
    with pytest.raises(ExportError, match="the graph cannot be exported"):
        to_pt2(
            torch.fx.GraphModule(torch.nn.Module(), graph),
            make(export_networks.Staged),
            input_kind=InputKind.FLOAT,
            classes=1,
        )


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")

NAMES = [str(output) for output in Output]


def exported(**changes):
    model = make(export_networks.Staged)
    folder, manifest = user_export(model, Format.TORCHSCRIPT, GraphSpec("middle", **changes))
    return model, folder / manifest.graphs[0].file


@pytest.mark.parametrize("classes", [1, None])
def test_any_batch_agrees_with_float64(classes):
    model, path = exported(classes=classes)
    module = torch.jit.load(path)
    for count in (1, 5):
        class_ids = np.arange(count * (classes or 2)).reshape(count, -1) % export_networks.CLASSES
        found = run_torch(module, NAMES, normalised(pixels(count)), class_ids)
        assert_true(found, truth(model, "middle", pixels(count), class_ids))


def test_pixels_in_the_layout_that_images_come_in():
    model, path = exported(classes=None, input=InputKind.UINT8)
    module = torch.jit.load(path)
    images, class_ids = pixels(3), np.array([[0], [3], [5]])
    with torch.inference_mode():
        values = module(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(class_ids))
    found = {name: value.numpy() for name, value in zip(NAMES, values, strict=True)}
    assert_true(found, truth(model, "middle", images, class_ids))


def test_half_precision():
    model, path = exported(precision="fp16")
    found = run_torch(torch.jit.load(path), NAMES, normalised(pixels(3)), np.array([[1], [2], [3]]))
    assert_true(found, truth(model, "middle", pixels(3), np.array([[1], [2], [3]])), atol=0.02)


def test_nothing_of_this_machine_is_in_a_file():
    _, path = exported(classes=1)
    assert tells_no_path(path)


def test_an_operator_that_cannot_be_scripted_is_an_error():
    graph = torch.fx.Graph()
    graph.output((graph.call_function(_not_scriptable, (graph.placeholder("x"),)),))
    with pytest.raises(ExportError, match="the graph cannot be scripted"):
        to_torchscript(torch.fx.GraphModule(nn.Module(), graph))


def _not_scriptable(x, *anything):
    return x
