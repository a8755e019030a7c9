"""How far what a graph says is from float64: one figure per output, and what each may be.

Raw gradients are not compared, their channel means are: where two inputs of a max-pooling are nearly equal, rounding
decides which of them the gradient goes to, and either is right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.backends.torch.export.reference import Reference, pooled
from heatlens_server.core.graph_spec import MAP_OUTPUTS, Output
from heatlens_server.core.methods import Method
from heatlens_server.maps.activation_maps import fem_distance
from heatlens_server.maps.methods import raw_map

WEIGHTS = "weights"
"""The figure that stands for the gradients: their mean over each channel."""

PER_CLASS = (WEIGHTS, *MAP_OUTPUTS)
"""The figures that every explained class has its own of."""

# Below this share of the raw map's largest magnitude, what is left after ReLU is mostly rounding.
_FLAT_SHARE = 1e-2

# A graph may round activations by so many times what the network itself does.
_ROUNDING_ROOM = 4.0

# Activations that rounding moves by more than this part of the largest are in half precision.
_FLOAT32_ROUNDING = 1e-3

Array = npt.NDArray[Any]


_FORWARD = (Output.LOGITS, Output.ACTIVATIONS)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What figures may differ from float64 by: absolute for cam, relative to the image's largest for all others.

    Attributes:
        error: what any figure may differ by.
        forward_limit: what logits and activations may differ by at most, where the network itself in the graph's
            precision is not better.
        limit: the same for all other figures: gradients jump where a ReLU or a maximum is about to switch.
    """

    error: float
    forward_limit: float
    limit: float

    def bound(self, figure: str, own_error: float) -> float:
        """What a figure's error may be, if the network itself in the graph's precision has `own_error`."""
        limit = self.forward_limit if figure in _FORWARD else self.limit
        return max(self.error, min(4.0 * own_error, limit))

    @property
    def unknown(self) -> float:
        """What the network itself misses by more, of one image and class, is not compared: no graph can know it."""
        return self.limit / 2


TOLERANCES = {"fp32": Tolerance(1e-4, 1e-3, 0.02), "fp16": Tolerance(0.02, 0.1, 0.2)}
"""By precision of the graph."""


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """What the float64 network says about N images, K classes each, by one layer and method.

    Attributes:
        class_ids: int64 (N, K), the classes explained.
        values: float64 by figure: logits (N, C), activations (N, A, h, w), weights (N, K, A), cam (N, K, h, w),
            cam_scale and cam_offset (N, K).
        units: by figure, the size that a difference is measured in; of the same shape.
        shaped: bool (N, K), the maps that are not flat: what is left after ReLU is more than rounding, and FEM's do not
            hang on which side of its rule rounding puts an activation.
        known: by figure of every class, bool (N, K): where the network itself in the graph's precision misses by no
            more than `Tolerance.unknown`.
        own_error: by figure, the error of the network itself in the graph's precision where it is known.
    """

    class_ids: npt.NDArray[np.int64]
    values: Mapping[str, Array]
    units: Mapping[str, Array]
    shaped: npt.NDArray[np.bool_]
    known: Mapping[str, npt.NDArray[np.bool_]]
    own_error: Mapping[str, float]

    @property
    def informative(self) -> npt.NDArray[np.bool_]:
        """The maps that are worth comparing, (N, K): neither flat nor unknown."""
        return self.shaped & self.known[Output.CAM]

    def errors(self, outputs: Mapping[Output, Array], rows: slice) -> dict[str, float]:
        """Largest difference of a graph's outputs from what is expected, by figure.

        Args:
            outputs: what the graph returned for the images of `rows`. Of the classes it explained, the first K are
                those of `class_ids`, or fewer; further ones are not compared.
            rows: which of the N images.

        Returns:
            By figure. NaN if an output is not finite, also where nothing is compared.
        """
        errors: dict[str, float] = {}
        for name, values in figures(outputs).items():
            chosen: tuple[slice, ...] = (rows,)
            found = values
            if name in PER_CLASS:
                found = values[:, : self.class_ids.shape[1]]
                chosen = (rows, slice(found.shape[1]))
            difference = np.abs(found - self.values[name][chosen]) / self.units[name][chosen]
            if name in PER_CLASS:
                difference = difference[(self.informative if name == Output.CAM else self.known[name])[chosen]]
            errors[name] = float(difference.max(initial=0.0)) if np.isfinite(values).all() else float("nan")
        return errors


