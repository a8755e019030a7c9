"""What is particular to the torch engine: hooks, frozen parameters, modes, precision."""

import dataclasses

import numpy as np
import pytest
import torch

import tiny_models
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds, TopK
from loaded_models import Judge, hook_count, loaded, noise

SPEC = MapSpec(Method.GRAD_CAM, ("body",), upsample=False)


def test_hooks_are_registered_once_and_gone_after_close():
    module = tiny_models.tiny()
    engine = TorchEngine(loaded(module, ("body", "stem")))
    assert hook_count(module) == 2
    for _ in range(3):
        engine.explain(noise(1), [TopK(2)], SPEC)
    assert hook_count(module) == 2
    engine.close()
    engine.close()
    assert hook_count(module) == 0


def test_nothing_is_stored_on_the_model():
    module = tiny_models.tiny()
    engine = TorchEngine(loaded(module))
    before = {name: set(vars(m)) for name, m in module.named_modules()}
    engine.explain(noise(2), [TopK(1)] * 2, SPEC)
    assert {name: set(vars(m)) for name, m in module.named_modules()} == before
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    engine.close()


def test_several_classes_cost_one_forward():
    module = tiny_models.tiny_mlp()
    engine = TorchEngine(loaded(module))
    forwards: list[int] = []
    module.stem.register_forward_hook(lambda _m, _a, out: forwards.append(len(out)))
    engine.explain(noise(3), [ClassIds((0, 1, 2, 3, 4))] * 3, SPEC)
    assert forwards == [3]


def test_only_the_tail_is_differentiated():
    module = tiny_models.tiny_mlp()
    engine = TorchEngine(loaded(module))
    tracked: dict[str, bool] = {}
    for name in ("stem", "body", "head"):
        module.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: tracked.__setitem__(name, out.requires_grad)
        )
    engine.explain(noise(1), [TopK(1)], SPEC)
    assert tracked == {"stem": False, "body": True, "head": True}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_grad_mode_does_not_matter(mode):
    engine = TorchEngine(loaded(tiny_models.tiny_mlp()))
    (expected,) = engine.explain(noise(1), [TopK(1)], SPEC)
    with mode():
        (result,) = engine.explain(noise(1), [TopK(1)], SPEC)
    np.testing.assert_array_equal(result.maps, expected.maps)


def test_model_that_runs_its_backbone_under_no_grad_is_explained():
    engine = TorchEngine(loaded(tiny_models.no_grad_backbone()))
    # A full backward pass cannot cross no_grad, so there is no judge; CAM's weights say what Grad-CAM must be here.
    (by_gradient,) = engine.explain(noise(1), [TopK(1)], SPEC)
    (by_weights,) = engine.explain(noise(1), [TopK(1)], MapSpec(Method.CAM, ("body",), upsample=False))
    assert by_gradient.maps.max() == 1.0
    np.testing.assert_allclose(by_gradient.maps, by_weights.maps, atol=1e-5)


@pytest.mark.parametrize("method", [Method.GRAD_CAM, Method.HI_RES_CAM])
def test_in_place_relu_after_the_target_layer_is_no_problem(method):
    """The target is the convolution itself: its output has negative values, which the ReLU overwrites."""
    engine, judge = TorchEngine(loaded(tiny_models.tiny_mlp(), ("body.0",))), Judge(tiny_models.tiny_mlp())
    (image,) = noise(1)
    (result,) = engine.explain(image[None], [ClassIds((5,))], MapSpec(method, ("body.0",), upsample=False))
    expected, _ = judge.maps(image, [5], method, ["body.0"], upsample=False)
    assert expected.max() == 1.0
    np.testing.assert_allclose(result.maps, expected, atol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.02), ("bf16", 0.1)])
def test_half_precision_is_close_and_finite(precision, tolerance):
    half = TorchEngine(loaded(tiny_models.tiny_mlp()), precision=precision)
    full = TorchEngine(loaded(tiny_models.tiny_mlp()))
    targets = [ClassIds((1, 8))] * 4
    for one, other in zip(half.explain(noise(4), targets, SPEC), full.explain(noise(4), targets, SPEC), strict=True):
        assert one.maps.dtype == np.float32
        assert one.maps.max() == 1.0
        assert np.abs(one.maps - other.maps).max() <= tolerance


class ThreeDimensions(tiny_models.Tiny):
    def forward(self, x):
        return self.body(self.stem(x))


class Strings(tiny_models.Tiny):
    def forward(self, x):
        return "logits"


@pytest.mark.parametrize(
    ("module", "message"),
    [(ThreeDimensions(), "shape"), (Strings(), "must return a tensor, not str")],
)
def test_model_that_cannot_be_explained_fails_at_load_and_keeps_no_hook(module, message):
    with pytest.raises(ModelLoadError, match=message):
        TorchEngine(loaded(module))
    assert hook_count(module) == 0


def test_model_that_views_feature_maps_runs_in_the_default_layout():
    class Views(tiny_models.TinyMlp):
        def forward(self, x):
            features = self.body(self.stem(x))
            return self.head(features.view(features.shape[0], -1))

    module = Views()
    module.load_state_dict(tiny_models.tiny_mlp().state_dict())
    expected = TorchEngine(loaded(tiny_models.tiny_mlp())).explain(noise(3), [TopK(2)] * 3, SPEC)
    results = TorchEngine(loaded(module)).explain(noise(3), [TopK(2)] * 3, SPEC)
    for result, other in zip(results, expected, strict=True):
        assert result.class_ids == other.class_ids
        np.testing.assert_allclose(result.maps, other.maps, atol=1e-5)


def test_output_with_logits_is_understood():
    class Wrapped(tiny_models.Tiny):
        def forward(self, x):
            return {"logits": super().forward(x)}

    engine = TorchEngine(dataclasses.replace(loaded(Wrapped()), reading=OutputReading("logits")))
    (result,) = engine.explain(noise(1), [TopK(1)], SPEC)
    assert result.logits.shape == (10,)


def test_missing_cuda_device_is_said():
    with pytest.raises(ModelLoadError, match="no device 'cuda:99'"):
        TorchEngine(loaded(tiny_models.tiny()), device="cuda:99")


def test_allocation_failure_is_a_memory_error():
    module = tiny_models.tiny()
    engine = TorchEngine(loaded(module))

    def allocate_too_much(_module, _args, _output):
        torch.empty(1 << 60)

    module.head.register_forward_hook(allocate_too_much)
    with pytest.raises(MemoryError):
        engine.explain(noise(1), [TopK(1)], SPEC)
