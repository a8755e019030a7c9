"""Guided Grad-CAM: guided backpropagation to the pixels, where Grad-CAM sees the class."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from heatlens_server.backends.torch.network.hooks import Substitutes, Substitution
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.closed_form import closed_form
from heatlens_server.backends.torch.passes.one_pass import PassSteps, RawMaps, input_gradient
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import Target
from heatlens_server.maps.concrete import upsample
from heatlens_server.maps.precision import at_least_float32


def guided_grad_cam(model: TorchModel, inputs: Tensor, targets: Sequence[Target], spec: MapSpec) -> PassSteps:
    """Explain with guided Grad-CAM; see `passes.one_pass.OnePass`.

    Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, section 3.2: `sum_c G[c] * up(relu(grad_cam))`, where G is
    the gradient with respect to the input by guided backpropagation (Springenberg et al. 2014,
    https://arxiv.org/abs/1412.6806): at every ReLU, negative gradients end. Colours are summed with their signs, so
    that the map's positive part is where more light would raise the score; its negative part is cut off, as of every
    map. Where activations are no ReLUs (GELU, SiLU, hard-swish), gradients pass as they are: in a network without any
    ReLU, G is the plain gradient.

    A raw map is (N, K, H, W), one per layer.
    """
    leaf = inputs.detach().requires_grad_()
    coarse = yield from closed_form(
        model, inputs, targets, dataclasses.replace(spec, method=Method.GRAD_CAM, principal=False)
    )
    # The same classes, whatever rounding does to the logits of a second run.
    fixed = [coarse.goals.by_name(n) for n in range(len(inputs))]
    with Substitution(_GUIDED):
        # A copy: the network may change its input in place.
        output = model.run(leaf.clone())
    goals = model.task.goals(output, fixed, score=spec.score, run=model.run_images)
    guided = []
    for k in range(goals.width):
        gradient = input_gradient(model, goals.score(k), leaf, retain_graph=k + 1 < goals.width)
        guided.append(at_least_float32(gradient).sum(dim=1, keepdim=True))
        yield
    fine = torch.cat(guided, dim=1)
    size_px = (inputs.shape[-2], inputs.shape[-1])
    maps = [upsample(torch.relu(raw), size_px) * fine for raw in coarse.on_image(model, size_px).raw]
    return RawMaps(coarse.goals, maps)


class _GuidedReLU(torch.autograd.Function):
    """min(max(x, 0), top), with negative gradients cut off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float | None, in_place: bool) -> Tensor:  # noqa: ANN401 - torch's own
        """Compute it, in place if the network has it so: others may look at the same memory."""
        if in_place:
            ctx.mark_dirty(x)
        output = x.clamp_(0, top) if in_place else x.clamp(0, top)
        passes = output > 0
        # A mask of its own, so that what networks do to the output in place does not matter.
        ctx.save_for_backward(passes if top is None else passes & (output < top))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        """Pass on what is positive, where x was."""
        (passes,) = ctx.saved_tensors
        return torch.where(passes, gradient.clamp(min=0), 0.0), None, None


def _guided(x: Tensor, *, top: float | None = None, in_place: bool = False) -> Tensor:
    guided: Tensor = _GuidedReLU.apply(x, top, in_place)
    return guided


def _relu(x: Tensor, inplace: bool = False, *, top: float | None = None) -> Tensor:
    return _guided(x, top=top, in_place=inplace)


def _hardtanh(x: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """Only the one that is a ReLU with a ceiling."""
    return _guided(x, top=max_val, in_place=inplace) if min_val == 0 else F.hardtanh(x, min_val, max_val, inplace)


_GUIDED: Substitutes = {
    F.relu: _relu,
    torch.relu: _guided,
    Tensor.relu: _guided,
    torch.relu_: partial(_guided, in_place=True),
    Tensor.relu_: partial(_guided, in_place=True),
    F.relu6: partial(_relu, top=6.0),
    F.hardtanh: _hardtanh,
    F.hardtanh_: partial(_hardtanh, inplace=True),
}
