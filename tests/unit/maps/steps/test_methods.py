"""Methods of many runs: what they compute, in what steps, at what cost, and what they leave behind."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny_models
from heatlens_server.backends.torch.cam.grid import Grid, Layout, to_map
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.targets import ClassIds, TopK
from heatlens_server.maps.methods import smooth_grad_cam_plus_plus
from heatlens_server.maps.noise import standard_normal
from heatlens_server.maps.steps.drive import STEPPERS
from loaded_models import loaded, noise
from step_jobs import drain, job, placed

TOKENS = Grid(Layout.TOKENS, prefix=1, height=4, width=4)
LAST = Grid(Layout.CHANNELS_LAST)
PYRAMID = Grid(Layout.PYRAMID)


class Shaped(nn.Module):
    """A network whose layer `body` returns what a subclass makes of a map (N, 8, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 16, stride=16)
        self.body = nn.Identity()
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pooled(self.body(self.shaped(self.stem(x).tanh()))))


class Transformer(Shaped):
    """A class token that attends to the others."""

    def shaped(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).mT
        return torch.cat([tokens.mean(1, keepdim=True) + 1, tokens], dim=1)

    def pooled(self, tokens: Tensor) -> Tensor:
        return ((self.mix(tokens) @ tokens.mT).softmax(-1) @ tokens)[:, 0]


class ChannelsLast(Shaped):
    """Windowed transformers' layout."""

    def shaped(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1)

    def pooled(self, features: Tensor) -> Tensor:
        return self.mix(features).relu().mean((1, 2))


class FeaturePyramid(Shaped):
    """Two levels of 8 channels."""

    def shaped(self, features: Tensor) -> dict[str, Tensor]:
        return {"fine": F.interpolate(features, scale_factor=2), "coarse": features.flip(1)}

    def pooled(self, levels: dict[str, Tensor]) -> Tensor:
        fine = self.mix(levels["fine"].movedim(1, -1)).relu().mean((1, 2))
        return fine + levels["coarse"].amax((-2, -1))


