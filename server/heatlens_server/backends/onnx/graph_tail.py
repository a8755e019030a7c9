"""What comes behind a layer, opened: scores of changed activations of one image, many in one run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.goals import Scores
from heatlens_server.backends.onnx.packed import OpenGraph
from heatlens_server.backends.onnx.passes import Tail
from heatlens_server.backends.onnx.providers import is_out_of_memory

Array = npt.NDArray[Any]

_TOLERANCE = 1e-3
"""What scores may differ by, relative to the largest, for having been computed in one run with others."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenTail:
    """A tail in sessions.

    Attributes:
        tail: what it is.
        graph: of it.
        before: what computes the values that bypass the layer, if anything has to.
        takes_rows: whether several rows may run at once.
    """

    tail: Tail
    graph: OpenGraph
    before: OpenGraph | None
    takes_rows: bool = False

    def kept(self, given: Array) -> Mapping[str, Array]:
        """The values that bypass the layer, of one image as the network takes it."""
        found = {self.tail.image: given}
        if self.before is not None:
            names = [name for name in self.tail.kept if name != self.tail.image]
            found |= zip(names, self.before.run(names, found), strict=True)
        return {name: found[name] for name in self.tail.kept}

    def run(self, activations: Array, kept: Mapping[str, Array]) -> Scores:
        """The scores of R rows of activations, each beside the same values that bypass the layer."""
        if self.takes_rows or len(activations) == 1:
            return self._run(activations, kept)
        found = [self._run(row[None], kept) for row in activations]
        return {name: np.concatenate([one[name] for one in found]) for name in self.tail.scores}

    def tried(self, activations: Array, kept: Mapping[str, Array]) -> "OpenTail":
        """The same, with `takes_rows` if two rows have in one run the scores that each has alone.

        They may not: where what bypasses the layer has its images in another order, or the tail mixes them.

        Args:
            activations: of one image; the other row is 1 less these, which differs even where they are nothing.
            kept: of that image.
        """
        two = np.concatenate([activations, 1 - activations])
        alone = self.run(two, kept)
        try:
            together = self._run(two, kept)
        # onnxruntime has an exception class for each of its status codes.
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return self
        return replace(self, takes_rows=all(_alike(together[name], of_rows) for name, of_rows in alone.items()))

    def _run(self, activations: Array, kept: Mapping[str, Array]) -> Scores:
        repeated = {
            name: np.concatenate([value] * len(activations), axis=self.tail.kept[name]) for name, value in kept.items()
        }
        found = self.graph.run(self.tail.scores, {self.tail.layer: activations, **repeated})
        return dict(zip(self.tail.scores, found, strict=True))


def _alike(found: Array, expected: Array) -> bool:
    largest = float(np.abs(expected, where=np.isfinite(expected), out=np.zeros_like(expected)).max())
    return found.shape == expected.shape and np.allclose(
        found, expected, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True
    )
