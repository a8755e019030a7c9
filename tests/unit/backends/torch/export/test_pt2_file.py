"""Exported programs, .pt2."""

import numpy as np
import pytest
import torch

import exports
from engine_cases import user_export
from exports import assert_true, make, normalised, pixels, run_torch, tells_no_path, truth
from heatlens_server.backends.torch.export import pt2_file
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format, GraphSpec, InputKind, Output

NAMES = [str(output) for output in Output]


def test_any_batch_and_number_of_classes_agree_with_float64():
    model = make(exports.Staged)
    folder, manifest = user_export(model, Format.PT2, GraphSpec("last", classes=None))
    path = folder / manifest.graphs[0].file
    assert tells_no_path(path)
    module = torch.export.load(path).module()
    for count, classes in ((1, 1), (5, 3)):
        class_ids = (np.arange(count * classes).reshape(classes, count) % exports.CLASSES).T
        found = run_torch(module, NAMES, normalised(pixels(count)), class_ids)
        np.testing.assert_array_equal(found["class_id"], class_ids)
        assert_true(found, truth(model, "last", pixels(count), class_ids))


def test_a_graph_of_one_batch_size_is_refused():
    graph = torch.fx.Graph()
    image, class_index = graph.placeholder("image"), graph.placeholder("class_index")
    graph.output((graph.call_function(torch.ops.aten.reshape.default, (image, [2, -1])), class_index))
    with pytest.raises(ExportError, match="the graph cannot be exported"):
        pt2_file.to_program(
            torch.fx.GraphModule(torch.nn.Module(), graph),
            make(exports.Staged),
            input_kind=InputKind.FLOAT,
            classes=1,
        )
