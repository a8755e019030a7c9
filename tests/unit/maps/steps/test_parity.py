"""Methods of many runs against the libraries that share their variant: `grad-cam` 1.5.7 and `torch-cam` 0.5.0.

Every parity is printed: run with -rP to read them.
"""

import copy
import functools
import logging
from types import SimpleNamespace

import pytest
import pytorch_grad_cam
import torch
import torchvision
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchcam import methods as torch_cam

import tiny_models
from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import TopK
from heatlens_server.maps.noise import standard_normal
from heatlens_server.maps.steps import score_cam
from heatlens_server.maps.steps.drive import STEPPERS
from loaded_models import noise
from step_jobs import drain, job, placed

PX = 32
TOLERANCE = 1e-4

# Layers behind a ReLU, where taking a channel out is the same for all; what follows them is not linear.
NETWORKS = {"resnet18": "layer2", "squeezenet1_1": "features.4", "shufflenet_v2_x0_5": "stage2"}
# Nothing but pooling and one linear layer follows: gradients are the same for all pixels and all noise.
BEFORE_POOLING = {"resnet18": "layer4", "mobilenet_v2": "features", "shufflenet_v2_x0_5": "conv5"}


@functools.cache
def made(name: str) -> nn.Module:
    """A network of seeded random weights, batch statistics of its own activations, and a head that tells apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.train()
            norm.momentum = None
        head = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
        nn.init.normal_(head.weight)
        with torch.no_grad():
            # Logits of a size that leaves many channels a part in Score-CAM's softmax.
            head.weight /= net(torch.randn(8, 3, PX, PX)).std()
            head.bias.fill_(1.0)
    return net.eval()


def case(name, layer, rows=32, px=PX):
    """A job for a network's top class, its module for the library, and the class."""
    net = tiny_models.tiny_mlp() if name == "tiny_mlp" else copy.deepcopy(made(name))
    reference = copy.deepcopy(net).requires_grad_(requires_grad=True)
    work = job(placed(net, layer, px=px), noise(1, px, seed=2)[0], TopK(1), rows=rows)
    return work, reference, int(work.goals.class_ids[0, 0])


def by_grad_cam(kind, reference, layer, work, class_id):
    explainer = kind(model=reference, target_layers=[reference.get_submodule(layer)])
    with explainer:
        (found,) = explainer(input_tensor=work.inputs, targets=[ClassifierOutputTarget(class_id)])
    return torch.from_numpy(found)


def report(method, name, library, found, expected, tolerance=TOLERANCE):
    scale = float(expected.abs().max())
    difference = float((found - expected).abs().max()) / scale
    print(f"PARITY {method} {name} {library}: {difference:.1e} of the largest value")
    assert scale > 0
    assert float(expected.std()) > 0.01 * scale
    assert difference <= tolerance


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for module in (pytorch_grad_cam.score_cam, pytorch_grad_cam.ablation_cam):
        monkeypatch.setattr(module, "tqdm", SimpleNamespace(tqdm=lambda chunks: chunks))
    logging.getLogger("torchcam").setLevel(logging.ERROR)


@pytest.mark.parametrize(("name", "layer"), NETWORKS.items())
def test_score_cam_is_that_of_grad_cam_but_for_the_corners(name, layer, monkeypatch):
    work, reference, class_id = case(name, layer)
    found = saliency([drain(STEPPERS[Method.SCORE_CAM](work))[0]], (PX, PX)).values[0, 0]
    shipped = by_grad_cam(pytorch_grad_cam.ScoreCAM, reference, layer, work, class_id)
    correlation = float(torch.corrcoef(torch.stack([found.flatten(), shipped.flatten()]))[0, 1])
    print(f"PARITY score-cam {name} grad-cam as shipped: correlation {correlation:.4f}")
    # It aligns the corners of its masks with the image's; the paper's authors do not, nor do we.
    monkeypatch.setattr(torch.nn, "UpsamplingBilinear2d", functools.partial(nn.Upsample, mode="bilinear"))
    report(
        "score-cam", name, "grad-cam", found, by_grad_cam(pytorch_grad_cam.ScoreCAM, reference, layer, work, class_id)
    )


