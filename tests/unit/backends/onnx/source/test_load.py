"""What is found in a file, what is said of it, and what is refused."""

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import tiny_models
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.core.targets import ClassIds, Similarity, TopK, Values
from heatlens_server.core.tasks import Task
from heatlens_server.maps.steps.drive import STEPPERS
from loaded_models import noise
from onnx_files import write_onnx


def load(path, **changes):
    preprocess = {"mean": [0.5], "std": [0.25], **changes.pop("preprocess", {})}
    return load_file(path, ModelConfig(name="m", source=f"onnx:{path}", preprocess=preprocess, **changes))


@pytest.fixture
def tiny(tmp_path):
    return write_onnx(tiny_models.tiny(), tmp_path / "tiny.onnx")


class Ended(nn.Module):
    """A network and what it ends in."""

    def __init__(self, end, outputs=10):
        super().__init__()
        self.body, self.end = tiny_models.tiny(), end
        self.body.head = nn.Linear(16, outputs)

    def forward(self, x):
        return self.end(self.body(x))


def test_everything_of_a_classifier_is_found_and_said(tiny):
    loaded = load(tiny)
    assert loaded.info.task is Task.CLASSIFICATION
    assert (loaded.info.class_count, loaded.info.preprocess.crop_px) == (10, (64, 64))
    default, finer = loaded.info.layers
    assert (finer.height, finer.width) == (16, 16)
    assert (default.channels, default.height, default.width) == (16, 8, 8)
    assert loaded.info.has_linear_head
    (told,) = (sentence for sentence in loaded.assumptions if "layers overrides that" in sentence)
    assert told.endswith("through which the scores depend on places; layers overrides that.")
    assert len(loaded.version) == 12
    served = [line for line in loaded.layer_choices if line.endswith(", served")]
    assert served[-1] == f"layer {default.name!r}: 16 x 8 x 8, stage 2, served"
    assert len(served) == 2


def test_weights_beside_a_file_are_part_of_its_version(tmp_path, tiny):
    split = tmp_path / "split.onnx"
    onnx.save(onnx.load(tiny), split, save_as_external_data=True, location="weights.bin", size_threshold=0)
    before, again = (load(split).version for _ in range(2))
    beside = bytearray((tmp_path / "weights.bin").read_bytes())
    beside[:4] = np.float32(0.5).tobytes()
    (tmp_path / "weights.bin").write_bytes(beside)
    assert before == again != load(split).version


@pytest.mark.parametrize(
    ("end", "outputs", "task", "class_count"),
    [
        (nn.Softmax(1), 10, Task.CLASSIFICATION, 10),
        (nn.Sigmoid(), 10, Task.MULTI_LABEL, 10),
        (nn.Sigmoid(), 1, Task.BINARY, 2),
        (nn.Identity(), 1, Task.BINARY, 2),
    ],
)
def test_what_a_file_ends_in_is_left_behind_and_tells_the_task(tmp_path, end, outputs, task, class_count):
    module = Ended(end, outputs)
    loaded = load(write_onnx(module, tmp_path / "m.onnx"))
    assert (loaded.info.task, loaded.info.class_count) == (task, class_count)
    (image,) = noise(1)
    engine = NetworkEngine(loaded, device="cpu", threads=1)
    (result,) = engine.explain(image[None], [TopK(1)], MapSpec(Method.GRAD_CAM, engine.info.layers, upsample=False))
    inputs = torch.from_numpy((image / 255.0 - 0.5) / 0.25).permute(2, 0, 1)[None].float()
    logits = module.body(inputs)[0].detach().numpy()
    expected = [-logits[0], logits[0]] if task is Task.BINARY else logits
    np.testing.assert_allclose(result.logits, expected, atol=1e-5)
    if not isinstance(end, nn.Identity):
        assert any("maps explain that tensor's logits" in sentence for sentence in loaded.assumptions)


def test_both_sides_of_a_binary_classifier_have_opposite_raw_maps(tmp_path):
    loaded = load(write_onnx(Ended(nn.Identity(), 1), tmp_path / "m.onnx"))
    engine = NetworkEngine(loaded, device="cpu", threads=1)
    spec = MapSpec(Method.LAYER_CAM, engine.info.layers, upsample=False)
    (result,) = engine.explain(noise(1), [ClassIds((0, 1))], spec)
    raised = [result.maps[k].any() for k in (0, 1)]
    assert any(raised)
    assert result.logits[0] == -result.logits[1]


