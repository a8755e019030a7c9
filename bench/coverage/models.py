"""The networks of the table, with random weights under which a gradient means something."""

import re

import numpy as np
import torch
import torchvision
from torch import nn

from bench.models import photo_paths
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.preprocess import fit

# One network of each family, mostly the smallest that has all of the family's parts.
TIMM = (
    "beit_base_patch16_224",
    "botnet26t_256",
    "sehalonet33ts",
    "lambda_resnet26t",
    "bat_resnext26ts",
    "mobileone_s0",
    "repvgg_a1",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "convit_tiny",
    "convnext_atto",
    "convnextv2_atto",
    "crossvit_tiny_240",
    "cspresnet50",
    "davit_tiny",
    "dla34",
    "dpn68",
    "edgenext_xx_small",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "tf_efficientnet_lite0",
    "efficientnet_cc_b0_4e",
    "efficientvit_b0",
    "efficientvit_m0",
    "eva02_tiny_patch14_224",
    "fasternet_t0",
    "fastvit_t8",
    "gcvit_xxtiny",
    "ghostnet_050",
    "hgnetv2_b0",
    "hiera_tiny_224",
    "iformer_t",
    "inception_next_atto",
    "lcnetv2_small",
    "levit_128",
    "mambaout_femto",
    "coatnet_nano_rw_224",
    "maxvit_pico_rw_256",
    "poolformer_s12",
    "mixer_s32_224",
    "mobilenetv3_small_050",
    "lcnet_050",
    "mobilenetv4_conv_small",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "nest_tiny",
    "dm_nfnet_f0",
    "nf_resnet26",
    "pit_ti_224",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnetx_002",
    "repghostnet_050",
    "repvit_m0_9",
    "res2net50_14w_8s",
    "resnest14d",
    "resnetaa34d",
    "resnetv2_18",
    "rexnet_100",
    "selecsls42",
    "legacy_seresnext26_32x4d",
    "sequencer2d_s",
    "shvit_s1",
    "skresnet18",
    "starnet_s050",
    "swiftformer_xs",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "tiny_vit_5m_224",
    "tnt_s_patch16_224",
    "visformer_tiny",
    "vit_tiny_patch16_224",
    "vit_small_patch16_rope_224",
    "ese_vovnet19b_slim_dw",
    "legacy_xception",
    "xcit_nano_12_p16_224",
)


def names() -> list[str]:
    """Sources: every classifier of torchvision, smallest first, and a spread of timm's families."""
    return [
        *(f"torchvision:{name}" for name in sorted(_torchvision(), key=_parameter_count)),
        *(f"timm:{name}" for name in TIMM),
    ]


def _torchvision() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _parameter_count(name: str) -> int:
    count: int = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    return count


def make(source: str) -> LoadedModel:
    """Load a network with random weights, its zeros drawn anew and its batch norms fitted to real photos."""
    name = source.replace(":", "_")
    try:
        model = load_model(ModelConfig(name=name, source=source, weights="none"))
    except ModelLoadError as error:
        # Networks of tokens: the server wants an operator to name the layer; here it is the last feature map.
        found = re.search(r"feature map \(N, C, h, w\) is '([^']+)'", str(error))
        if found is None:
            raise
        model = load_model(ModelConfig(name=name, source=source, weights="none", layers=(found[1],)))
    torch.manual_seed(0)
    _redraw_zeros(model.module)
    _fit_batch_norms(model.module, torch.from_numpy(inputs(model, 4)).float())
    return model


def inputs(model: LoadedModel, count: int) -> np.ndarray:
    """Normalised photos, float64 (count, 3, H, W)."""
    mean, std = np.array(model.preprocess.mean), np.array(model.preprocess.std)
    batch = []
    for path in photo_paths()[:count]:
        pixels = fit(decode_image(path.read_bytes(), max_pixels=1 << 26).values, model.preprocess).pixels
        batch.append(((pixels / 255.0 - mean) / std).transpose(2, 0, 1))
    return np.stack(batch)


def _redraw_zeros(module: nn.Module) -> None:
    """Heads and gates that begin at zero give zero gradients, which any export reproduces."""
    for parameter in module.parameters():
        if parameter.ndim > 0 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)


def _fit_batch_norms(module: nn.Module, images: torch.Tensor) -> None:
    """Untrained running statistics let activations grow or vanish over the depth."""
    norms = [child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]  # noqa: SLF001 - their base
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        module(images)
    module.eval()
