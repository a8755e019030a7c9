"""Small seeded transformers of torchvision and timm, whose weights let every part matter."""

import math
from collections.abc import Callable, Mapping

import timm
import torch
import torchvision
from torch import nn

CLASS_COUNT = 7
"""Of all of them."""

_SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}
_STAGES = {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4}


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=CLASS_COUNT, **options)


def _torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=CLASS_COUNT
    )


def _torchvision_swin() -> nn.Module:
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=24,
        depths=[1, 1, 2],
        num_heads=[1, 2, 4],
        window_size=[4, 4],
        num_classes=CLASS_COUNT,
        stochastic_depth_prob=0.0,
    )


def _torchvision_maxvit() -> nn.Module:
    return torchvision.models.MaxVit(
        input_size=(64, 64),
        stem_channels=8,
        partition_size=4,
        block_channels=[8, 16],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=CLASS_COUNT,
    )


NETWORKS: Mapping[str, tuple[int, Callable[[], nn.Module]]] = {
    "vit": (64, _timm("vit_tiny_patch16_224", img_size=64, **_SMALL)),
    "vit-shallow": (64, _timm("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=32, num_heads=2)),
    "vit-torchvision": (64, _torchvision_vit),
    "vit-registers": (56, _timm("vit_small_patch14_reg4_dinov2", img_size=56, **_SMALL)),
    "vit-averaged": (64, _timm("vit_medium_patch16_reg4_gap_256", img_size=64, **_SMALL)),
    "vit-pooled": (64, _timm("vit_base_patch16_siglip_224", img_size=64, **_SMALL)),
    "vit-oblong": (64, _timm("vit_tiny_patch16_224", img_size=(64, 96), **_SMALL)),
    "deit-distilled": (64, _timm("deit_tiny_distilled_patch16_224", img_size=64, **_SMALL)),
    "beit": (64, _timm("beit_base_patch16_224", img_size=64, **_SMALL)),
    "eva": (56, _timm("eva02_tiny_patch14_224", img_size=56, **_SMALL)),
    "swin": (64, _timm("swin_tiny_patch4_window7_224", **_STAGES)),
    "swin-v2": (64, _timm("swinv2_tiny_window8_256", **_STAGES)),
    "swin-torchvision": (64, _torchvision_swin),
    "maxvit-torchvision": (64, _torchvision_maxvit),
    "convnext": (64, _timm("convnext_atto", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))),
    "hiera": (64, _timm("hiera_tiny_224", img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 2, 1))),
}
"""By name: pixels of the input's height, and what makes the network."""


def transformer(name: str, *, redrawn: bool = True) -> nn.Module:
    """A network in eval mode.

    Args:
        name: which one.
        redrawn: whether its weights are drawn so that none is next to zero, as those of heads and the scales of layers
            are when new. Not redrawn, a place of a map is made of the same place of the image above all.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = NETWORKS[name][1]()
        for parameter in module.parameters() if redrawn else ():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.0 / math.sqrt(parameter[0].numel()))
            else:
                parameter.uniform_(0.5, 1.0)
    return module.eval()
