"""What a method of one pass is, and what it says."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.backends.torch.goals.base import Goals
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.targets import Target
from heatlens_server.maps.normalization import NormalizedMap


@dataclass(frozen=True, slots=True, eq=False)
class RawMaps:
    """What is known about N images before their maps are finished.

    Attributes:
        goals: what was explained.
        raw: one raw map (N, K, h, w) per layer; of methods that do not look at layers, one.
    """

    goals: Goals
    raw: list[Tensor]

    def on_image(self, model: TorchModel, size_px: tuple[int, int]) -> "RawMaps":
        """The same, without what lies beside the image where the network pads it.

        Args:
            model: the network.
            size_px: (height, width) of the input.
        """
        with torch.no_grad():
            return RawMaps(self.goals, [model.on_image(of_layer, size_px) for of_layer in self.raw])

    def maps(self, spec: MapSpec, size_px: tuple[int, int]) -> NormalizedMap[Tensor]:
        """Finish the maps.

        Args:
            spec: how.
            size_px: (height, width) of the input.
        """
        with torch.no_grad():
            return saliency(self.raw, size_px if spec.upsample else None, spec.aggregation)


PassSteps = Generator[None, None, RawMaps]
"""Yields after each goal or more often, so that others may have the device; changes nothing of the thread across it."""

OnePass = Callable[[TorchModel, Tensor, Sequence[Target], MapSpec], PassSteps]
"""Explains inputs (N, C, H, W). Resumed with gradients enabled."""


def leaf_of(output: object) -> Tensor:
    """A layer's output, as something that scores can be differentiated by.

    Raises:
        TypeError: it is a pyramid of maps, which validation keeps from methods that take gradients.
    """
    if not isinstance(output, Tensor):
        raise TypeError("a pyramid of feature maps has no gradient here")
    return output


def input_gradient(
    model: TorchModel,
    score: Tensor,
    leaf: Tensor,
    *,
    retain_graph: bool,
    start: Callable[[], None] = lambda: None,
) -> Tensor:
    """Differentiate a score by the network's input.

    The way there is long: gradients that fit float16 at a layer may have grown out of it. Then it is gone once more,
    and again, with gradients 2^8 times smaller.

    Args:
        model: the network.
        score: a scalar.
        leaf: (N, C, H, W).
        retain_graph: whether the graph is needed again.
        start: called before each time.

    Returns:
        (N, C, H, W), float32 or bfloat16.

    Raises:
        InvalidArgument: the score does not depend on the input by a gradient: the network detaches what it computes.
    """
    if not score.requires_grad:
        raise InvalidArgument.of(
            "method",
            "it differentiates by the input, on which this model's score does not depend by a gradient",
            reason="INVALID_OPTION",
        )
    scaled = model.gradient_scale != 1.0
    for reduced in (1.0, 2.0**-8, 2.0**-16):
        start()
        (gradient,) = model.gradients(score * reduced, [leaf], retain_graph=retain_graph or scaled)
        if not scaled or bool(gradient.isfinite().all()):
            break
    return gradient / reduced
