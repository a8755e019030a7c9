"""Random networks for segmentation and detection: made to see something, which as they are drawn they do not.

A new detector says "background" everywhere: RetinaNet and FCOS start with biases for a probability of 1 % (Lin et al.
2017, arXiv:1708.02002), the others with 91 equal classes, all below the score that torchvision keeps. A new network for
segmentation sees one class in every pixel. And features that no normalisation has been trained for are so large, or so
small, that every box leaves the image. So the output layers are brought to a mean and a spread as trained ones have,
as LSUV does it layer by layer (Mishkin and Matas 2015, arXiv:1511.06422): one image of noise is run, and each output
layer's weights and biases are set by what comes out of it.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PX = 256
_SEED = 0
# Patches, as photos have more contrast between regions than between pixels.
_PATCHES = 8

_OUTPUTS = (
    # Segmentation: class scores.
    (r"classifier\.(4|low_classifier|high_classifier)", 0.0, 2.0),
    (r"rpn\.head\.cls_logits", 0.0, 1.0),
    (r"rpn\.head\.bbox_pred", 0.0, 0.2),
    # R-CNN and SSD: a softmax over the classes; boxes are moved by tenths of themselves.
    (r"roi_heads\.box_predictor\.cls_score|head\.classification_head\.module_list\..*", 0.0, 3.0),
    (r"roi_heads\.box_predictor\.bbox_pred|head\.regression_head\.module_list\..*", 0.0, 1.0),
    # RetinaNet and FCOS: a sigmoid for each class, which few anchors pass.
    (r"head\.classification_head\.cls_logits", -6.0, 2.0),
    (r"head\.regression_head\.bbox_ctrness", 2.0, 0.5),
)
"""Names of output layers, and the mean and standard deviation of what each is to give."""

_BOXES = r"head\.regression_head\.bbox_reg"
"""RetinaNet: boxes are moved by parts of themselves. FCOS: distances to the four sides, cut off at 0."""


def calibrate_heads(module: nn.Module) -> None:
    """Set the output layers of a random network so that it sees something in noise. The same for the same network.

    Args:
        module: one of torchvision's networks for segmentation or detection, in any mode; its output layers' weights and
            biases are changed in place.
    """
    named = dict(module.named_modules())
    distances = hasattr(named.get("head.regression_head"), "bbox_ctrness")
    outputs = [*_OUTPUTS, (_BOXES, 1.0 if distances else 0.0, 0.2)]
    handles = [
        layer.register_forward_hook(_once(mean, spread))
        for pattern, mean, spread in outputs
        for name, layer in named.items()
        if isinstance(layer, nn.Conv2d | nn.Linear) and re.fullmatch(pattern, name) and _is_last(name, named)
    ]
    was_training = module.training
    noise = torch.rand(1, 3, _PATCHES, _PATCHES, generator=torch.Generator().manual_seed(_SEED))
    try:
        with torch.no_grad():
            module.eval()(F.interpolate(noise, size=(_PX, _PX)))
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()


def _is_last(name: str, named: dict[str, nn.Module]) -> bool:
    """Whether nothing follows in its Sequential: in SSDlite a level's head is one of two convolutions."""
    parent, _, position = name.rpartition(".")
    container = named.get(parent)
    return not isinstance(container, nn.Sequential) or int(position) == len(container) - 1


def _once(mean: float, spread: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
    calibrated = False

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        nonlocal calibrated
        # Heads run on level after level: the first one, of the finest, counts.
        if calibrated or len(output) == 0:
            return None
        calibrated = True
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        channels = output.transpose(0, 1).flatten(1)
        if layer.bias is not None:
            layer.bias.sub_(channels.mean(dim=1))
            channels = channels - channels.mean(dim=1, keepdim=True)
        found = float(channels.std())
        if found > 0:
            layer.weight.mul_(spread / found)
            if layer.bias is not None:
                layer.bias.mul_(spread / found).add_(mean)
        # Not a call: that would run this hook.
        again: Tensor = layer.forward(*inputs)
        return again

    return hook