def test_values_and_embeddings_have_goals_of_their_own(tmp_path):
    path = write_onnx(Ended(nn.Identity(), 6), tmp_path / "m.onnx")
    images = noise(2)
    values = NetworkEngine(load(path, task="regression"), device="cpu", threads=1)
    spec = MapSpec(Method.HI_RES_CAM, values.info.layers, upsample=False)
    results = values.explain(images, [Values((2,)), Values((0, 5))], spec)
    assert [result.class_ids for result in results] == [(2,), (0, 5)]
    assert results[1].findings[1].value == results[1].values[5]
    vectors = NetworkEngine(load(path, task="embedding"), device="cpu", threads=1)
    reference = vectors.explain(images[:1], [Similarity(images[1])], spec)[0]
    other = vectors.explain(images[1:], [Similarity(images[0])], spec)[0]
    by_vector = vectors.explain(images[:1], [Similarity(other.embedding)], spec)[0]
    np.testing.assert_allclose(reference.findings[0].logit, by_vector.findings[0].logit, atol=1e-6)
    np.testing.assert_allclose(reference.maps, by_vector.maps, atol=1e-5)
    itself = vectors.explain(images[:1], [Similarity(images[0])], spec)[0]
    assert not itself.maps.any()


def test_cam_is_offered_where_the_head_is_linear(tmp_path, tiny):
    assert Method.CAM in NetworkEngine(load(tiny), device="cpu").info.methods
    mlp = write_onnx(tiny_models.tiny_mlp(), tmp_path / "mlp.onnx")
    assert Method.CAM not in NetworkEngine(load(mlp), device="cpu").info.methods


def test_any_tensor_that_lies_on_the_image_can_be_a_layer(tiny):
    candidates = [layer.name for layer in load(tiny).candidates]
    assert len(candidates) == 4
    loaded = load(tiny, layers=(candidates[0], candidates[2]))
    assert [layer.name for layer in loaded.info.layers] == [candidates[0], candidates[2]]
    with pytest.raises(ModelLoadError, match="layers: the file has no tensor 'nonsense'"):
        load(tiny, layers=("nonsense",))
    flat = next(v.name for v in onnx.load(tiny).graph.output)
    with pytest.raises(ModelLoadError, match="does not lie on the image"):
        load(tiny, layers=(flat,))


def test_a_layer_that_scores_read_at_one_place_is_explained_where_it_is_named(tmp_path):
    """By default it is not: its map would be that place, whatever the image shows."""

    class AtOnePlace(nn.Sequential):
        def forward(self, x):
            return super().forward(x)[:, :, 3, 3]

    network = AtOnePlace(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU(), nn.Conv2d(8, 6, 1))
    path = write_onnx(network, tmp_path / "place.onnx")
    with pytest.raises(ModelLoadError, match="the scores depend on no tensor of the file that lies on the image"):
        load(path)
    name = next(node.output[0] for node in onnx.load(path).graph.node if node.op_type == "Relu")
    assert [layer.name for layer in load(path, layers=(name,)).info.layers] == [name]


def test_a_size_that_the_file_leaves_open_is_assumed_or_given(tmp_path):
    path = write_onnx(tiny_models.tiny(), tmp_path / "any.onnx")
    model = onnx.load(path)
    for place, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_param = name
    onnx.save(model, path)
    assert any("crop_px = [224, 224]" in sentence for sentence in load(path).assumptions)
    loaded = load(path, preprocess={"crop_px": [96, 32]})
    assert loaded.info.preprocess.crop_px == (96, 32)
    assert (loaded.info.layers[0].height, loaded.info.layers[0].width) == (12, 4)


def test_a_size_that_the_file_contradicts_is_refused(tiny):
    with pytest.raises(ModelLoadError, match="input is of"):
        load(tiny, preprocess={"crop_px": 32})


class Untaught(nn.Module):
    """An operator without a derivative rule behind the features."""

    def __init__(self):
        super().__init__()
        self.body = tiny_models.tiny()

    def forward(self, x):
        features = self.body.body(self.body.stem(x))
        return torch.linalg.det(features[:, :10, :, :, None, None]).mean((2, 3))


