"""Guided Grad-CAM against captum 0.9.0 and `grad-cam` 1.5.7; every way to write a ReLU."""

import pytest
import pytorch_grad_cam
import torch
import torch.nn.functional as F
from captum.attr import GuidedGradCam
from torch import nn

from heatlens_server.backends.torch.passes.one_pass import input_gradient
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from loaded_models import noise, without_hooks
from one_pass_models import assert_parity, calibrated, placed, raw, top
from tiny_models import Tiny, no_grad_backbone, tiny, tiny_mlp

LAYERS = {"squeezenet1_1": "features.7", "shufflenet_v2_x0_5": "stage3", "tiny_mlp": "body", "resnet18": "layer3"}


def made(name):
    return placed(tiny_mlp() if name == "tiny_mlp" else calibrated(name), (LAYERS[name],))


def reference(model):
    """A copy for libraries that replace or hook ReLUs, which must not work in place then."""
    module = without_hooks(model.module).requires_grad_(requires_grad=True)
    for child in module.modules():
        if isinstance(child, nn.ReLU):
            child.inplace = False
    return module


@pytest.mark.filterwarnings("ignore:Setting backward hooks:UserWarning")
@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "tiny_mlp"])
def test_parity_with_captum(name):
    model, images = made(name), noise(2)
    targets = top(model, images)
    (maps,) = raw(model, images, targets, Method.GUIDED_GRAD_CAM)
    assert maps.shape == (2, 2, 64, 64)
    module = reference(model)
    explainer = GuidedGradCam(module, module.get_submodule(LAYERS[name]))
    for k in range(2):
        inputs = model.inputs(images).requires_grad_()
        wanted = torch.tensor([target.ids[k] for target in targets])
        found = explainer.attribute(inputs, wanted, interpolate_mode="bilinear")
        assert_parity(f"guided-grad-cam {name} captum", maps[:, k], found.sum(1).detach())


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "tiny_mlp"])
def test_parity_with_grad_cam(name):
    """The package has the one factor and leaves the product to its user; its Grad-CAM has a test of its own."""
    model, images = made(name), noise(1)
    (target,) = top(model, images)
    (maps,) = raw(model, images, [target], Method.GUIDED_GRAD_CAM)
    (coarse,) = raw(model, images, [target], Method.GRAD_CAM)
    inputs = model.inputs(images)
    guided = pytorch_grad_cam.GuidedBackpropReLUModel(reference(model), device="cpu")(inputs, target.ids[0])
    mask = F.interpolate(coarse[:, :1].clamp(min=0), inputs.shape[2:], mode="bilinear")[:, 0]
    assert_parity(f"guided-grad-cam {name} grad-cam", maps[:, 0], mask * torch.from_numpy(guided).sum(-1))


class Written(Tiny):
    """The tiny network with its ReLUs written in some way."""

    def __init__(self, relu):
        super().__init__()
        self.load_state_dict(tiny().state_dict())
        self.relu = relu

    def forward(self, x):
        return self.head(self.relu(self.body[0](self.relu(self.stem[0](x)))).mean((-2, -1)))


@pytest.mark.parametrize(
    "relu",
    [
        nn.ReLU(inplace=True),
        F.relu,
        lambda x: F.relu(x, inplace=True),
        torch.relu,
        torch.relu_,
        lambda x: x.relu(),
        lambda x: x.relu_(),
        nn.ReLU6(inplace=True),
        F.relu6,
        nn.Hardtanh(0.0, 1e3),
        lambda x: F.hardtanh_(x, 0.0, 1e3),
    ],
)
def test_every_way_to_write_a_relu_is_guided(relu):
    """No activation of the tiny network reaches 6."""
    images, targets = noise(2), [ClassIds((1, 2))] * 2
    (maps,) = raw(placed(Written(relu), ("body.0",)), images, targets, Method.GUIDED_GRAD_CAM)
    (expected,) = raw(placed(tiny(), ("body.0",)), images, targets, Method.GUIDED_GRAD_CAM)
    torch.testing.assert_close(maps, expected)
    plain = placed(Written(lambda x: x.clamp(min=0)), ("body.0",))
    assert not torch.allclose(maps, raw(plain, images, targets, Method.GUIDED_GRAD_CAM)[0], rtol=0.1)


def test_relu6_lets_nothing_through_at_its_ceiling():
    """The score is the sum of relu6(x w) over places, with weights of both signs behind it."""

    class Ceiling(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 1, bias=False)
            self.layer.weight.data = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])[..., None, None]

        def forward(self, x):
            high = F.relu6(self.layer(x))
            return torch.stack([(high * torch.tensor([[[1.0]], [[-1.0]]])).sum((1, 2, 3)), high.sum((1, 2, 3))], 1)

    model, images = placed(Ceiling(), ("layer",)), noise(1)
    x = model.inputs(images)
    (maps,) = raw(model, images, [ClassIds((0, 1))], Method.GUIDED_GRAD_CAM)
    (coarse,) = raw(model, images, [ClassIds((0, 1))], Method.GRAD_CAM)
    opened = ((3 * x[:, :2] > 0) & (3 * x[:, :2] < 6)).float() * 3
    guided = torch.stack([opened[:, 0], opened.sum(1)], 1)  # the negative weight's gradient ends at the ReLU
    assert (3 * x[:, 0] > 6).any()
    torch.testing.assert_close(maps, coarse.clamp(min=0) * guided)


def test_without_a_relu_it_is_the_plain_gradient():
    net = Written(F.silu)
    model, images = placed(net, ("body.0",)), noise(1)
    (maps,) = raw(model, images, [ClassIds((2,))], Method.GUIDED_GRAD_CAM)
    (coarse,) = raw(model, images, [ClassIds((2,))], Method.GRAD_CAM)
    x = model.inputs(images).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x)[0, 2], x)
    mask = F.interpolate(coarse.clamp(min=0), (64, 64), mode="bilinear")
    torch.testing.assert_close(maps, mask * gradient.sum(1, keepdim=True))


def test_several_layers_have_a_map_each():
    net = tiny_mlp()
    layers = ("body", "stem")
    model, images, targets = placed(net, layers), noise(2), [ClassIds((1, 2))] * 2
    both = raw(model, images, targets, Method.GUIDED_GRAD_CAM, layers=layers)
    for layer, maps in zip(layers, both, strict=True):
        torch.testing.assert_close(maps, raw(model, images, targets, Method.GUIDED_GRAD_CAM, layers=(layer,))[0])


def test_a_backbone_under_no_grad_is_differentiated():
    guarded, plain = no_grad_backbone(), tiny()
    plain.load_state_dict(guarded.state_dict())
    nets = (placed(guarded, ("body",)), placed(plain, ("body",)))
    maps, expected = (raw(net, noise(2), [ClassIds((1,))] * 2, Method.GUIDED_GRAD_CAM)[0] for net in nets)
    torch.testing.assert_close(maps, expected)


def test_gradients_that_grow_out_of_float16_are_followed_all_the_same():
    model = placed(tiny(), ("body",), precision="fp16")
    leaf = torch.ones(1, 3, 4, 4, dtype=torch.float16, requires_grad=True)
    tries = []
    # 300 times the scale of 256 is no float16.
    score = (leaf * 300.0).float().mean()
    found = input_gradient(model, score * 48, leaf, retain_graph=False, start=lambda: tries.append(1))
    torch.testing.assert_close(found, torch.full_like(leaf, 300.0, dtype=torch.float32))
    assert len(tries) == 2
