"""Principal-component smoothing against `grad-cam` 1.5.7's `eigen_smooth`, whose sign is left to chance."""

import copy

import pytest
import pytorch_grad_cam
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.core.targets import ClassIds
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.weights import weighted
from loaded_models import noise
from one_pass_models import assert_parity, calibrated, placed, raw, stretched, top
from tiny_models import tiny, tiny_mlp
from tiny_transformers import transformer

REFERENCES = {
    Method.GRAD_CAM: pytorch_grad_cam.GradCAM,
    Method.GRAD_CAM_PLUS_PLUS: pytorch_grad_cam.GradCAMPlusPlus,
    Method.HI_RES_CAM: pytorch_grad_cam.HiResCAM,
    Method.X_GRAD_CAM: pytorch_grad_cam.XGradCAM,
    Method.LAYER_CAM: pytorch_grad_cam.LayerCAM,
    Method.ELEMENT_WISE_GRAD_CAM: pytorch_grad_cam.GradCAMElementWise,
    Method.SHAPLEY_CAM: pytorch_grad_cam.ShapleyCAM,
}
NETWORKS = {
    "resnet18": (lambda: calibrated("resnet18"), "layer2"),
    "squeezenet1_1": (lambda: calibrated("squeezenet1_1"), "features.7"),
    "convnext": (lambda: transformer("convnext"), "stages.1.downsample"),
}


def test_every_method_that_weights_activations_is_here():
    assert all(method.traits.weights_activations for method in (*REFERENCES, Method.CAM))


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    make, layer = NETWORKS[request.param]
    return request.param, placed(make(), (layer,))


@pytest.mark.parametrize("method", REFERENCES)
def test_parity_with_grad_cam(case, method):
    (name, model), images = case, noise(2)
    targets = top(model, images)
    (maps,) = raw(model, images, targets, method, principal=True)
    (plain,) = raw(model, images, targets, method)
    layer = model.model.layers[0]
    module = copy.deepcopy(model.module).requires_grad_(requires_grad=True)

    def copied(_module, _args, output):
        output = output.clone()
        output.register_hook(torch.clone)
        return output

    module.get_submodule(layer).register_forward_hook(copied)
    with REFERENCES[method](module, [module.get_submodule(layer)]) as explainer:
        wanted = [ClassifierOutputTarget(target.ids[0]) for target in targets]
        found = torch.from_numpy(explainer(model.inputs(images), wanted, eigen_smooth=True))
    for n in range(2):
        # It correlates with the sum over channels: the sign that the package may or may not have.
        pair = torch.stack([maps[n, 0].flatten(), plain[n, 0].flatten()])
        assert torch.corrcoef(pair)[0, 1] >= 0
        signs = (maps[n, 0], -maps[n, 0])
        both = [
            stretched(torch.nn.functional.interpolate(sign.clamp(min=0)[None, None], (64, 64), mode="bilinear"))[0, 0]
            for sign in signs
        ]
        nearest = min(both, key=lambda one: float((one - found[n]).abs().max()))
        assert_parity(f"principal {method} {name} grad-cam", nearest, found[n], 1e-3)


@pytest.mark.parametrize("method", [m for m in CLOSED_FORMS if m.traits.weights_activations])
def test_weighted_activations_sum_to_the_map(method):
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2, 5, 3, 4, generator=generator)
    factors = torch.randn(2, 3, 5, *(() if method is Method.CAM else (3, 4)), generator=generator)
    products = weighted(method, activations, factors)
    assert products.shape == (2, 3, 5, 3, 4)
    torch.testing.assert_close(products.sum(2), raw_map(method, activations, factors))
    assert weighted(method, activations.half(), factors.half()).dtype == torch.float32


@pytest.mark.parametrize("method", [Method.CAM, Method.SHAPLEY_CAM])
def test_cam_and_shapley_cam_are_smoothed_too(method):
    model = placed(tiny() if method is Method.CAM else tiny_mlp(), ("body",))
    images, targets = noise(2), [ClassIds((1, 2))] * 2
    (maps,), (plain,) = (raw(model, images, targets, method, principal=p) for p in (True, False))
    assert maps.shape == plain.shape
    assert not torch.allclose(stretched(maps), stretched(plain), atol=0.05)
    (of_one,) = raw(model, images[1:], targets[1:], method, principal=True)
    torch.testing.assert_close(maps[1:], of_one, rtol=1e-3, atol=1e-5)
