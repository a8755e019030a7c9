"""Finding target layers: the choice on known networks, the rules on tiny ones, and no traces left behind."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from heatlens_server.backends.torch.sources.layers import discover
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Grid, Layout
from loaded_models import hook_count


class Tiny(nn.Module):
    """stem (16x16), twice (8x8, shared), body (8x8 = body.2's tensor), then a linear head."""

    def __init__(self, classes=5, channels=6):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Sequential(nn.Conv2d(4, channels, 3, 1, 1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.same = nn.Identity()
        self.drop = nn.Dropout()
        self.gather = nn.AdaptiveAvgPool2d(2)
        self.flat = nn.Flatten()
        self.head = nn.Linear(4 * channels, classes)
        self.unused = nn.Conv2d(1, 1, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        x = self.act(self.pool(self.act(self.stem(x))))
        return self.head(self.flat(self.gather(self.drop(self.same(self.body(x))))))


def tiny(**options):
    torch.manual_seed(0)
    return Tiny(**options).eval()


TORCHVISION = {
    "resnet18": ("layer4", "layer3", "layer2", "layer1", "relu"),
    "densenet121": ("features", "features.denseblock3", "features.denseblock2", "features.denseblock1"),
    "vgg11": ("features", "features.19", "features.14", "features.9", "features.4", "features.1"),
    "alexnet": ("features",),
    "mobilenet_v2": ("features", "features.13", "features.6", "features.3", "features.1"),
    "mobilenet_v3_small": ("features", "features.8", "features.3", "features.1", "features.0"),
    "efficientnet_b0": ("features", "features.5", "features.3", "features.2", "features.1"),
    "convnext_tiny": ("features", "features.5", "features.3", "features.1"),
    "squeezenet1_1": ("features", "features.7", "features.4", "features.1"),
    "googlenet": ("inception5b", "inception4e", "inception3b", "conv3", "conv1"),
    "shufflenet_v2_x0_5": ("conv5", "stage3", "stage2", "maxpool", "conv1"),
    "mnasnet0_5": ("layers", "layers.11", "layers.9", "layers.8", "layers.7"),
    "regnet_y_400mf": ("trunk_output", "trunk_output.block3", "trunk_output.block2", "trunk_output.block1", "stem"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks(name):
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    module = torchvision.models.get_model(name, weights=None, **options).eval()
    found = discover(module, (96, 96))
    expected = TORCHVISION[name]
    assert found.layers[: len(expected)] == expected
    assert found.class_count == 1000
    assert hook_count(module) == 0


@pytest.mark.parametrize(
    ("name", "default"), [("tf_efficientnet_lite0", "bn2"), ("convnext_atto", "stages"), ("resnet10t", "layer4")]
)
def test_timm_networks(name, default):
    assert discover(timm.create_model(name, pretrained=False).eval(), (96, 96)).layers[0] == default


def test_inception_v3_at_its_own_size():
    module = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False).eval()
    layers = discover(module, (299, 299)).layers
    assert layers[:3] == ("Mixed_7c", "Mixed_6e", "Mixed_5d")


def test_tokens_turned_back_into_a_map_are_explained():
    # torchvision's Swin permutes its last tokens to (N, C, h, w).
    module = torchvision.models.swin_t(weights=None).eval()
    found = discover(module, (224, 224))
    assert found.layers == ("permute", "features.5", "features.3", "features.1")
    assert [grid.layout for grid in found.grids.values()] == [Layout.MAP, *[Layout.CHANNELS_LAST] * 3]


def test_outermost_name_of_a_shared_tensor_and_what_is_left_out():
    found = discover(tiny(), (32, 32))
    assert found.layers == ("body", "stem")
    assert found.class_count == 5


def test_class_score_maps_are_left_out_only_when_nothing_learnt_follows():
    head = nn.Sequential(nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    scored = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), head).eval()
    assert discover(scored, (16, 16)).layers[0] == "1"
    # As many channels as classes by chance, but a linear layer follows.
    assert discover(tiny(channels=5), (32, 32)).layers[0] == "body"


def test_oblong_inputs():
    assert discover(torchvision.models.resnet18(weights=None).eval(), (64, 160)).layers[0] == "layer4"


def test_wanted_layers_are_kept_in_order():
    assert discover(tiny(), (32, 32), ["stem", "body.0"]).layers == ("stem", "body.0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bodi", r"no module 'bodi'; near: body"),
        ("zzz", r"no module 'zzz'$"),
        ("unused", "does not run"),
        ("act", "runs more than once"),
        ("head", r"returns \(1, 5\), not a feature map"),
    ],
)
def test_unfit_wanted_layers(name, message):
    module = tiny()
    with pytest.raises(ModelLoadError, match=message):
        discover(module, (32, 32), ["body", name])
    assert hook_count(module) == 0


def test_module_under_two_names_runs_more_than_once():
    module = tiny()
    module.body = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), module.pool, nn.Conv2d(4, 6, 1))
    with pytest.raises(ModelLoadError, match="runs more than once"):
        discover(module, (32, 32), ["pool"])


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.output = output

    def forward(self, x):
        return self.output(self.conv(x))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: x, r"logits of shape \(N, classes\), not a tensor of shape \(1, 4, 14, 14\)"),
        (lambda x: {"logits": x.mean((2, 3))}, "not dict"),
        (lambda x: x @ torch.zeros(3, 3), "fails on an input of .*RuntimeError"),
    ],
)
def test_unfit_networks(output, message):
    module = Returns(output).eval()
    with pytest.raises(ModelLoadError, match=message):
        discover(module, (16, 16))
    assert hook_count(module) == 0


def test_network_without_feature_maps():
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)).eval()
    with pytest.raises(ModelLoadError, match="no layer returns a feature map"):
        discover(module, (8, 8))


def test_discovery_leaves_the_module_as_it_was():
    module = tiny()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    discover(module, (32, 32))
    assert not module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


class Lines(nn.Module):
    """Reads lines of text: the rows of the image become one, and a recurrent layer reads the columns."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, (8, 4), 1), nn.ReLU())
        self.columns = nn.GRU(16, 8, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        columns = self.body(x).squeeze(2).permute(0, 2, 1)
        return self.head(self.columns(columns)[0].mean(1))


def test_a_map_of_one_row_is_a_map():
    # 32x128 px become 1x8.
    assert discover(Lines().eval(), (32, 128)).layers == ("body", "body.1")


def test_a_map_of_one_row_in_other_proportions_can_be_named():
    found = discover(Lines().eval(), (32, 256), ("body",))
    assert found.grids == {"body": Grid(Layout.MAP)}


def test_pooling_to_one_row_is_no_layer_of_its_own():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(16, 5))
    assert discover(network.eval(), (32, 64)).layers[0] == "1"
