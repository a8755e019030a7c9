"""Networks whose heads run without gradients: what needs none works, what needs one is refused with the reason."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import tiny_models
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.layers import discover
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import InvalidArgument, ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from heatlens_server.fleet.warm_up import check_method, run_trial
from loaded_models import hook_count, loaded, noise

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
    "ignore:quantized.*autograd kernel:UserWarning",
)

NOT_RECORDED = "it runs under torch.no_grad, detaches what it computes, or computes it outside PyTorch"


class Head(tiny_models.Tiny):
    def features(self, x):
        return self.body(self.stem(x)).mean((-2, -1))


class NoGrad(Head):
    def forward(self, x):
        features = self.features(x)
        with torch.no_grad():
            return self.head(features)


class AllNoGrad(Head):
    @torch.no_grad()
    def forward(self, x):
        return self.head(self.features(x))


class Inference(Head):
    @torch.inference_mode()
    def forward(self, x):
        return self.head(self.features(x))


class Numpy(Head):
    def forward(self, x):
        features, weight = self.features(x).detach().numpy(), self.head.weight.detach().numpy()
        return torch.from_numpy(features @ weight.T) + self.head.bias


class UnusedBranch(Head):
    def __init__(self):
        super().__init__()
        self.unused = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        features = self.body(self.stem(x))
        self.unused(features)
        return self.head(features.mean((-2, -1)))


class EarlyDetached(Head):
    """The stem's gradient is cut off, the body's is not."""

    def forward(self, x):
        return self.head(self.body(self.stem(x).detach()).mean((-2, -1)))


def of_tiny(kind):
    module = kind()
    module.load_state_dict(tiny_models.tiny().state_dict())
    return module


def quantised():
    return torch.ao.quantization.quantize_dynamic(tiny_models.tiny().eval(), {nn.Linear})


NETWORKS = {
    "no_grad": (lambda: of_tiny(NoGrad), NOT_RECORDED),
    "all_no_grad": (lambda: of_tiny(AllNoGrad), NOT_RECORDED),
    "inference_mode": (lambda: of_tiny(Inference), "it runs under torch.inference_mode"),
    "numpy": (lambda: of_tiny(Numpy), NOT_RECORDED),
    "quantised": (quantised, "layers are quantised"),
}
GRADIENT_FREE = {method for method in Method if not method.traits.needs_gradient} - {
    method for method in Method if method.traits.preset
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_needs_no_gradient_is_offered_and_works(name):
    make, why = NETWORKS[name]
    engine = TorchEngine(loaded(make(), ("body", "stem")))
    # The head of a quantised network is no linear layer with a weight.
    expected = GRADIENT_FREE - ({Method.CAM} if name == "quantised" else set())
    assert set(engine.info.methods) == expected
    reason = f"the network computes no gradient behind layer 'body': {why}"
    assert engine.info.refusals[Method.GRAD_CAM] == reason
    for method in engine.info.requestable_methods:
        assert all(result.is_finite for result in run_trial(engine, noise(1), method))
    with pytest.raises(ModelLoadError, match="method grad-cam is not supported: the network computes no gradient"):
        check_method(engine, Method.GRAD_CAM)
    engine.close()


@pytest.mark.parametrize("name", ["no_grad", "all_no_grad", "inference_mode", "numpy"])
@pytest.mark.parametrize("method", [Method.CAM, Method.EIGEN_CAM, Method.FEM])
def test_their_maps_are_those_of_the_network_with_gradients(name, method):
    plain = TorchEngine(loaded(tiny_models.tiny()))
    cut = TorchEngine(loaded(NETWORKS[name][0]()))
    spec = MapSpec(method, ("body",), upsample=False)
    (expected,), (found,) = (engine.explain(noise(1), [ClassIds((3,))], spec) for engine in (plain, cut))
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-5)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)


def test_cam_is_grad_cam_without_its_gradient():
    plain = TorchEngine(loaded(tiny_models.tiny()))
    cut = TorchEngine(loaded(of_tiny(NoGrad)))
    (expected,) = plain.explain(noise(1), [ClassIds((3,))], MapSpec(Method.GRAD_CAM, ("body",), upsample=False))
    (found,) = cut.explain(noise(1), [ClassIds((3,))], MapSpec(Method.CAM, ("body",), upsample=False))
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-5)


def test_a_layer_behind_which_gradients_end_is_left_to_other_methods():
    engine = TorchEngine(loaded(of_tiny(EarlyDetached), ("body", "stem")))
    assert Method.GRAD_CAM in engine.info.methods
    assert engine.info.layers_of(Method.GRAD_CAM) == ("body",)
    assert engine.info.layers_of(Method.EIGEN_CAM) == ("body", "stem")
    with pytest.raises(InvalidArgument, match="grad-cam does not explain 'stem': the network computes no gradient"):
        engine.explain(noise(1), [ClassIds((0,))], MapSpec(Method.GRAD_CAM, ("stem",), upsample=False))


def test_a_layer_that_the_output_does_not_depend_on_is_refused():
    module = UnusedBranch()
    with pytest.raises(ModelLoadError, match="layers: the model's output does not depend on layer 'unused'"):
        TorchEngine(loaded(module, ("body", "unused")))
    assert hook_count(module) == 0


def test_the_tokens_of_a_quantised_transformer_are_found_as_those_of_the_network_itself():
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=3).eval()
    nn.init.normal_(network.head.weight)
    expected = discover(network, (64, 64)).layers
    found = discover(torch.ao.quantization.quantize_dynamic(network, {nn.Linear}), (64, 64)).layers
    assert found[0] == expected[0] == "blocks.2.norm1"