def test_a_file_without_a_gradient_has_the_methods_that_need_none(tmp_path):
    loaded = load(write_onnx(Untaught(), tmp_path / "m.onnx"))
    engine = NetworkEngine(loaded, device="cpu", threads=1)
    assert set(engine.info.methods) == {
        m for m in (*CLOSED_FORMS, *STEPPERS) if not m.traits.needs_gradient and m is not Method.CAM
    }
    assert "Det" in engine.info.why_not(Method.GRAD_CAM)
    (result,) = engine.explain(noise(1), [TopK(2)], MapSpec(Method.EIGEN_CAM, engine.info.layers, upsample=True))
    assert result.maps.shape == (2, 64, 64)
    assert result.maps.max() == 1.0


class Mixing(nn.Module):
    """Takes the mean image off."""

    def __init__(self):
        super().__init__()
        self.body = tiny_models.tiny()

    def forward(self, x):
        return self.body(x - x.mean(0, keepdim=True) * 0.5)


@pytest.mark.parametrize(("factory", "takes_batches"), [(tiny_models.tiny_mlp, True), (Mixing, False)])
@pytest.mark.parametrize("batch", [None, 1])
def test_images_are_batched_where_that_changes_nothing(tmp_path, factory, takes_batches, batch):
    loaded = load(write_onnx(factory(), tmp_path / "m.onnx", batch=batch))
    assert loaded.info.takes_batches == takes_batches
    engine = NetworkEngine(loaded, device="cpu", threads=1)
    assert engine.info.runs_one_by_one != takes_batches
    images = noise(3)
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False)
    together = engine.explain(images, [TopK(1)] * 3, spec)
    for image, result in zip(images, together, strict=True):
        (alone,) = engine.explain(image[None], [TopK(1)], spec)
        np.testing.assert_allclose(result.maps, alone.maps, atol=1e-5)


class FullyConvolutional(nn.Module):
    """Averages a map of class scores, as SqueezeNet does."""

    def __init__(self):
        super().__init__()
        self.body = tiny_models.tiny()
        self.scores = nn.Sequential(nn.Conv2d(16, 10, 1), nn.ReLU())

    def forward(self, x):
        return self.scores(self.body.body(self.body.stem(x))).mean((2, 3))


def test_a_map_of_class_scores_is_no_layer(tmp_path):
    loaded = load(write_onnx(FullyConvolutional(), tmp_path / "m.onnx"))
    assert loaded.info.layers[0].channels == 16


