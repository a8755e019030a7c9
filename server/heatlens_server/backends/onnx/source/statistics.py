"""Whether a preprocessing contradicts what a file was trained or quantised with.

The running mean and variance of its first BatchNormalization are of linear functions of images, which depend on the
images' mean and spectrum alone. Both are known for natural images, so that noise with that spectrum stands for photos.
A file that quantises its input holds the range of the images that it was calibrated with.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.find import ImageInput
from heatlens_server.backends.onnx.gradient.tape import Array
from heatlens_server.backends.onnx.source.inside import PREPARING, part_before
from heatlens_server.config import IMAGENET_PREPROCESS
from heatlens_server.core.arrays import UInt8Array
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.imaging.preprocess import normalise

_LINEAR = (PREPARING | {"Conv"}) - {"Clip"}

_IMAGES = 2
_SLOPE = 1.1
"""Amplitudes fall with frequency as f**-1.1 (Field 1987; 0.8 to 1.5 in Tolhurst, Tadmor and Chao 1992)."""
_AXES = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / np.sqrt([[3], [6], [2]])
"""Of the colours of natural images: light, blue against yellow, red against green (Ruderman, Cronin and Chiao 1998)."""
_VARIANCES = (0.93, 0.055, 0.015)
"""Of colours along these axes, of a sum of 1."""

_WHITE = 255.0
_USUAL = (
    # mean, std and scale: ImageNet's, [0, 1], [-1, 1], levels, and Caffe's.
    (IMAGENET_PREPROCESS.mean, IMAGENET_PREPROCESS.std, 1.0),
    ((0.0,) * 3, (1.0,) * 3, 1.0),
    ((0.5,) * 3, (0.5,) * 3, 1.0),
    ((0.0,) * 3, (1.0,) * 3, _WHITE),
    (tuple(_WHITE * value for value in IMAGENET_PREPROCESS.mean), (1.0,) * 3, _WHITE),
)

_MOST_PIXELS = 1 << 20
"""Of an input for which images are made."""

_FIT = 0.6
_WORSE = 3.0
"""Of six trained networks the right values had misfits of 0.03 to 0.35, and the next best 5 to 42 times as much."""

_LEAST_VARIANCE = 1e-3
"""Of the median: channels below it have been switched off in training."""

_NAMES = frozenset({"mean", "std", "scale"})


@dataclass(frozen=True, slots=True)
class _Statistics:
    """What a BatchNormalization has seen in training.

    Attributes:
        value: its input, in the graph.
        means: by channel.
        variances: by channel.
    """

    value: ir.Value
    means: Array
    variances: Array
    operator: ClassVar[str] = "BatchNormalization"

    def images(self, height_px: int, width_px: int) -> UInt8Array:
        """What photos look like to it: (2, height, width, 3)."""
        return natural_images(height_px, width_px)

    def misfit(self, seen: Array) -> float:
        """How far values (N, C, ...) are from it: the median over its channels.

        Of each channel Jeffreys' divergence of the two normal distributions, >= 0 (Kullback and Leibler 1951).
        """
        live = self.variances > max(_LEAST_VARIANCE * np.median(self.variances), 0.0)
        if not live.any():
            return np.inf
        channels = np.moveaxis(seen, 1, 0).reshape(len(live), -1)[live]
        means, variances = (values[live].astype(np.float64) for values in (self.means, self.variances))
        ratio = np.maximum(channels.var(1) / variances, _LEAST_VARIANCE)
        distance = (channels.mean(1) - means) ** 2 / variances
        return float(np.median(0.5 * (ratio + 1 / ratio + distance * (1 + 1 / ratio)) - 1))


@dataclass(frozen=True, slots=True)
class _Range:
    """What the first quantisation of a file is for.

    Attributes:
        value: its input, in the graph.
        low: the least value that is not clipped.
        high: the greatest one.
        is_symmetric: whether the longer end alone was calibrated.
    """

    value: ir.Value
    low: float
    high: float
    is_symmetric: bool
    operator: ClassVar[str] = "QuantizeLinear"

    def images(self, height_px: int, width_px: int) -> UInt8Array:
        """Black and white, (2, height, width, 3): photos have both."""
        return np.stack([np.full((height_px, width_px, 3), level, np.uint8) for level in (0, 255)])

    def misfit(self, seen: Array) -> float:
        """How far the range of values (N, ...) is from it, in its lengths, >= 0."""
        low, high = float(seen.min()), float(seen.max())
        if self.is_symmetric:
            return abs(max(-low, high) / self.high - 1)
        return (abs(low - self.low) + abs(high - self.high)) / (self.high - self.low)


def contradiction(model: ir.Model, image: ImageInput, spec: PreprocessSpec) -> str:
    """Compare mean, std and scale with usual ones by a file's first running statistics, or the range of its input.

    Args:
        model: from `read_file`.
        image: its input.
        spec: what is assumed.

    Returns:
        A sentence that names the values that fit much better; empty if none do, or the file has neither.

    Raises:
        ModelLoadError: the part of the file before them does not run.
    """
    evidence = _first_evidence(model, image.value)
    height_px, width_px = spec.input_px
    if evidence is None or image.channels != len(IMAGENET_PREPROCESS.mean) or height_px * width_px > _MOST_PIXELS:
        return ""
    run = part_before(model, evidence.value, image)
    dtype = (image.value.dtype or ir.DataType.FLOAT).numpy()
    photos = evidence.images(height_px, width_px)

    def misfit(tried: PreprocessSpec) -> float:
        inputs = np.stack([normalise(photo, tried) for photo in photos]).astype(dtype)
        inputs = inputs.transpose(0, 2, 3, 1) if image.channels_last else inputs
        # One at a time: a file may take no more.
        return evidence.misfit(np.concatenate([run(one[None]) for one in inputs]))

    usual = [dataclasses.replace(spec, mean=mean, std=std, scale=scale) for mean, std, scale in _USUAL]
    misfits = [misfit(tried) for tried in usual]
    best, assumed = int(np.argmin(misfits)), misfit(spec)
    if misfits[best] > _FIT or assumed < _WORSE * misfits[best]:
        return ""
    return (
        f"The file's first {evidence.operator} contradicts {spec.in_words(_NAMES)}: "
        f"{usual[best].in_words(_NAMES)} fit better (a misfit of {misfits[best]:.2f} against {assumed:.2f}); "
        "set in [models.preprocess] what it was trained with."
    )


def _first_evidence(model: ir.Model, image: ir.Value) -> _Statistics | _Range | None:
    """Of the quantisation of the input, or of the first BatchNormalization of a linear function of it."""
    linear = {image}
    is_input = True
    for node in model.graph:
        if linear.isdisjoint(node.inputs):
            continue
        source = node.inputs[0]
        if node.op_type == "QuantizeLinear" and source is not None:
            return _range(node, source) if is_input else None
        if node.op_type == "BatchNormalization" and source in linear and source is not None:
            return _statistics(node, source)
        if node.op_type in _LINEAR:
            linear.update(node.outputs)
            is_input = is_input and node.op_type != "Conv"
    return None


def _statistics(node: ir.Node, source: ir.Value) -> _Statistics | None:
    means, variances = (_constant(value) for value in node.inputs[3:5])
    # As they are before training.
    is_untrained = not means.any() and bool((variances == 1.0).all())
    return None if is_untrained else _Statistics(source, means, variances)


def _range(node: ir.Node, source: ir.Value) -> _Range | None:
    step, *zero = (_constant(value) for value in node.inputs[1:])
    zero_point = zero[0] if zero and zero[0].size else np.zeros(1, np.uint8)
    if step.size != 1 or zero_point.size != 1 or step.item() <= 0 or not np.issubdtype(zero_point.dtype, np.integer):
        return None
    levels = np.iinfo(zero_point.dtype)
    low, high = ((level - int(zero_point.item())) * float(step.item()) for level in (levels.min, levels.max))
    return _Range(source, low, high, is_symmetric=levels.min < 0 and zero_point.item() == 0)


def _constant(value: ir.Value | None) -> Array:
    """A constant's elements; none if it is computed."""
    return np.empty(0) if value is None or value.const_value is None else value.const_value.numpy()


def natural_images(height_px: int, width_px: int) -> UInt8Array:
    """Noise with the mean, the colours and the spectrum of natural images: (2, height, width, 3), always the same."""
    rng = np.random.default_rng(0)
    frequencies = np.hypot(
        height_px * np.fft.fftfreq(height_px)[:, None], width_px * np.fft.rfftfreq(width_px)[None, :]
    )
    # The mean of an image varies as its slowest wave does.
    frequencies[0, 0] = 1.0
    noise = rng.normal(size=(_IMAGES, 3, height_px, width_px))
    waves: Array = np.fft.irfft2(np.fft.rfft2(noise) * frequencies**-_SLOPE, (height_px, width_px))
    waves /= waves.std((0, 2, 3), keepdims=True)
    colours = np.einsum("nkhw,kc->nhwc", waves, np.sqrt(_VARIANCES)[:, None] * _AXES)
    colours *= np.array(IMAGENET_PREPROCESS.std) / colours.std((0, 1, 2))
    levels: Array = (colours + IMAGENET_PREPROCESS.mean) * _WHITE
    return levels.round().clip(0, _WHITE).astype(np.uint8)
