"""Whole graphs against float64: layers, methods, classes, inputs, precisions, batch sizes."""

import itertools

import numpy as np
import pytest
import torch

import export_networks
from export_networks import assert_true, make, normalised, pixels, run_torch, truth
from heatlens_server.backends.torch.export.differentiate import differentiate
from heatlens_server.core.graph_spec import MAP_OUTPUTS, GraphSpec, InputKind, Output
from heatlens_server.core.methods import ABSENT, CLOSED_FORMS, RANKED, Method, Score
from loaded_models import hook_count

NAMES = [str(output) for output in Output]


def ids(count, classes, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(export_networks.CLASSES)[:classes] for _ in range(count)])


@pytest.mark.parametrize("layer", ["first", "middle", "last"])
@pytest.mark.parametrize("classes", [1, 2, None])
def test_graph_agrees_with_float64_at_every_batch_size(layer, classes):
    model = make(export_networks.Staged)
    graph = differentiate(model, GraphSpec(layer, classes=classes))
    for count, asked in ((1, 1), (5, 3), (3, 4)):
        images, class_ids = pixels(count), ids(count, classes or asked, seed=3)
        found = run_torch(graph, NAMES, normalised(images), class_ids)
        np.testing.assert_array_equal(found["class_id"], class_ids)
        assert_true(found, truth(model, layer, images, class_ids))


def test_attention_behind_the_layer():
    model = make(export_networks.Tokens, "patch")
    graph = differentiate(model, GraphSpec("patch"))
    found = run_torch(graph, NAMES, normalised(pixels(3)), ids(3, 1))
    assert_true(found, truth(model, "patch", pixels(3), ids(3, 1)))


@pytest.mark.parametrize(
    ("method", "classes"),
    list(zip([m for m in CLOSED_FORMS if m is not Method.CAM], itertools.cycle([1, None]), strict=False)),
)
def test_every_method(method, classes):
    model = make(export_networks.Staged)
    graph = differentiate(model, GraphSpec("last", method, classes, outputs=(Output.LOGITS, *MAP_OUTPUTS)))
    class_ids = ids(3, classes or 2)
    found = run_torch(graph, ["logits", *MAP_OUTPUTS], normalised(pixels(3)), class_ids)
    assert list(found) == ["logits", "cam", "cam_scale", "cam_offset"]
    assert_true(found, truth(model, "last", pixels(3), class_ids, method))


@pytest.mark.parametrize("method", [Method.EIGEN_CAM, Method.RANDOM_CAM])
def test_methods_of_activations_alone_need_no_backward_pass(method):
    model = make(export_networks.Staged)
    alone = tuple(output for output in Output if output is not Output.GRADIENTS)
    graphs = {
        outputs: differentiate(model, GraphSpec("first", method, 2, outputs=outputs))
        for outputs in (alone, tuple(Output))
    }
    plain = torch.export.export(model.module, (torch.from_numpy(normalised(pixels(1))),), strict=False)
    count = sum(node.target == torch.ops.aten.conv2d.default for node in plain.graph.nodes)
    assert count > 1
    convolutions = {
        outputs: sum("conv" in str(node.target) for node in graph.graph.nodes) for outputs, graph in graphs.items()
    }
    assert convolutions[alone] == count < convolutions[tuple(Output)]
    wanted = ids(3, 2)
    wanted[1, 1] = ABSENT
    results = [
        run_torch(graph, [str(output) for output in outputs], normalised(pixels(3)), wanted)
        for outputs, graph in graphs.items()
    ]
    for found in results:
        assert not any(found[name][1, 1].any() for name in ("cam", "cam_scale", "cam_offset"))
        assert found["cam"][1, 0].any()
    for name in map(str, alone):
        np.testing.assert_allclose(results[0][name], results[1][name], atol=1e-5)


