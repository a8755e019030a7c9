"""Whether a preprocessing contradicts what the first BatchNormalization of a file has seen in training.

Its running mean and variance are of linear functions of images, which depend on the images' mean and spectrum alone.
Both are known for natural images, so that noise with that spectrum stands for photos.
"""

import dataclasses
from dataclasses import dataclass

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
        means: float64, by channel.
        variances: float64, by channel.
    """

    value: ir.Value
    means: Array
    variances: Array

    def misfit(self, seen: Array) -> float:
        """How far values (N, C, ...) are from it: the median over its channels.

        Of each channel Jeffreys' divergence of the two normal distributions, >= 0 (Kullback and Leibler 1951).
        """
        live = self.variances > max(_LEAST_VARIANCE * np.median(self.variances), 0.0)
        if not live.any():
            return np.inf
        channels = np.moveaxis(seen, 1, 0).reshape(len(live), -1)[live]
        means, variances = self.means[live], self.variances[live]
        ratio = np.maximum(channels.var(1) / variances, _LEAST_VARIANCE)
        distance = (channels.mean(1) - means) ** 2 / variances
        return float(np.median(0.5 * (ratio + 1 / ratio + distance * (1 + 1 / ratio)) - 1))


def contradiction(model: ir.Model, image: ImageInput, spec: PreprocessSpec) -> str:
    """Compare mean, std and scale with usual ones by the running statistics of a file's first BatchNormalization.

    Args:
        model: from `read_file`.
        image: its input.
        spec: what is assumed.

    Returns:
        A sentence that names the values that fit much better; empty if none do, or the file has no such statistics.

    Raises:
        ModelLoadError: the part of the file before them does not run.
    """
    statistics = _first_statistics(model, image.value)
    if statistics is None or image.channels != len(IMAGENET_PREPROCESS.mean):
        return ""
    run = part_before(model, statistics.value, image)
    dtype = (image.value.dtype or ir.DataType.FLOAT).numpy()
    photos = natural_images(*spec.input_px)

    def misfit(tried: PreprocessSpec) -> float:
        inputs = np.stack([normalise(photo, tried) for photo in photos]).astype(dtype)
        inputs = inputs.transpose(0, 2, 3, 1) if image.channels_last else inputs
        # One at a time: a file may take no more.
        return statistics.misfit(np.concatenate([run(one[None]) for one in inputs]))

    usual = [dataclasses.replace(spec, mean=mean, std=std, scale=scale) for mean, std, scale in _USUAL]
    misfits = [misfit(tried) for tried in usual]
    best, assumed = int(np.argmin(misfits)), misfit(spec)
    if misfits[best] > _FIT or assumed < _WORSE * misfits[best]:
        return ""
    return (
        f"The statistics of the file's first BatchNormalization contradict {spec.in_words(_NAMES)}: "
        f"{usual[best].in_words(_NAMES)} fit better (a misfit of {misfits[best]:.2f} against {assumed:.2f}); "
        "set in [models.preprocess] what it was trained with."
    )


def _first_statistics(model: ir.Model, image: ir.Value) -> _Statistics | None:
    """Those of the first BatchNormalization of a linear function of the image."""
    linear = {image}
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "BatchNormalization" and source in linear and source is not None:
            running = [value.const_value for value in node.inputs[3:5] if value is not None]
            means, variances = (np.empty(0) if one is None else one.numpy().astype(np.float64) for one in running)
            is_untrained = not means.any() and bool((variances == 1.0).all())
            return None if is_untrained else _Statistics(source, means, variances)
        if node.op_type in _LINEAR and not linear.isdisjoint(node.inputs):
            linear.update(node.outputs)
    return None


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
