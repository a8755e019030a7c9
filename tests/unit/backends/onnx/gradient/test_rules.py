"""The rule of every operator against differences in float64, over a grid of shapes and attributes.

The forward pass and the backward pass are run by onnx's reference implementation. A wrong rule is off by about 1.
"""

import numpy as np
import pytest

from heatlens_server.backends.onnx.gradient.differentiate import RULES
from heatlens_server.backends.onnx.gradient.rules import quantised
from operator_cases import CASES, Computed, arrays_of, backward_of, forward_of, name_of, runner

STEP = 1e-6
TOLERANCE = 1e-7


@pytest.mark.parametrize("one", CASES, ids=[f"{number}-{name_of(one)}" for number, one in enumerate(CASES)])
def test_the_rule_is_the_slope_of_its_operator(one):
    rng = np.random.default_rng(0)
    arrays = arrays_of(one, rng)
    run = runner(one, forward_of(one, arrays))
    fed = [place for place, given in enumerate(one.inputs) if isinstance(given, tuple | Computed)]
    variable = {f"x{place}": arrays[place] for place in fed}
    outputs = run(variable)
    seeds = [rng.normal(size=output.shape) for output in outputs[: 1 if one.op == "TopK" else None]]
    feeds = variable | {f"g{place}": seed for place, seed in enumerate(seeds)}
    gradients = runner(one, backward_of(one, arrays, outputs))(feeds)
    for place, gradient in zip(one.by, gradients, strict=True):
        assert gradient.shape == arrays[place].shape
        for _ in range(3):
            direction = rng.normal(size=arrays[place].shape)
            moved = [run(variable | {f"x{place}": arrays[place] + sign * STEP * direction}) for sign in (1, -1)]
            slope = sum(
                float(((ahead - behind) * seed).sum()) / (2 * STEP)
                for ahead, behind, seed in zip(*moved, seeds, strict=False)
            )
            unit = np.sqrt((gradient**2).sum() * (direction**2).sum()) + 1e-3
            assert abs(slope - float((gradient * direction).sum())) <= TOLERANCE * unit + 1e-9


def test_every_rule_has_a_case():
    # Those are in test_differentiate.py and test_quantised.py.
    assert set(RULES) - {one.op for one in CASES} == {"LRN", "Cast", *quantised.RULES}