def test_what_is_computed_of_the_images_size_is_no_layer(tmp_path):
    """As the padding of timm's tf_ networks."""
    path = write_onnx(tiny_models.tiny(), tmp_path / "m.onnx")
    model = onnx.load(path)
    graph = model.graph
    rounded = [
        onnx.helper.make_node("Shape", ["image"], ["size"], start=2, end=3),
        onnx.helper.make_node("Squeeze", ["size"], ["height"]),
        onnx.helper.make_node("Cast", ["height"], ["size_float"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Ceil", ["size_float"], ["size_up"]),
        onnx.helper.make_node("Div", ["size_up", "size_float"], ["one"]),
        onnx.helper.make_node("Mul", ["image", "one"], ["image_once"]),
    ]
    for node in graph.node:
        node.input[:] = ["image_once" if name == "image" else name for name in node.input]
    nodes = [*rounded, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, path)
    loaded = load(path)
    assert loaded.info.preprocess.mean == (0.5,) * 3
    assert loaded.info.layers[0].channels == 16


class WithMeasurements(nn.Module):
    """Takes an image and numbers; the second output needs the image alone."""

    def __init__(self):
        super().__init__()
        self.body, self.more = tiny_models.tiny(), nn.Linear(4, 10)

    def forward(self, x, numbers):
        scores = self.body(x)
        return scores + self.more(numbers), scores * 2


def test_a_second_input_that_scores_need_is_refused_by_name(tmp_path):
    path = tmp_path / "m.onnx"
    names = {"input_names": ["image", "numbers"], "output_names": ["both", "image_alone"]}
    given = torch.zeros(1, 3, 64, 64), torch.zeros(1, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(WithMeasurements().eval(), given, path, dynamo=False, opset_version=17, **names)
    for options in ({}, {"output": "both"}):
        with pytest.raises(ModelLoadError) as caught:
            load(path, **options)
        assert str(caught.value) == "the file has 2 inputs (image, numbers): one, the image, is served"


class OneScore(nn.Module):
    """A network with one score for each image, without an axis of classes."""

    def __init__(self, end, squeezed):
        super().__init__()
        self.body, self.end, self.squeezed = tiny_models.tiny(), end, squeezed
        self.body.head = nn.Linear(16, 1)
        # All of the activations count for the score, so that no map is flat.
        nn.init.constant_(self.body.head.weight, 0.1)

    def forward(self, x):
        scores = self.body(x)
        return self.end(scores.squeeze(1) if self.squeezed else scores.sum(1))


@pytest.mark.parametrize(
    ("end", "squeezed", "batch", "task", "output"),
    [
        (nn.Identity(), True, None, "auto", None),
        (nn.Identity(), False, 1, "binary-classification", "logits"),
        (nn.Identity(), True, 1, "regression", None),
        (nn.Sigmoid(), True, None, "binary-classification", "logits"),
        (nn.Sigmoid(), False, 1, "auto", None),
    ],
)
def test_one_score_of_each_image_needs_no_axis_of_classes(tmp_path, end, squeezed, batch, task, output):
    module = OneScore(end, squeezed)
    loaded = load(write_onnx(module, tmp_path / "m.onnx", batch=batch), task=task, output=output)
    assert loaded.info.task is (Task.REGRESSION if task == "regression" else Task.BINARY)
    engine = NetworkEngine(loaded, device="cpu", threads=1)
    images = noise(3)
    target = Values((0,)) if task == "regression" else ClassIds((1,))
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False)
    results = engine.explain(images, [target] * 3, spec)
    inputs = torch.from_numpy((images / 255.0 - 0.5) / 0.25).permute(0, 3, 1, 2).float()
    logits = module.body(inputs)[:, 0].detach().numpy()
    found = [(result.values if task == "regression" else result.logits)[-1] for result in results]
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert any(result.maps.any() for result in results)
    if task == "auto":
        assert any(sentence.startswith("The file has one output") for sentence in loaded.assumptions)


@pytest.mark.parametrize("kind", ["input", "dropout"])
def test_a_file_of_random_scores_is_refused_by_its_operators(tmp_path, kind):
    model = onnx.load(write_onnx(tiny_models.tiny(), tmp_path / "m.onnx"))
    (image,) = (value.name for value in model.graph.input)
    for node in model.graph.node:
        node.input[:] = ["noisy" if name == image else name for name in node.input]
    if kind == "input":
        noise = helper.make_node("RandomUniformLike", [image], ["noise"], dtype=TensorProto.FLOAT)
        added = [noise, helper.make_node("Add", [image, "noise"], ["noisy"])]
        operators = "RandomUniformLike"
    else:
        model.graph.initializer.extend(
            [onnx.numpy_helper.from_array(np.float32(0.5), "ratio"), onnx.numpy_helper.from_array(np.True_, "training")]
        )
        added = [helper.make_node("Dropout", [image, "ratio", "training"], ["noisy"])]
        operators = "Dropout"
    for place, node in enumerate(added):
        model.graph.node.insert(place, node)
    onnx.save(model, tmp_path / "random.onnx")
    with pytest.raises(ModelLoadError, match=rf"other scores each time it runs \(operators {operators}\)"):
        load(tmp_path / "random.onnx")


def test_random_numbers_that_no_score_depends_on_are_no_reason_to_refuse_a_file(tmp_path):
    model = onnx.load(write_onnx(tiny_models.tiny(), tmp_path / "m.onnx"))
    (image,) = (value.name for value in model.graph.input)
    noise = helper.make_node("RandomUniformLike", [image], ["noise"], dtype=TensorProto.FLOAT)
    model.graph.node.insert(0, noise)
    model.graph.output.append(helper.make_tensor_value_info("noise", TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "random.onnx")
    assert load(tmp_path / "random.onnx", output="logits").info.class_count == 10
