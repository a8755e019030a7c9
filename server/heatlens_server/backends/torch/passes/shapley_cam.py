"""Shapley-CAM: gradients, and how they change along the activations. Two differentiations of the tail per class."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from heatlens_server.backends.torch.network.attention import open_attention
from heatlens_server.backends.torch.network.convolution import grouped_convolutions
from heatlens_server.backends.torch.network.hooks import Substitutes, Substitution
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.one_pass import PassSteps, RawMaps, leaf_of
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.targets import Target
from heatlens_server.maps.methods import shapley_cam as shapley_cam_map
from heatlens_server.maps.principal import principal_projection
from heatlens_server.maps.weights import shapley_cam_weights, weigh


def shapley_cam(model: TorchModel, inputs: Tensor, targets: Sequence[Target], spec: MapSpec) -> PassSteps:
    """Explain with `maps.methods.shapley_cam`; see `passes.one_pass.OnePass`.

    Images do not meet inside the network: the product of the whole batch's Hessian with the whole batch's activations
    is that of each image's. Piecewise linear tails have no curvature: there it is Grad-CAM.

    Raises:
        InvalidArgument: the network has an operation that torch cannot differentiate twice.
    """
    with Substitution(_TWICE):
        output, outputs = model.record(inputs, spec.layers, differentiate=True)
    goals = model.task.goals(output, targets, score=spec.score, run=model.run_images)
    leaves = [leaf_of(outputs[layer]) for layer in spec.layers]
    maps: list[list[Tensor]] = [[] for _ in leaves]
    yield
    for k in range(goals.width):
        # The graph of the gradients holds that of the score: both go when the last of them is let go of.
        gradients = list(_derivatives(goals.score(k) * model.gradient_scale, leaves, create_graph=True))
        yield
        for index, (of_layer, layer, leaf) in enumerate(zip(maps, spec.layers, leaves, strict=True)):
            keep = k + 1 < goals.width or index + 1 < len(leaves)
            gradient, curvature = _curved(model, gradients[index], leaf, retain_graph=keep)
            with torch.no_grad():
                activations, g, c = (model.features(layer, t.detach()) for t in (leaf, gradient, curvature))
                of_layer.append(_map(spec, activations, g[:, None], c[:, None]))
            yield
    return RawMaps(goals, [torch.cat(of_layer, dim=1) for of_layer in maps])


def _curved(model: TorchModel, gradient: Tensor, leaf: Tensor, *, retain_graph: bool) -> tuple[Tensor, Tensor]:
    """A leaf's gradient g, and the derivative of `sum(g * A)` for a fixed A, the leaf's values: the Hessian times A."""
    found = None
    if gradient.requires_grad:
        values = leaf.detach()
        (found,) = _derivatives(gradient, leaf, values, retain_graph=retain_graph, allow_unused=True)
        # Nothing but the leaf has a gradient: what depends on something else is marked once_differentiable.
        if found is None and leaf.is_leaf:
            raise _impossible()
    curvature = torch.zeros_like(gradient) if found is None else found
    scale = model.gradient_scale
    return (gradient, curvature) if scale == 1.0 else (gradient.float() / scale, curvature.float() / scale)


def _derivatives(*args: Any, **options: Any) -> tuple[Any, ...]:  # noqa: ANN401 - torch's own
    try:
        return tuple(torch.autograd.grad(*args, **options))
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise _impossible() from error


def _impossible() -> InvalidArgument:
    return InvalidArgument.of(
        "method",
        "shapley-cam differentiates twice, which torch cannot do with an operation of this model",
        reason="INVALID_OPTION",
    )


def _map(spec: MapSpec, activations: Tensor, gradients: Tensor, curvature: Tensor) -> Tensor:
    if spec.principal:
        return principal_projection(weigh(shapley_cam_weights(gradients, curvature), activations))
    return shapley_cam_map(activations, gradients, curvature)


def _hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """`F.hardsigmoid`, made of what can be differentiated twice. In place it is still: others may see the memory."""
    result = F.hardtanh(x + 3.0, 0.0, 6.0) / 6.0
    return x.copy_(result) if inplace else result


_TWICE: Substitutes = {**open_attention(), **grouped_convolutions(), F.hardsigmoid: _hardsigmoid}
"""For the common operations whose derivative torch cannot differentiate again, or only at a great price."""
