"""Grouped convolutions in place of torch's: the same numbers, differentiated twice without a loop over the groups."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from heatlens_server.backends.torch.network.convolution import grouped_convolutions
from heatlens_server.backends.torch.network.hooks import Substitution

GROUPS = 24
CASES = {
    "depthwise": {"groups": GROUPS, "padding": 1},
    "strided": {"groups": GROUPS, "stride": 2, "padding": (1, 0)},
    "dilated": {"groups": 4, "dilation": (2, 1)},
    "same": {"groups": GROUPS, "padding": "same"},
    "one group": {},
}


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are run."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


def derivatives(options, *, substitutes):
    """Output, gradient and Hessian product of a curved function, and how many convolutions the last took."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, GROUPS, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    channels = GROUPS // options.get("groups", 1)
    weight = torch.randn(GROUPS, channels, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(GROUPS, generator=generator, dtype=torch.float64)
    with Substitution(substitutes):
        y = F.silu(F.conv2d(F.silu(x), weight, bias, **options))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with Convolutions() as convolutions:
        (product,) = torch.autograd.grad(gradient, x, x.detach())
    return (y, gradient, product), convolutions.count


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_numbers_are_those_of_torch(options):
    found, _ = derivatives(options, substitutes=grouped_convolutions())
    expected, _ = derivatives(options, substitutes={})
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_second_derivative_takes_no_convolution_per_group():
    found = [derivatives(CASES["depthwise"], substitutes=s)[1] for s in (grouped_convolutions(), {})]
    assert found[0] <= 3
    assert found[1] > GROUPS  # torch's own; if this is wrong one day, the substitute may go


def test_weights_that_are_learned_keep_their_gradient():
    weight = torch.ones(GROUPS, 1, 3, 3, requires_grad=True)
    with Substitution(grouped_convolutions()):
        F.conv2d(torch.ones(1, GROUPS, 3, 3), weight, groups=GROUPS).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
