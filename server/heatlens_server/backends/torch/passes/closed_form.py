"""The closed forms: a forward pass, a backward pass over the tail for each class, the maths of `maps.methods`."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from heatlens_server.backends.torch.goals.base import Goals
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.one_pass import PassSteps, RawMaps, leaf_of
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import Target
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.principal import check_places, principal_projection
from heatlens_server.maps.weights import weighted


def closed_form(model: TorchModel, inputs: Tensor, targets: Sequence[Target], spec: MapSpec) -> PassSteps:
    """Explain with one of `core.methods.CLOSED_FORMS`.

    Args:
        model: the network.
        inputs: (N, C, H, W).
        targets: N targets.
        spec: how.

    Raises:
        ValueError: CAM is asked for, and the model has no linear head over its pooled first layer.
    """
    needs_gradient = spec.method.traits.needs_gradient
    output, outputs = model.record(inputs, spec.layers, differentiate=needs_gradient)
    goals = model.task.goals(output, targets, score=spec.score, run=model.run_images)
    with torch.no_grad():
        features = [model.features(layer, outputs[layer]).detach() for layer in spec.layers]
    if needs_gradient:
        leaves = [leaf_of(outputs[layer]) for layer in spec.layers]
        return RawMaps(goals, (yield from _gradient_maps(model, spec, goals, leaves, features)))
    factors: Tensor = goals.class_ids
    if spec.method is Method.CAM:
        if model.head_weight is None:
            raise ValueError("this model has no linear head over pooled activations")
        # An absent class (ABSENT) indexes row 0: its map is computed and dropped.
        factors = model.head_weight[factors.clamp(min=0)]
    maps = []
    yield
    for place, of_layer in enumerate(features):
        check_places(spec.method, place, spec.layers[place], of_layer)
        with torch.no_grad():
            maps.append(_map(spec, of_layer, factors))
        yield
    return RawMaps(goals, maps)


def _gradient_maps(
    model: TorchModel, spec: MapSpec, goals: Goals, leaves: Sequence[Tensor], features: Sequence[Tensor]
) -> Generator[None, None, list[Tensor]]:
    """Raw maps (N, K, h, w), one per layer. Class by class, so that one class's gradients are held at a time."""
    maps: list[list[Tensor]] = [[] for _ in leaves]
    if len(leaves) > 1:
        yield
    for k in range(goals.width):
        score = goals.score(k)
        with torch.no_grad():
            gradients = model.gradients(score, leaves, retain_graph=k + 1 < goals.width)
        if len(leaves) > 1:
            yield
        for of_layer, layer, activation, gradient in zip(maps, spec.layers, features, gradients, strict=True):
            with torch.no_grad():
                of_layer.append(_map(spec, activation, model.features(layer, gradient)[:, None]))
            yield
    return [torch.cat(of_layer, dim=1) for of_layer in maps]


def _map(spec: MapSpec, activations: Tensor, factors: Tensor) -> Tensor:
    """The raw map (N, K, h, w) of activations and what they are weighted by; see `maps.methods.raw_map`."""
    if spec.principal:
        return principal_projection(weighted(spec.method, activations, factors))
    return raw_map(spec.method, activations, factors)
