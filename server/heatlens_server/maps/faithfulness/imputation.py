"""Noisy linear imputation: removed pixels become weighted means of their neighbours, so that no edge gives them away.

Rong et al. 2022, "A Consistent and Efficient Evaluation Strategy for Attribution Methods", arXiv:2202.00449, section 4.
Every removed pixel equals the mean of its 8 neighbours, of which direct ones weigh 1/6 and diagonal ones 1/12; at the
image's border, of those that exist. That is a symmetric, positive definite system of linear equations with as many
unknowns as there are removed pixels. It is solved for many images at once by conjugate gradients, with one multigrid
V-cycle as the preconditioner (Tatebe 1993, "The multigrid preconditioned conjugate gradient method"): a handful of
rounds, whatever the size of the hole.
"""

from dataclasses import dataclass

from array_api_compat import array_namespace, device

from heatlens_server.maps.concrete import Array, upsample
from heatlens_server.maps.noise import standard_normal
from heatlens_server.maps.precision import at_least_float32

NOISE = 0.01
"""Standard deviation of the noise on imputed values of a normalised image, as in the authors' code."""

_TOLERANCE = 1e-5
_MAX_ROUNDS = 60
_COARSEST_PX = 4
_COARSEST_SWEEPS = 8


def impute(image: Array, removed: Array, *, noise: float = NOISE) -> Array:
    """Fill removed pixels from those around them, and add noise, always the same.

    Args:
        image: (C, H, W), floating point; values of removed pixels do not matter.
        removed: bool (R, H, W); in each of the R at least one pixel is not.
        noise: standard deviation of the noise.

    Returns:
        (R, C, H, W), in float32 or wider; pixels that are not removed are the image's own.
    """
    xp = array_namespace(image)
    image = at_least_float32(image)
    unknown = removed[:, None]
    known = xp.where(unknown, 0.0, image)
    filled = xp.where(unknown, _solve(known, unknown), known)
    if noise == 0:
        return filled
    return xp.where(unknown, filled + noise * xp.astype(standard_normal([0], image.shape, image), image.dtype), filled)


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """The equations at one resolution: diagonal * x - neighbours(x) = right side at unknown pixels, x = 0 elsewhere.

    Attributes:
        unknown: (R, 1, h, w), 1 where unknown and 0 elsewhere.
        diagonal: (R, 1, h, w), the weights of the neighbours that exist where unknown (1 but at borders), 0 elsewhere.
        inverse: (R, 1, h, w), 1 / diagonal where unknown, and 0 elsewhere.
    """

    unknown: Array
    diagonal: Array
    inverse: Array

    def apply(self, x: Array) -> Array:
        """The left side. x: (R, C, h, w), 0 where known."""
        return self.diagonal * x - self.unknown * _neighbours(x)


def _solve(known: Array, unknown: Array) -> Array:
    """Solve for the unknown pixels.

    Args:
        known: (R, C, H, W), 0 where unknown.
        unknown: bool (R, 1, H, W).

    Returns:
        (R, C, H, W), 0 where known.
    """
    levels = _levels(unknown, known)
    height, width = known.shape[-2:]
    fine_height, fine_width = levels[0].unknown.shape[-2:]
    xp = array_namespace(known)
    residual = levels[0].unknown * _neighbours(_extended(known, fine_height, fine_width))
    goal = _TOLERANCE * xp.sqrt(_dot(residual, residual))
    x = xp.zeros_like(residual)
    direction = better = _cycle(levels, 0, residual)
    slope = _dot(residual, better)
    for _ in range(_MAX_ROUNDS):
        # Each plane stops on its own: how far it comes must not depend on its batch mates.
        going = xp.sqrt(_dot(residual, residual)) > goal
        if not bool(xp.any(going)):
            break
        across = levels[0].apply(direction)
        length = _ratio(slope, _dot(direction, across), going)
        x = x + length * direction
        residual = residual - length * across
        better = _cycle(levels, 0, residual)
        before, slope = slope, _dot(residual, better)
        direction = better + _ratio(slope, before, going) * direction
    return x[..., :height, :width]