def network(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind()


SHAPED = {Transformer: TOKENS, ChannelsLast: LAST, FeaturePyramid: PYRAMID}
METHODS = list(STEPPERS)
IMAGE = noise(1)[0]


def raw(method, model, target, rows=16, **options) -> Tensor:
    return drain(STEPPERS[method](job(model, IMAGE, target, rows=rows, **options)))[0]


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_the_rows_of_a_step(method):
    model = placed(tiny_models.tiny_mlp(), "body")
    expected = raw(method, model, TopK(2), rows=16)
    assert expected.shape == (1, 2, *((64, 64) if method is Method.RISE else (8, 8)))
    assert float(expected.std()) > 0
    for rows in (1, 3):
        found = raw(method, model, TopK(2), rows=rows)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_goals_share_every_run_forward(method):
    model = placed(tiny_models.tiny_mlp(), "body")
    many, steps = drain(STEPPERS[method](job(model, IMAGE, ClassIds((4, 1, 7)), rows=16)))
    for k, class_id in enumerate((4, 1, 7)):
        alone, steps_alone = drain(STEPPERS[method](job(model, IMAGE, ClassIds((class_id,)), rows=16)))
        torch.testing.assert_close(many[:, k], alone[:, 0], rtol=1e-4, atol=1e-5 * float(alone.abs().max()))
        # Each goal's gradients are a run backward.
        assert steps == (3 * steps_alone if method.traits.needs_gradient else steps_alone)


@pytest.mark.parametrize(
    ("method", "runs"),
    [
        (Method.SMOOTH_GRAD_CAM_PLUS_PLUS, 4),
        (Method.SCORE_CAM, 15),
        (Method.IS_CAM, 10 * 15),
        (Method.SS_CAM, 35 * 15),
        (Method.ABLATION_CAM, 1 + 15),
        (Method.RECIPRO_CAM, 8 * 8),
        (Method.RISE, 1000),
    ],
)
def test_cost(method, runs):
    """A channel of zeros and one of ones: 14 masks and one for both, 15 channels to take out and one that is out."""
    module = tiny_models.tiny_mlp()
    for channel, value in ((3, -1.0), (8, 1.0)):
        torch.nn.init.zeros_(module.body[0].weight[channel])
        torch.nn.init.constant_(module.body[0].bias[channel : channel + 1], value)
    model = placed(module, "body")
    image = job(model, IMAGE, TopK(1), rows=5)
    assert int((image.features.amax((-2, -1)) > 0).sum()) == 15
    drain(STEPPERS[method](image))  # the way to replay is found once
    seen: list[int] = []
    module.head.register_forward_hook(lambda _m, _a, out: seen.append(len(out)))
    steps = STEPPERS[method](image)
    at = 0
    for _ in steps:
        assert 0 < sum(seen[at:]) <= 5, "a step runs the network on at most `rows` rows"
        at = len(seen)
    assert at == len(seen), "nothing runs behind the last step"
    assert sum(seen) == runs


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_two_images_may_be_interleaved_with_anything(method):
    engine = TorchEngine(loaded(tiny_models.tiny_mlp()))
    spec = MapSpec(method, ("body",), upsample=True)
    images = noise(2, seed=4)

    def steps(image):
        return engine.steps(image, TopK(1), spec, rows=16)

    def end(generator):
        while True:
            try:
                next(generator)
            except StopIteration as stop:
                return stop.value

    expected = [end(steps(image)) for image in images]
    running = dict(enumerate(steps(image) for image in images))
    results = {}
    with torch.inference_mode():
        while running:
            for n, generator in list(running.items()):
                try:
                    next(generator)
                except StopIteration as stop:
                    results[n] = stop.value
                    del running[n]
            engine.explain(images, [TopK(2)] * 2, MapSpec(Method.GRAD_CAM, ("body",), upsample=False))
    for n, result in enumerate(expected):
        np.testing.assert_array_equal(results[n].maps, result.maps)
        assert results[n].class_ids == result.class_ids
    engine.close()


@pytest.mark.parametrize("method", METHODS)
def test_closing_half_way_lets_go_of_everything(method, monkeypatch):
    model = placed(tiny_models.tiny_mlp(), "body")
    made: list[weakref.ref[Tensor]] = []
    run = model.run

    def watched(inputs):
        output = run(inputs)
        made.extend([weakref.ref(inputs), weakref.ref(output)])
        return output

    work = job(model, IMAGE, TopK(2), rows=3)
    monkeypatch.setattr(model, "run", watched)
    made.extend([weakref.ref(work.inputs), weakref.ref(work.output)])
    steps = STEPPERS[method](work)
    del work
    for _ in range(2):
        next(steps)
    assert made[0]() is not None
    steps.close()
    assert [reference for reference in made if reference() is not None] == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method, precision):
    exact = raw(method, placed(tiny_models.tiny_mlp(), "body"), ClassIds((2,)))
    found = raw(method, placed(tiny_models.tiny_mlp(), "body", precision=precision), ClassIds((2,)))
    assert found.dtype is torch.float32
    assert found.isfinite().all()
    assert float(torch.corrcoef(torch.stack([found.flatten(), exact.flatten()]))[0, 1]) > 0.95


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_of_nothing_is_a_map_of_nothing(method, precision):
    module = tiny_models.tiny_mlp()
    torch.nn.init.zeros_(module.body[0].weight)
    torch.nn.init.zeros_(module.body[0].bias)
    found = raw(method, placed(module, "body", precision=precision), TopK(1))
    assert found.eq(0).all()


@pytest.mark.parametrize("method", [Method.ABLATION_CAM, Method.RECIPRO_CAM, Method.SMOOTH_GRAD_CAM_PLUS_PLUS])
def test_a_score_that_never_changes_is_a_map_of_nothing(method):
    module = tiny_models.tiny()
    torch.nn.init.zeros_(module.head.weight)
    assert raw(method, placed(module, "body"), TopK(1)).eq(0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SHAPED, ids=lambda kind: kind.__name__)
