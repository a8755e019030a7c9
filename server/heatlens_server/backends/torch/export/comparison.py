"""How far what a graph says is from the truth: one relative figure per output.

Raw gradients are not compared, their channel means are: where two inputs of a max-pooling are nearly equal, rounding
decides which of them the gradient goes to, and either is right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.activation_maps import fem_distance
from heatlens_server.backends.torch.cam.methods import raw_map
from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.backends.torch.export.reference import Reference, pooled
from heatlens_server.core.graph_spec import MAP_OUTPUTS, Output
from heatlens_server.core.methods import Method

WEIGHTS = "weights"
"""The figure that stands for the gradients: their mean over each channel."""

PER_CLASS = (WEIGHTS, *MAP_OUTPUTS)
"""The figures that every explained class has its own of."""

# Below this share of the raw map's largest magnitude, what is left after ReLU is mostly rounding.
_FLAT_SHARE = 1e-2

# How many times the rounding of a network's activations a graph's may be.
_ROOM = 4.0

# What part of an image's largest activation is more than float32's rounding.
_MUCH = 1e-3

# Taken for rounding where a network cannot be run in the graph's precision.
_HALF_PRECISION = 2.0**-9

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What a float64 network says about N images, K classes each, by one layer and method.

    Attributes:
        class_ids: int64 (N, K), the classes explained.
        values: float64 by figure: logits (N, C), activations (N, A, h, w), weights (N, K, A), cam (N, K, h, w),
            cam_scale and cam_offset (N, K).
        units: by figure, the size that a difference is measured in; broadcasts against its values.
        shaped: bool (N, K), the maps that are not flat: what is left after ReLU is more than rounding.
        known: by figure of every class, bool (N, K): where the network itself in the graph's precision is near enough
            to float64 for a comparison to mean something.
        own_error: by figure, the error of the network itself in the graph's precision.
        slack: by figure, what it may differ by because a step of the method is within rounding; broadcasts.
        by_position: whether a map depends on its class's position among the K.
    """

    class_ids: npt.NDArray[np.int64]
    values: Mapping[str, Array]
    units: Mapping[str, Array]
    shaped: npt.NDArray[np.bool_]
    known: Mapping[str, npt.NDArray[np.bool_]]
    own_error: Mapping[str, float]
    slack: Mapping[str, Array] = field(default_factory=dict)
    by_position: bool = False

    @property
    def informative(self) -> npt.NDArray[np.bool_]:
        """The maps that are worth comparing, (N, K): neither flat nor unknown."""
        return self.shaped & self.known[Output.CAM]

    def error(self, outputs: Mapping[Output, Array], rows: slice, columns: npt.NDArray[np.intp]) -> dict[str, float]:
        """Largest difference of a graph's outputs from the truth, by figure.

        Args:
            outputs: what the graph returned for the images of `rows`.
            rows: which of the N images.
            columns: for every class that the graph explained, which of the K it is.

        Returns:
            By figure: absolute for cam, relative to the image's largest magnitude for the others. NaN if an output is
            not finite, be it where nothing is compared.
        """
        errors: dict[str, float] = {}
        for name, values in figures(outputs).items():
            found, of_class = values, columns
            if self.by_position and name in MAP_OUTPUTS:
                # A class that is asked for twice has another map there.
                first = columns == np.arange(len(columns))
                found, of_class = values[:, first], columns[first]
            difference = _difference(self, name, found, rows, of_class)
            if name in self.known:
                known = self.informative if name == Output.CAM else self.known[name]
                difference = difference[known[rows][:, of_class]]
            finite = bool(np.isfinite(values).all())
            errors[name] = float(difference.max(initial=0.0)) if finite else float("nan")
        return errors


def truth(judge: Reference, own: Reference | None, method: Method, *, unknown: float) -> Truth:
    """Make the truth about a layer and method.

    Args:
        judge: of the float64 network.
        own: of the network in the graph's precision; None if it cannot run there.
        method: which one.
        unknown: what the network itself misses by more, of one image and class, is not worth comparing.
    """
    raw = _raw(judge, method)
    values = figures(outputs_of(judge, method))
    peak = raw.abs().amax((-2, -1)).numpy()
    units = {
        Output.LOGITS: _largest(values[Output.LOGITS], (1,)),
        Output.ACTIVATIONS: _largest(values[Output.ACTIVATIONS], (1, 2, 3)),
        WEIGHTS: _largest(values[WEIGHTS], (2,)),
        Output.CAM: np.ones((1, 1, 1, 1)),
        Output.CAM_SCALE: _nonzero(peak),
        Output.CAM_OFFSET: _nonzero(peak),
    }
    shaped = values[Output.CAM_SCALE] > _FLAT_SHARE * peak
    everywhere = {name: np.ones_like(shaped) for name in PER_CLASS}
    slack = _slack_of_steps(judge, own, values, peak) if method is Method.FEM else {}
    by_position = method is Method.RANDOM_CAM
    known = Truth(judge.class_ids.numpy(), values, units, shaped, everywhere, {}, slack, by_position)
    if own is None:
        return known
    differences = {
        name: _difference(known, name, found, slice(None), np.arange(shaped.shape[1]))
        for name, found in figures(outputs_of(own, method)).items()
    }
    near = {name: _worst(differences[name]) <= unknown for name in PER_CLASS}
    differences[Output.CAM] = differences[Output.CAM][shaped & near[Output.CAM]]
    # What the network itself overflows in is no rounding to allow for.
    own_error = {
        name: float(difference[np.isfinite(difference)].max(initial=0.0)) for name, difference in differences.items()
    }
    return replace(known, known=near, own_error=own_error)


