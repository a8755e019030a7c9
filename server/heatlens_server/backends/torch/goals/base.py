"""What a task tells the torch engine: how to run a network, and which of its numbers are explained."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from heatlens_server.backends.torch.cam.saliency import WHOLE, Part
from heatlens_server.core.arrays import Float32Array, UInt8Array
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Score
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target

RunImages = Callable[[UInt8Array], Any]
"""Runs the network, without gradients, on further images (R, H, W, C); returns what `TaskModel.run` does."""


class Goals(ABC):
    """What is to be explained about the images of one batch: of each, some numbers that the network computes."""

    @property
    @abstractmethod
    def width(self) -> int:
        """The most goals that an image has; 1 if none has any, so that there always is a score to differentiate."""

    @property
    @abstractmethod
    def class_ids(self) -> Tensor:
        """int64 (N, width): the class of each goal, ABSENT where there is none."""

    @abstractmethod
    def score(self, k: int) -> Tensor:
        """The sum over the images of their k-th goal's score: a scalar to differentiate, float32 or wider.

        Images do not meet inside a network in eval mode, so its gradient at image n is that of image n's own score.
        """

    @abstractmethod
    def scores_of(self, n: int, output: Any) -> Tensor:  # noqa: ANN401 - what a network returns
        """The scores (R, K) of image n's goals in an output for R changed versions of that image, float32 or wider."""

    @abstractmethod
    def probabilities(self, n: int, output: Any) -> Tensor:  # noqa: ANN401 - what a network returns
        """The same as probabilities, in [0, 1]."""

    @abstractmethod
    def by_name(self, n: int) -> Target:
        """Image n's goals as a target that names them, whatever a changed version of the image scores highest.

        In such a version a goal may be missing: its score is 0 there.
        """

    def least_probable(self, n: int) -> Target | None:  # noqa: ARG002 - for tasks that have no such thing
        """What the network sees least of in image n, as a target; None where the task has no such thing."""
        return None

    @abstractmethod
    def result(self, n: int, maps: Float32Array, scales: Float32Array, offsets: Float32Array) -> ImageResult:
        """Image n's result.

        Args:
            n: which image.
            maps: (width, h, w), of which those of absent goals are dropped.
            scales: (width,).
            offsets: (width,).
        """


class TaskModel(ABC):
    """How a network of one task is run and what can be explained about it."""

    @abstractmethod
    def run(self, module: nn.Module, inputs: Tensor) -> Any:  # noqa: ANN401 - what a network returns
        """Run a network on (R, C, H, W), normalised; return the output that the other methods take."""

    def unpadded(self, output: Any, size_px: tuple[int, int]) -> Any:  # noqa: ANN401, ARG002 - what a network returns
        """The output for images of a size that were padded at the right and bottom: what is not of pixels is the same.

        Args:
            output: what `run` returned for the padded images.
            size_px: (height, width) of the images.
        """
        return output

    def part_on_image(self, module: nn.Module, shape: tuple[int, int, int]) -> Part:  # noqa: ARG002
        """The part of a layer's map that lies on the image: all of it, unless the network pads images.

        Args:
            module: the network.
            shape: (C, H, W) of the image.
        """
        return WHOLE

    def rows(self, output: Any) -> int:  # noqa: ANN401 - what a network returns
        """For how many images an output is."""
        return len(output)

    @abstractmethod
    def goals(self, output: Any, targets: Sequence[Target], *, score: Score, run: RunImages) -> Goals:  # noqa: ANN401
        """Find what the targets ask for in the network's output for N images.

        Args:
            output: what `run` returned, attached to the graph if gradients are wanted.
            targets: N targets.
            score: what is explained about a class.
            run: runs the network on further images.

        Raises:
            InvalidArgument: a target cannot be met by this image; names the field.
            TypeError: a target is of another task.
        """

    @abstractmethod
    def total(self, output: Any, class_count: int) -> Tensor:  # noqa: ANN401 - what a network returns
        """A scalar that depends on all scores: layers that it does not depend on cannot be explained by gradients.

        Raises:
            ModelLoadError: the output is not of this task.
        """


def sum_of(output: Tensor, class_count: int) -> Tensor:
    """The sum of an output (1, class_count), for `TaskModel.total`.

    Raises:
        ModelLoadError: it is of another shape.
    """
    if output.ndim != 2 or output.shape[1] != class_count:
        raise ModelLoadError(f"the model gives an output of shape {tuple(output.shape)}, not (1, {class_count})")
    return output.sum()
