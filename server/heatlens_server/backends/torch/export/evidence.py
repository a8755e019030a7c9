"""Whether verifying a layer's graphs has proven anything."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.torch.export.comparison import PER_CLASS, Truth
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Output
from heatlens_server.core.methods import Method


@dataclass(slots=True)
class Evidence:
    """Whether anything that the gradients of a layer decide was compared.

    Attributes:
        shaped: maps that are not flat, all methods together.
        compared: those of them that were compared.
    """

    shaped: int = 0
    compared: int = 0

    def add(self, truth: Truth, names: Collection[str], reached: npt.NDArray[np.bool_]) -> None:
        """Count a method's maps.

        Args:
            truth: about them.
            names: the figures that its graph has. Without maps, what it has for every class stands in their place.
            reached: bool (N, K), which of the maps were asked for.
        """
        found = [Output.CAM] if Output.CAM in names else [name for name in PER_CLASS if name in names]
        if found:
            shaped = truth.shaped & reached
            self.shaped += int(shaped.sum())
            self.compared += int((shaped & np.any([truth.known[name] for name in found], axis=0)).sum())

    def check(self, files: str, layer: str, *, precision: str, unknown: float) -> None:
        """Raise ExportError if there were maps to compare, and the network itself missed all by more than `unknown`."""
        if self.shaped and not self.compared:
            raise ExportError(
                f"{files}, layer {layer}: no map could be compared: the network itself in {precision} misses all "
                f"{self.shaped} that are not flat by more than {unknown:g}"
            )


def telling(methods: Sequence[Method]) -> frozenset[Method]:
    """The methods whose maps prove something: those of gradients, where there are any.

    Maps of activations alone are right even where the backward pass is wrong, or its maps are all flat.
    """
    return frozenset(method for method in methods if not method.traits.class_free) or frozenset(methods)