def figures(outputs: Mapping[Output, Array]) -> dict[str, Array]:
    """The figures that can be compared among a graph's outputs, in float64."""
    found: dict[str, Array] = {}
    # In the graph's order: of what is not finite, the first is to blame.
    for output, values in outputs.items():
        if output is Output.GRADIENTS:
            found[WEIGHTS] = pooled(torch.from_numpy(values).double()).numpy()
        elif output is not Output.CLASS_ID:
            found[str(output)] = values.astype(np.float64, copy=False)
    return found


def outputs_of(reference: Reference, method: Method) -> dict[Output, Array]:
    """What a graph of that method would return."""
    finished = saliency([_raw(reference, method)])
    tensors = {
        Output.LOGITS: reference.logits,
        Output.CLASS_ID: reference.class_ids,
        Output.ACTIVATIONS: reference.activations,
        Output.GRADIENTS: reference.gradients,
        Output.CAM: finished.values,
        Output.CAM_SCALE: finished.scale,
        Output.CAM_OFFSET: finished.offset,
    }
    return {output: tensor.numpy() for output, tensor in tensors.items()}


def _raw(reference: Reference, method: Method) -> Tensor:
    # Where CAM applies, the gradients summed over all pixels are the head's weights.
    gradients = reference.gradients.sum((-2, -1)) if method is Method.CAM else reference.gradients
    return raw_map(method, reference.activations, gradients)


def _difference(truth: Truth, name: str, values: Array, rows: slice, columns: npt.NDArray[np.intp]) -> Array:
    """How far a figure of some images is off, in its unit."""
    expected, unit = truth.values[name][rows], np.broadcast_to(truth.units[name], truth.values[name].shape)[rows]
    if name in PER_CLASS:
        expected, unit = expected[:, columns], unit[:, columns]
    difference: Array = np.abs(values - expected) / unit
    slack = truth.slack.get(name)
    if slack is not None:
        difference = np.maximum(difference - slack[rows][:, columns], 0.0)
    return difference


def _slack_of_steps(
    judge: Reference, own: Reference | None, values: Mapping[str, Array], peak: Array
) -> dict[str, Array]:
    """What FEM's figures may differ by: activations that are within rounding of its rule may fall on either side of it.

    Rounding is what the network in the graph's precision does to an image's activations, with room to spare. Where that
    is much, as in half precision, some of very many are on the other side whatever is run: then the network's own error
    says what to expect, and there is no slack.
    """
    size = judge.activations.abs().amax((1, 2, 3), keepdim=True)
    rounding = _HALF_PRECISION * size
    if own is not None:
        rounding = (own.activations - judge.activations).abs().amax((1, 2, 3), keepdim=True)
        rounding = torch.where(rounding > _MUCH * size, 0.0, rounding)
    means, distance = fem_distance(judge.activations)
    near = distance.abs() <= _ROOM * rounding + torch.finfo(distance.dtype).eps * size
    # Both ends of a map may move by this.
    moved = 2.0 * (means.abs() * near).sum(1).amax((-2, -1))[:, None].numpy()
    scale = _nonzero(values[Output.CAM_SCALE])
    of_scale = np.broadcast_to(moved / _nonzero(peak), scale.shape)
    return {Output.CAM: (moved / scale)[..., None, None], Output.CAM_SCALE: of_scale, Output.CAM_OFFSET: of_scale}


def _worst(difference: Array) -> Array:
    """(N, K, ...) to (N, K)."""
    worst: Array = difference.reshape(*difference.shape[:2], -1).max(-1)
    return worst


def _largest(values: Array, axes: tuple[int, ...]) -> Array:
    return _nonzero(np.abs(values).max(axes, keepdims=True))


def _nonzero(values: Array) -> Array:
    # What is zero everywhere is compared absolutely.
    return np.where(values == 0, 1.0, values)