@pytest.mark.parametrize(
    ("score", "classes"), [(Score.PROBABILITY, None), (Score.LOG_PROBABILITY, 2), (Score.CONTRAST, None)]
)
def test_scores_other_than_the_logit(score, classes):
    model = make(export_networks.Staged)
    class_ids = ids(3, 2)
    class_ids[2, 1] = ABSENT
    found = run_torch(
        differentiate(model, GraphSpec("middle", classes=classes, score=score)), NAMES, normalised(pixels(3)), class_ids
    )
    assert_true(found, truth(model, "middle", pixels(3), class_ids, score=score))


def test_a_probability_in_half_precision_keeps_its_gradients():
    """Its derivative, 1e-7 here, is no float16 number; the gradients of the logits are."""
    model = make(export_networks.Staged)
    head = next(module for module in reversed(list(model.module.modules())) if isinstance(module, torch.nn.Linear))
    with torch.no_grad():
        head.bias[3] = 16.0
    spec = GraphSpec("middle", precision="fp16", score=Score.PROBABILITY)
    class_ids = np.full((3, 1), 3)
    found = run_torch(differentiate(model, spec), NAMES, normalised(pixels(3)), class_ids)
    expected = truth(model, "middle", pixels(3), class_ids, score=Score.PROBABILITY)
    assert 0 < np.abs(expected["gradients"]).max() < 1e-6
    assert_true(found, expected, atol=0.05)


def test_what_no_graph_can_be():
    with pytest.raises(ValueError, match="score-cam is no closed form"):
        GraphSpec("last", Method.SCORE_CAM)
    with pytest.raises(ValueError, match="eigen-cam differentiates nothing"):
        GraphSpec("last", Method.EIGEN_CAM, score=Score.CONTRAST)


def test_pixels_as_input():
    model = make(export_networks.Staged)
    graph = differentiate(model, GraphSpec("last", classes=2, input=InputKind.UINT8))
    images = pixels(4)
    found = run_torch(graph, NAMES, np.ascontiguousarray(images.transpose(0, 3, 1, 2)), ids(4, 2))
    assert_true(found, truth(model, "last", images, ids(4, 2)))


@pytest.mark.parametrize("classes", [1, None])
def test_half_precision(classes):
    model = make(export_networks.Staged)
    graph = differentiate(model, GraphSpec("last", classes=classes, precision="fp16"))
    found = run_torch(graph, NAMES, normalised(pixels(3)), ids(3, 1))
    assert {values.dtype for name, values in found.items() if name != "class_id"} == {np.dtype(np.float32)}
    assert_true(found, truth(model, "last", pixels(3), ids(3, 1)), atol=0.02)


@pytest.mark.parametrize("classes", [1, 3, None])
def test_ranked_and_absent_classes(classes):
    model = make(export_networks.Staged)
    graph = differentiate(model, GraphSpec("middle", classes=classes))
    wanted = np.full((3, classes or 3), RANKED)
    wanted[1, -1] = ABSENT
    found = run_torch(graph, NAMES, normalised(pixels(3)), wanted)
    order = np.argsort(-found["logits"], axis=1, kind="stable")[:, : wanted.shape[1]]
    order[1, -1] = ABSENT
    np.testing.assert_array_equal(found["class_id"], order)
    for name in ("gradients", "cam", "cam_scale", "cam_offset"):
        assert not found[name][1, -1].any()
    assert_true(found, truth(model, "middle", pixels(3), order))


def test_inputs_of_any_strides():
    model = make(export_networks.Tokens, "patch")
    images, class_ids = pixels(3), ids(3, 2)
    graph = differentiate(model, GraphSpec("patch", classes=None))
    with torch.inference_mode():
        image = torch.from_numpy(normalised(images)).to(memory_format=torch.channels_last)
        index = torch.from_numpy(class_ids).T.contiguous().T
        assert not index.is_contiguous()
        found = dict(zip(NAMES, (value.numpy() for value in graph(image, index)), strict=True))
    assert_true(found, truth(model, "patch", images, class_ids))


def test_the_model_is_left_as_it_was():
    model = make(export_networks.Staged)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    differentiate(model, GraphSpec("middle", precision="fp16"))
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert hook_count(model.module) == 0
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
