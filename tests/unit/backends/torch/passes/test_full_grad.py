"""FullGrad: completeness in float64, and parity with `grad-cam` 1.5.7."""

import copy

import pytest
import pytorch_grad_cam
import torch
import torchvision
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from heatlens_server.backends.torch.network.hooks import Substitution
from heatlens_server.backends.torch.passes.bias_gradients import bias_gradients
from heatlens_server.backends.torch.passes.full_grad import spread
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from loaded_models import noise
from one_pass_models import assert_parity, calibrated, placed, raw, stretched, top
from tiny_models import Tiny, no_grad_backbone, tiny, tiny_mlp


def frozen():
    """A ResNet whose normalisation is written with products and sums of buffers, as in torchvision's detectors."""
    net, live = torchvision.models.resnet18(num_classes=10, norm_layer=FrozenBatchNorm2d), calibrated("resnet18")
    net.load_state_dict({k: v for k, v in live.state_dict().items() if not k.endswith("num_batches_tracked")})
    return net


@pytest.mark.parametrize(
    ("name", "make", "count"),
    [
        # 20 convolutions without a bias, as many batch normalisations, a head.
        ("resnet18", lambda: calibrated("resnet18"), 21),
        ("frozen", frozen, 21),
        ("squeezenet1_1", lambda: calibrated("squeezenet1_1"), 26),
        ("shufflenet_v2_x0_5", lambda: calibrated("shufflenet_v2_x0_5"), 57),
        ("tiny_mlp", tiny_mlp, 4),
    ],
)
def test_input_and_biases_add_up_to_the_score(name, make, count):
    net = make().double().eval().requires_grad_(False)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    with Substitution(bias_gradients(lambda gradient, _: found.append(gradient.flatten(1).sum(1)))):
        scores = net(x.clone())[:, 3]
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    scores = scores.detach()
    assert len(found) == count
    from_input = (x * gradient).flatten(1).sum(1).detach()
    total = from_input + torch.stack(found).sum(0)
    assert ((scores - from_input).abs() > 1e-3 * scores.abs()).all()
    print(f"COMPLETENESS {name}: {float(((total - scores).abs() / scores.abs()).max()):.1e}")
    torch.testing.assert_close(total, scores, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v2"])
def test_parity_with_grad_cam(name):
    # Small: the package resizes every channel of every layer on its own.
    model, images = placed(calibrated(name), px=32), noise(2, 32)
    targets = top(model, images)
    (maps,) = raw(model, images, targets, Method.FULL_GRAD)
    assert maps.shape == (2, 2, 32, 32)
    module = copy.deepcopy(model.module).requires_grad_(requires_grad=True)
    with pytorch_grad_cam.FullGrad(module, []) as explainer:
        wanted = [ClassifierOutputTarget(target.ids[1]) for target in targets]
        expected = torch.from_numpy(explainer(model.inputs(images), wanted))
    # The package adds 1e-7 to the largest value of every channel, however small that is.
    assert_parity(f"full-grad {name} grad-cam", stretched(maps)[:, 1], expected, 1e-3)


def test_psi_stretches_every_channel_and_drops_flat_ones():
    contributions = torch.tensor([[[[1.0, -3.0]], [[-2.0, 4.0]], [[5.0, -5.0]]]])
    assert spread(contributions, (1, 2)).tolist() == [[[[0.0, 2.0]]]]


def test_the_bias_of_the_head_lies_on_no_place_of_the_image():
    net, other = tiny_mlp(), tiny_mlp()
    other.head[3].bias.data += 10.0
    maps, moved = (raw(placed(n), noise(1), [ClassIds((1,))], Method.FULL_GRAD)[0] for n in (net, other))
    assert maps.max() > 0
    assert torch.equal(maps, moved)


def test_a_backbone_under_no_grad_is_differentiated():
    guarded, plain = no_grad_backbone(), tiny()
    plain.load_state_dict(guarded.state_dict())
    maps, expected = (
        raw(placed(net, ("body",)), noise(2), [ClassIds((1,))] * 2, Method.FULL_GRAD) for net in (guarded, plain)
    )
    torch.testing.assert_close(maps, expected)


class Mixed(Tiny):
    """Mixes the stem's channels in the form that is asked for; all forms compute the same."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.mix = nn.Conv2d(8, 8, 1) if form == "map" else nn.Linear(8, 8)

    def forward(self, x):
        features = self.stem(x)
        if self.form == "map":
            features = self.mix(features)
        elif self.form == "channels-last":
            features = self.mix(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            features = self.mix(features.flatten(2).mT).mT.unflatten(2, (16, 16))
        return self.head(self.body(features).mean((-2, -1)))


@pytest.mark.parametrize("form", ["channels-last", "tokens"])
def test_biases_of_channels_last_maps_and_tokens_lie_on_the_image(form):
    other = Mixed("map")
    net = Mixed(form)
    net.load_state_dict({k: v.squeeze() if k == "mix.weight" else v for k, v in other.state_dict().items()})
    maps, expected = (
        raw(placed(n, ("mix",)), noise(2), [ClassIds((1,))] * 2, Method.FULL_GRAD)[0] for n in (net, other)
    )
    assert_parity(form, maps, expected, 1e-5)


class Unbatched(Tiny):
    """Adds to vectors and scalars, and runs parts without a batch, as the Swin of transformers does; it is Tiny."""

    def forward(self, x):
        features = self.body(self.stem(x))
        pooled = features.mean((-2, -1))
        rows = [self.head(row + torch.zeros(16)) for row in pooled]
        unbatched = nn.functional.conv2d(features[0], torch.ones(2, 16, 1, 1), torch.ones(2))
        nothing = (unbatched.sum() + torch.tensor(1.0)) * 0
        return torch.stack(rows) + nothing


def test_sums_of_vectors_and_parts_without_a_batch_are_no_maps():
    net = Unbatched()
    net.load_state_dict(tiny().state_dict())
    maps, expected = (
        raw(placed(n, ("body",)), noise(2), [ClassIds((1,))] * 2, Method.FULL_GRAD)[0] for n in (net, tiny())
    )
    torch.testing.assert_close(maps, expected)


def test_a_network_that_detaches_its_input_is_said():
    class Detached(Tiny):
        def forward(self, x):
            return super().forward(x.detach())

    with pytest.raises(InvalidArgument, match="does not depend"):
        raw(placed(Detached(), ("body",)), noise(1), [ClassIds((1,))], Method.FULL_GRAD)
