"""One network of every family, with random weights, differentiated and compared with float64.

Inputs are small where the network allows. `make coverage-export` walks all of torchvision and much of timm.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

from export_networks import normalised, run_torch
from heatlens_server.backends.torch.export.comparison import TOLERANCES, expected
from heatlens_server.backends.torch.export.differentiate import differentiate
from heatlens_server.backends.torch.export.reference import Network
from heatlens_server.backends.torch.export.verify import verify
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.graph_spec import Format, GraphSpec, Output
from heatlens_server.core.methods import Method
from loaded_models import loaded, noise, user_export

CLASSES = 10
NO_AUXILIARY_HEADS = {"aux_logits": False, "init_weights": False, "transform_input": False}

FAMILIES: dict[str, tuple[str, int, dict[str, object]]] = {
    "resnet18": ("layer4", 64, {}),
    "mobilenet_v2": ("features.14", 64, {}),
    "mobilenet_v3_small": ("features", 64, {}),
    "squeezenet1_1": ("features", 64, {}),
    "googlenet": ("inception4e", 64, NO_AUXILIARY_HEADS),
    "inception_v3": ("Mixed_6e", 96, NO_AUXILIARY_HEADS),
    "densenet": ("features.denseblock4", 64, {}),
    "shufflenet_v2_x0_5": ("stage4", 64, {}),
    "mnasnet0_5": ("layers.14", 64, {}),
    "regnet_y_400mf": ("trunk_output.block4", 64, {}),
    "efficientnet": ("features.3", 64, {}),
    "convnext": ("features.4", 64, {}),
    "swin": ("features.0.0", 64, {}),
    "swin_v2": ("features.0.0", 64, {}),
    "vit": ("conv_proj", 64, {}),
    "maxvit": ("blocks.0", 64, {}),
    "alexnet": ("features.6", 64, {}),
    "vgg11": ("features.15", 64, {}),
}
"""By name: the layer, pixels of the input, and options of torchvision's."""

IN_ONNXRUNTIME = {"squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"}
"""These are exported, and verified against float64 as they run there."""

SMALL: dict[str, Callable[[], nn.Module]] = {
    "densenet": lambda: DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES),
    "efficientnet": lambda: EfficientNet(
        # The first stage does not expand; the others do, with both sizes of kernel, with and without a residual.
        [
            MBConvConfig(1, 3, 1, 32, 16, 1, 1, 1),
            MBConvConfig(6, 3, 2, 16, 24, 2, 1, 1),
            MBConvConfig(6, 5, 2, 24, 40, 2, 1, 1),
        ],
        0.2,
        num_classes=CLASSES,
    ),
    "convnext": lambda: ConvNeXt(
        [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 2)], num_classes=CLASSES
    ),
    "vit": lambda: VisionTransformer(64, 8, 2, 2, 32, 64, num_classes=CLASSES),
    "swin": lambda: SwinTransformer([4, 4], 16, [2, 1], [2, 4], [4, 4], num_classes=CLASSES),
    "swin_v2": lambda: SwinTransformer(
        [4, 4],
        16,
        [2, 1],
        [2, 4],
        [4, 4],
        num_classes=CLASSES,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    ),
    "maxvit": lambda: MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=CLASSES),
}
"""Recording takes its time layer by layer: few layers, of every kind that the family has."""

ATOL = 1e-4


def model_of(name: str) -> LoadedModel:
    """A network with random weights; its heads are drawn anew, as some start as zeros, and gradients would be too."""
    layer, px, options = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if name in SMALL:
            module = SMALL[name]()
        else:
            module = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options)
        linears = [
            child for child in module.modules() if isinstance(child, nn.Linear) and child.out_features == CLASSES
        ]
        for head in linears:
            nn.init.normal_(head.weight, 0.0, 0.1)
    return loaded(module, [layer], class_count=CLASSES, px=px)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - IN_ONNXRUNTIME))
def test_family(name):
    layer, px = FAMILIES[name][:2]
    model = model_of(name)
    graph = differentiate(model, GraphSpec(layer))
    images = noise(3, px, seed=2)
    reference = Network(model, torch.float64).explain(images, [layer], torch.tensor([[0], [3], [7]]))[layer]
    own = Network(model, torch.float32).explain(images, [layer], reference.class_ids)[layer]
    judged = expected(reference, own, Method.GRAD_CAM, unknown=TOLERANCES["fp32"].unknown)
    found = run_torch(graph, [str(output) for output in Output], normalised(images), judged.class_ids)
    outputs = {Output(output): values for output, values in found.items()}
    errors = judged.errors(outputs, slice(None))
    assert {figure: error for figure, error in errors.items() if not error <= ATOL} == {}
    assert np.abs(judged.values["weights"]).max() > 0
    assert judged.informative.any()


@pytest.mark.parametrize("name", sorted(IN_ONNXRUNTIME))
def test_family_in_onnxruntime(name):
    model = model_of(name)
    folder, manifest = user_export(model, Format.ONNX, GraphSpec(FAMILIES[name][0]))
    parity = verify(model, folder, manifest, report=lambda _: None)
    assert parity["informative_maps"] > 0
    weights_bytes = sum(4 * parameter.numel() for parameter in model.module.parameters())
    assert (folder / manifest.graphs[0].file).stat().st_size < weights_bytes + 600_000