def expected(
    reference: Reference, own: Reference | None, method: Method, *, unknown: float, moved: Sequence[Reference] = ()
) -> Expected:
    """Find out what a graph of a method should say, and how well that is known.

    Args:
        reference: of the float64 network.
        own: of the network in the graph's precision; None if it cannot run there: then all is taken for known.
        method: which one.
        unknown: `Tolerance.unknown` of the graph's precision.
        moved: of the network's `moved_copies`: what they miss by, the network itself may as well.
    """
    values = figures(outputs_of(reference, method))
    peak = _nonzero(_raw(reference, method).abs().amax((-2, -1)).numpy())
    units = {
        Output.LOGITS: _largest(values[Output.LOGITS], (1,)),
        Output.ACTIVATIONS: _largest(values[Output.ACTIVATIONS], (1, 2, 3)),
        WEIGHTS: _largest(values[WEIGHTS], (2,)),
        Output.CAM: np.ones((1, 1, 1, 1)),
        Output.CAM_SCALE: peak,
        Output.CAM_OFFSET: peak,
    }
    units = {name: np.broadcast_to(unit, values[name].shape) for name, unit in units.items()}
    shaped = values[Output.CAM_SCALE] > _FLAT_SHARE * peak
    differences: dict[str, Array] = {}
    for run in [] if own is None else [own, *moved]:
        for name, found in figures(outputs_of(run, method)).items():
            difference = np.abs(found - values[name]) / units[name]
            if name in PER_CLASS:
                difference = difference.reshape(*shaped.shape, -1).max(-1)
                if method is Method.FEM and name in MAP_OUTPUTS:
                    unit = _nonzero(values[Output.CAM_SCALE]) if name == Output.CAM else peak
                    steps = _moved_by_steps(reference, run) / unit
                    difference = np.maximum(difference, steps)
                    # What rounding decides proves as little as a flat map does.
                    shaped = shaped & (steps <= unknown)
            differences[name] = np.maximum(differences.get(name, 0.0), difference)
    known = {name: np.ones_like(shaped) for name in PER_CLASS}
    own_error = {}
    for name, difference in differences.items():
        compared = difference
        if name in PER_CLASS:
            known[name] = difference <= unknown
            compared = difference[known[name] & (shaped | (name != Output.CAM))]
        # What the network itself overflows in is no rounding to allow for.
        own_error[name] = float(compared[np.isfinite(compared)].max(initial=0.0))
    return Expected(reference.class_ids.numpy(), values, units, shaped, known, own_error)


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


def _moved_by_steps(reference: Reference, own: Reference) -> Array:
    """What rounding may move FEM's map by, (N, 1): activations within rounding of its rule fall on either side of it.

    In half precision some of very many always do: there the network's own error says what to expect, and this is 0.
    """
    size = reference.activations.abs().amax((1, 2, 3), keepdim=True)
    rounding = (own.activations - reference.activations).abs().amax((1, 2, 3), keepdim=True)
    means, distance = fem_distance(reference.activations)
    near = distance.abs() <= _ROUNDING_ROOM * rounding + torch.finfo(distance.dtype).eps * size
    # Both ends of a map may move by this.
    moved = 2.0 * (means.abs() * near).sum(1).amax((-2, -1))[:, None]
    return torch.where((rounding > _FLOAT32_ROUNDING * size)[:, 0, 0], 0.0, moved).numpy()


def _largest(values: Array, axes: tuple[int, ...]) -> Array:
    return _nonzero(np.abs(values).max(axes, keepdims=True))


def _nonzero(values: Array) -> Array:
    # What is zero everywhere is compared absolutely.
    return np.where(values == 0, 1.0, values)
