"""What a graph's figures are measured by, where a method is not as smooth as the others."""

from dataclasses import replace

import numpy as np
import torch

from heatlens_server.backends.torch.cam.activation_maps import fem_distance
from heatlens_server.backends.torch.export.comparison import outputs_of, truth
from heatlens_server.backends.torch.export.evidence import telling
from heatlens_server.backends.torch.export.reference import Reference
from heatlens_server.core.graph_spec import MAP_OUTPUTS, Output
from heatlens_server.core.methods import Method


def reference(seed=0, n=4, k=2, c=6):
    generator = torch.Generator().manual_seed(seed)
    return Reference(
        logits=torch.randn(n, 10, generator=generator, dtype=torch.float64),
        class_ids=torch.arange(k).expand(n, k),
        activations=torch.randn(n, c, 7, 7, generator=generator, dtype=torch.float64).relu(),
        gradients=torch.randn(n, k, c, 7, 7, generator=generator, dtype=torch.float64),
    )


def cam_errors(judge, own, found, method=Method.FEM):
    known = truth(judge, own, method, unknown=0.01)
    outputs = outputs_of(found, method)
    return known.error({name: outputs[name] for name in MAP_OUTPUTS}, slice(None), np.arange(2))


def nudged(judge, by):
    """The same network, but for the rounding of every activation."""
    noise = torch.randn(judge.activations.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return replace(judge, activations=judge.activations + by * noise)


def at_the_rule(judge, image=0, by=0.0):
    """The same, with one activation of an image moved to where FEM's rule is, or by a little above it."""
    activations = judge.activations.clone()
    for _ in range(60):
        _, distance = fem_distance(activations)
        activations[image, 2, 3, 3] -= distance[image, 2, 3, 3] - by
    return replace(judge, activations=activations)


def test_fem_may_differ_where_an_activation_is_within_rounding_of_its_rule():
    judge = at_the_rule(reference(), by=1e-9)
    below = at_the_rule(judge, by=-1e-9)
    # The step is there ...
    assert np.abs(outputs_of(judge, Method.FEM)[Output.CAM] - outputs_of(below, Method.FEM)[Output.CAM]).max() > 1e-3
    # ... and not held against a graph that rounds as its network does.
    assert max(cam_errors(judge, nudged(judge, 1e-7), below).values()) == 0.0
    smooth = cam_errors(reference(), nudged(reference(), 1e-7), nudged(reference(), 1e-8))
    assert max(smooth.values()) < 1e-6
    # One that is wrong elsewhere is caught.
    wrong = replace(below, activations=below.activations.roll(1, dims=3))
    assert cam_errors(judge, nudged(judge, 1e-7), wrong)[Output.CAM] > 0.3


def test_a_class_asked_for_twice_has_another_random_map():
    judge = reference()
    known = truth(judge, None, Method.RANDOM_CAM, unknown=0.01)
    again = Reference(judge.logits, judge.class_ids[:, [0, 1, 0]], judge.activations, judge.gradients[:, [0, 1, 0]])
    outputs = outputs_of(again, Method.RANDOM_CAM)
    found = {name: outputs[name] for name in MAP_OUTPUTS}
    assert max(known.error(found, slice(None), np.array([0, 1, 0])).values()) < 1e-12
    assert (
        known.error(found, slice(None), np.array([1, 0, 0]))[Output.CAM] == 0
    )  # none of these is the class's own place
    found[Output.CAM] = found[Output.CAM].copy()
    found[Output.CAM][:, 2] = np.nan
    assert np.isnan(known.error(found, slice(None), np.array([0, 1, 0]))[Output.CAM])


def test_maps_of_activations_prove_nothing_about_gradients():
    assert telling([Method.GRAD_CAM, Method.EIGEN_CAM, Method.FEM]) == {Method.GRAD_CAM}
    assert telling([Method.EIGEN_CAM]) == {Method.EIGEN_CAM}
