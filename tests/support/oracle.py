"""What the network `tiny_mlp` says about an image, by torch's autograd and the paper's formula: nothing of ours."""

from dataclasses import dataclass

import numpy as np
import torch

import tiny_models

MEAN, STD = 0.5, 0.5


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """All logits float32 (C,), and the raw Grad-CAM map of each class, float32 (C, h, w)."""

    logits: np.ndarray
    raws: np.ndarray


def expected(images: list[np.ndarray]) -> list[Expected]:
    """Explain images of the network's input size, uint8 RGB (64, 64, 3), one by one.

    Grad-CAM, Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2, at the layer `body`.
    """
    model = tiny_models.tiny_mlp().eval()
    return [_explain(model, image) for image in images]


def _explain(model: torch.nn.Module, image: np.ndarray) -> Expected:
    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - MEAN) / STD
    activation = model.body(model.stem(x)).detach().requires_grad_()
    logits = model.head(activation.clone())[0]
    raws = []
    for logit in logits:
        (gradient,) = torch.autograd.grad(logit, activation, retain_graph=True)
        weights = gradient.mean((2, 3), keepdim=True)
        raws.append(torch.relu((weights * activation).sum(1))[0].detach().numpy())
    return Expected(logits.detach().numpy(), np.stack(raws))