def _levels(unknown: Array, like: Array) -> list[_Level]:
    """The equations at the image's resolution, at half of it, and so on; sides are padded to be halved evenly."""
    height, width = unknown.shape[-2:]
    halvings = 0
    while min(height, width) >> (halvings + 1) >= _COARSEST_PX:
        halvings += 1
    padded = height + -height % (1 << halvings), width + -width % (1 << halvings)
    xp = array_namespace(unknown)
    exists = _extended(xp.ones((1, 1, height, width), dtype=xp.bool, device=device(unknown)), *padded)
    missing = _extended(unknown, *padded)
    levels = [_level(missing, exists, like)]
    for _ in range(halvings):
        # A coarse pixel is unknown if all of it that exists is.
        missing = _all_of_four(missing | ~exists) & ~_all_of_four(~exists)
        exists = ~_all_of_four(~exists)
        levels.append(_level(missing, exists, like))
    return levels


def _extended(x: Array, height: int, width: int) -> Array:
    """Zeros, or False, at the right and the bottom of (R, C, h, w), up to a size."""
    xp = array_namespace(x)
    for axis, length in ((-1, width), (-2, height)):
        shape = list(x.shape)
        shape[axis] = length - shape[axis]
        x = xp.concat([x, xp.zeros(tuple(shape), dtype=x.dtype, device=device(x))], axis=axis)
    return x


def _level(missing: Array, exists: Array, like: Array) -> _Level:
    xp = array_namespace(missing)
    unknown = xp.astype(missing, like.dtype)
    diagonal = unknown * _neighbours(xp.astype(exists, like.dtype))
    # A pixel without neighbours has no equation; it becomes 0.
    inverse = unknown / xp.where(diagonal == 0, 1.0, diagonal)
    return _Level(unknown=unknown, diagonal=diagonal, inverse=inverse)


def _all_of_four(pixels: Array) -> Array:
    """Whether all of each block of 2 x 2 pixels are set: bool (R, 1, h / 2, w / 2) of bool (R, 1, h, w)."""
    pairs = pixels[..., 0::2, :] & pixels[..., 1::2, :]
    return pairs[..., 0::2] & pairs[..., 1::2]


def _cycle(levels: list[_Level], index: int, right: Array) -> Array:
    """One V-cycle from zero: about the solution for a right side (R, C, h, w). Linear and symmetric in it.

    Jacobi sweeps without damping are good here: each leaves a third of the error's fast waves.
    """
    level = levels[index]
    x = level.inverse * right
    if index == len(levels) - 1:
        for _ in range(_COARSEST_SWEEPS):
            x = x + level.inverse * (right - level.apply(x))
        return x
    coarser = levels[index + 1]
    correction = _cycle(levels, index + 1, coarser.unknown * _halved(right - level.apply(x)))
    x = x + level.unknown * upsample(correction, (right.shape[-2], right.shape[-1]))
    return x + level.inverse * (right - level.apply(x))


def _neighbours(x: Array) -> Array:
    """The weighted sum of every pixel's neighbours; nothing is outside. (R, C, h, w).

    Sums of pairs of sums of pairs weigh 1, 2, 1: several times faster than a convolution of single planes.
    """
    xp = array_namespace(x)
    around = xp.concat([x[..., :1], x[..., 1:] + x[..., :-1], x[..., -1:]], axis=-1)
    around = around[..., 1:] + around[..., :-1]
    around = xp.concat([around[..., :1, :], around[..., 1:, :] + around[..., :-1, :], around[..., -1:, :]], axis=-2)
    around = around[..., 1:, :] + around[..., :-1, :]
    return (around - 4 * x) / 12


def _halved(x: Array) -> Array:
    """Gather onto half the resolution: the transpose of bilinear interpolation to twice. (R, C, h, w), even sides."""
    xp = array_namespace(x)
    x = xp.concat([x[..., :1, :], x, x[..., -1:, :]], axis=-2)
    x = 0.75 * (x[..., 1:-1:2, :] + x[..., 2:-1:2, :]) + 0.25 * (x[..., :-3:2, :] + x[..., 3::2, :])
    x = xp.concat([x[..., :1], x, x[..., -1:]], axis=-1)
    return 0.75 * (x[..., 1:-1:2] + x[..., 2:-1:2]) + 0.25 * (x[..., :-3:2] + x[..., 3::2])


def _dot(x: Array, y: Array) -> Array:
    """The inner product of every plane: (R, C, 1, 1)."""
    return array_namespace(x).sum(x * y, axis=(-2, -1), keepdims=True)


def _ratio(over: Array, under: Array, wanted: Array) -> Array:
    """The quotient where wanted, 0 elsewhere."""
    xp = array_namespace(over)
    return xp.where(wanted, over / xp.where(wanted, under, 1.0), 0.0)
