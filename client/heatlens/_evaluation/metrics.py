"""What a metric's values mean, and the control that they are compared with."""

from collections.abc import Mapping
from enum import StrEnum

FLOOR = "random-cam"
"""The control: channels with random weights. A method that is no better says nothing about the class."""


class Better(StrEnum):
    """Which values of a metric are better."""

    LOWER = "lower is better"
    HIGHER = "higher is better"
    NEAR_ZERO = "near 0 is better"
    NEITHER = "higher is sparser"


BETTER: Mapping[str, Better] = {
    "deletion": Better.LOWER,
    "insertion": Better.HIGHER,
    "road-morf": Better.LOWER,
    "road-lerf": Better.HIGHER,
    "road-combined": Better.HIGHER,
    "average-drop": Better.LOWER,
    "increase": Better.HIGHER,
    "sparseness": Better.NEITHER,
    "model-randomisation": Better.NEAR_ZERO,
    "class-sensitivity": Better.LOWER,
}