@pytest.mark.parametrize(("name", "layer"), NETWORKS.items())
def test_ablation_cam_is_that_of_grad_cam_behind_a_relu(name, layer):
    work, reference, class_id = case(name, layer)
    assert work.output.min() == 0
    with torch.no_grad():
        assert work.model.run(work.inputs)[0, class_id] > 0
    found = saliency([drain(STEPPERS[Method.ABLATION_CAM](work))[0]], (PX, PX)).values[0, 0]
    expected = by_grad_cam(pytorch_grad_cam.AblationCAM, reference, layer, work, class_id)
    report("ablation-cam", name, "grad-cam", found, expected)


def stretched_after_upsampling(kind):
    """The library's class with masks as in the paper: it stretches a channel first and upsamples it then."""

    class Stretched(kind):
        def _upsample(self, activation):
            return self._normalize(super()._upsample(activation), 2)

    return Stretched


def by_torch_cam(kind, reference, layer, work, class_id, **options):
    """The library's raw map behind the ReLU, (h, w)."""
    with kind(reference, layer, **options) as extractor:
        smooth = kind is torch_cam.SmoothGradCAMpp
        extractor._distrib = Silent() if smooth else Drawn(work.inputs.shape[-2:])
        scores = reference(work.inputs)
        return extractor(class_id, scores, normalized=False, **({"eps": 1e-6} if smooth else {}))[0][0]


class Silent:
    """No noise: the library sums the activations of its last noisy input."""

    def sample(self, size):
        return torch.zeros(size)


class Drawn:
    """Our noise in the place of the library's."""

    def __init__(self, size):
        self._size = size
        self._drawn = 0

    def sample(self, size):
        numbers = range(self._drawn, self._drawn + size[1])
        self._drawn += size[1]
        return score_cam.SS_CAM_DEVIATION * standard_normal(numbers, (1, *self._size), torch.empty(0)).transpose(0, 1)


@pytest.mark.parametrize(("name", "layer"), [("tiny_mlp", "body"), *NETWORKS.items()])
@pytest.mark.parametrize("method", [Method.SCORE_CAM, Method.SS_CAM, Method.IS_CAM])
def test_score_cams_are_those_of_torch_cam_with_the_papers_masks(method, name, layer, monkeypatch):
    kind = {
        Method.SCORE_CAM: torch_cam.ScoreCAM,
        Method.SS_CAM: torch_cam.SSCAM,
        Method.IS_CAM: torch_cam.ISCAM,
    }[method]
    options = {}
    if name != "tiny_mlp" and method is not Method.SCORE_CAM:  # else hundreds of thousands of runs
        options["num_samples"] = 2
        monkeypatch.setattr(score_cam, "SS_CAM_SAMPLES", 2)
        monkeypatch.setattr(score_cam, "IS_CAM_STEPS", 2)
    work, reference, class_id = case(name, layer, px=64 if name == "tiny_mlp" else PX)
    found = drain(STEPPERS[method](work))[0][0, 0].relu()
    expected = by_torch_cam(stretched_after_upsampling(kind), reference, layer, work, class_id, **options)
    if method is Method.SS_CAM:
        # Channels that are zero everywhere share a score here, and scale the others' weights a little differently.
        found, expected = found / found.max(), expected / expected.max()
    report(method, name, "torch-cam", found, expected)


@pytest.mark.parametrize(("name", "layer"), BEFORE_POOLING.items())
def test_smooth_grad_cam_is_that_of_torch_cam_where_noise_does_not_matter(name, layer):
    work, reference, class_id = case(name, layer, rows=3, px=64)
    found = drain(STEPPERS[Method.SMOOTH_GRAD_CAM_PLUS_PLUS](work))[0][0, 0].relu()
    expected = by_torch_cam(torch_cam.SmoothGradCAMpp, reference, layer, work, class_id)
    report("smooth-grad-cam-plus-plus", name, "torch-cam", found, expected)