def test_every_layout_has_every_method(kind, method):
    model = placed(network(kind), "body", grids={"body": SHAPED[kind]})
    if kind is FeaturePyramid and method is Method.SMOOTH_GRAD_CAM_PLUS_PLUS:
        with pytest.raises(TypeError, match="pyramid"):
            raw(method, model, TopK(2))
        return
    found = raw(method, model, TopK(2))
    assert found.shape == (1, 2, *((64, 64) if method is Method.RISE else (4, 4)))
    assert found.isfinite().all()
    assert float(found.std()) > 0


@pytest.mark.parametrize("kind", SHAPED, ids=lambda kind: kind.__name__)
def test_recipro_cam_is_the_score_of_every_place_alone(kind):
    module, grid = network(kind), SHAPED[kind]
    model = placed(module, "body", grids={"body": grid})
    found = raw(Method.RECIPRO_CAM, model, ClassIds((6, 2)), score=Score.PROBABILITY)
    output = job(model, IMAGE, ClassIds((6, 2)), rows=1).output
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    scores = torch.empty(2, 4, 4)
    for i in range(4):
        for j in range(4):
            if kind is Transformer:
                mask = torch.zeros(6, 6)
                mask[i : i + 3, j : j + 3] = kernel
                kept = torch.cat([torch.ones(1), mask[1:5, 1:5].flatten()])[None, :, None]
                alone = output * kept
            elif kind is ChannelsLast:
                alone = torch.zeros_like(output)
                alone[:, i, j] = output[:, i, j]
            else:
                alone = {name: torch.zeros_like(level) for name, level in output.items()}
                alone["coarse"][..., i, j] = output["coarse"][..., i, j]
                fine = (..., slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
                alone["fine"][fine] = output["fine"][fine]
            with torch.no_grad():
                scores[:, i, j] = module.head(module.pooled(alone)).softmax(-1)[0, [6, 2]]
    expected = scores - scores.amin((-2, -1), keepdim=True)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", SHAPED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("score", [Score.LOGIT, Score.LOG_PROBABILITY])
def test_ablation_cam_weighs_channels_by_how_far_the_score_falls(kind, score):
    module, grid = network(kind), SHAPED[kind]
    model = placed(module, "body", grids={"body": grid})
    target = ClassIds(tuple(range(10)))
    found = raw(Method.ABLATION_CAM, model, target, score=score)
    output = job(model, IMAGE, target, rows=1).output

    def scores(layer_output):
        with torch.no_grad():
            logits = module.head(module.pooled(layer_output))[0]
        return logits.log_softmax(-1) if score is Score.LOG_PROBABILITY else logits

    whole, features = scores(output), to_map(output, grid)
    assert (whole < 0).any(), "where the paper's quotient would change the sign"
    expected = torch.zeros(10, 4, 4)
    for channel in range(features.shape[1]):
        if kind is Transformer:
            without = output.clone()
            without[:, 1:, channel] = 0
        elif kind is ChannelsLast:
            without = output.clone()
            without[..., channel] = 0
        else:
            without = {name: level.clone() for name, level in output.items()}
            without["fine" if channel < 8 else "coarse"][:, channel % 8] = 0
        expected += ((whole - scores(without)) / whole.abs())[:, None, None] * features[0, channel]
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-5)


def test_smooth_grad_cam_averages_over_its_noise():
    module = tiny_models.tiny_mlp()
    model = placed(module, "body")
    work = job(model, IMAGE, ClassIds((3,)), rows=3)
    found, steps = drain(STEPPERS[Method.SMOOTH_GRAD_CAM_PLUS_PLUS](work))
    assert steps == 2
    gradients = []
    for field in 0.3 * standard_normal(range(4), (3, 64, 64), work.inputs):
        leaf = module.body(module.stem(work.inputs + field)).detach().requires_grad_()
        module.head(leaf)[0, 3].backward()
        gradients.append(leaf.grad)
    powers = [torch.stack(gradients).pow(power).mean(dim=0)[:, None] for power in (1, 2, 3)]
    assert torch.stack(gradients).std(dim=0).max() > 0, "noise changes the gradients of this head"
    torch.testing.assert_close(found, smooth_grad_cam_plus_plus(work.features, *powers), rtol=1e-3, atol=1e-7)
