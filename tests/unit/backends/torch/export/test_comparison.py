"""What a graph's figures are measured by, where a method is not as smooth as the others."""

from dataclasses import replace

import numpy as np
import torch

from heatlens_server.backends.torch.export.comparison import TOLERANCES, expected, outputs_of
from heatlens_server.backends.torch.export.reference import Reference
from heatlens_server.core.graph_spec import MAP_OUTPUTS, Output
from heatlens_server.core.methods import Method
from heatlens_server.maps.activation_maps import fem_distance


def reference(seed=0, n=4, k=2, c=6):
    generator = torch.Generator().manual_seed(seed)
    return Reference(
        logits=torch.randn(n, 10, generator=generator, dtype=torch.float64),
        class_ids=torch.arange(k).expand(n, k),
        activations=torch.randn(n, c, 7, 7, generator=generator, dtype=torch.float64).relu(),
        gradients=torch.randn(n, k, c, 7, 7, generator=generator, dtype=torch.float64),
    )


def cam_errors(truth, found, method=Method.FEM):
    outputs = outputs_of(found, method)
    return truth.errors({name: outputs[name] for name in MAP_OUTPUTS}, slice(None))


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
    tolerance = TOLERANCES["fp32"]
    truth = expected(judge, nudged(judge, 1e-7), Method.FEM, unknown=2.0)
    assert truth.known[Output.CAM].all()
    for name, error in cam_errors(truth, below).items():
        assert error <= 4 * truth.own_error[name]
    # Where rounding may move a map by much, it is not compared, and proves nothing.
    strict = expected(judge, nudged(judge, 1e-7), Method.FEM, unknown=tolerance.unknown)
    assert strict.shaped.all(1).tolist() == strict.known[Output.CAM].all(1).tolist() == [False, True, True, True]
    assert cam_errors(strict, below)[Output.CAM] < 1e-4
    smooth = expected(reference(), nudged(reference(), 1e-7), Method.FEM, unknown=tolerance.unknown)
    assert smooth.known[Output.CAM].all()
    assert max(smooth.own_error.values()) < 1e-5
    # One that is wrong elsewhere is caught.
    wrong = replace(below, activations=below.activations.roll(1, dims=3))
    assert cam_errors(truth, wrong)[Output.CAM] > 0.3


def test_further_classes_are_not_compared_and_what_is_not_finite_is_found_everywhere():
    judge = reference()
    truth = expected(judge, None, Method.RANDOM_CAM, unknown=0.01)
    again = Reference(judge.logits, judge.class_ids[:, [0, 1, 0]], judge.activations, judge.gradients[:, [0, 1, 0]])
    outputs = outputs_of(again, Method.RANDOM_CAM)
    found = {name: outputs[name] for name in MAP_OUTPUTS}
    assert max(truth.errors(found, slice(None)).values()) < 1e-12
    found[Output.CAM] = found[Output.CAM].copy()
    found[Output.CAM][:, 2] = 7.0
    assert truth.errors(found, slice(None))[Output.CAM] < 1e-12
    found[Output.CAM][:, 2] = np.nan
    assert np.isnan(truth.errors(found, slice(None))[Output.CAM])


def test_the_network_s_own_rounding_excuses_a_graph_up_to_a_limit():
    tolerance = TOLERANCES["fp32"]
    assert tolerance.bound("cam", 0.0) == tolerance.bound("cam", 2e-5) == 1e-4
    assert tolerance.bound("cam", 1e-3) == 4e-3
    assert tolerance.bound("cam", 1.0) == tolerance.limit
    assert tolerance.bound("logits", 1e-3) == tolerance.bound("activations", 1.0) == tolerance.forward_limit
