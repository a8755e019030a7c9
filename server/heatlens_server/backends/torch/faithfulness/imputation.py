"""Noisy linear imputation: removed pixels become weighted means of their neighbours, so that no edge gives them away.

Rong et al. 2022, "A Consistent and Efficient Evaluation Strategy for Attribution Methods", arXiv:2202.00449, section 4.
Every removed pixel equals the mean of its 8 neighbours, of which direct ones weigh 1/6 and diagonal ones 1/12; at the
image's border, of those that exist. That is a symmetric, positive definite system of linear equations with as many
unknowns as there are removed pixels. It is solved for many images at once by conjugate gradients, with one multigrid
V-cycle as the preconditioner (Tatebe 1993, "The multigrid preconditioned conjugate gradient method"): a handful of
rounds, whatever the size of the hole.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

NOISE = 0.01
"""Standard deviation of the noise on imputed values of a normalised image, as in the authors' code."""

_SEED = 0
_TOLERANCE = 1e-5
_MAX_ROUNDS = 60
_COARSEST_PX = 4
_COARSEST_SWEEPS = 8


def impute(image: Tensor, removed: Tensor, *, noise: float = NOISE) -> Tensor:
    """Fill removed pixels from those around them, and add noise, always the same.

    Args:
        image: (C, H, W), floating point; values of removed pixels do not matter.
        removed: bool (R, H, W); in each of the R at least one pixel is not.
        noise: standard deviation of the noise.

    Returns:
        (R, C, H, W), in float32 or wider; pixels that are not removed are the image's own.
    """
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    unknown = removed.unsqueeze(1)
    known = torch.where(unknown, 0.0, image)
    filled = torch.where(unknown, _solve(known, unknown), known)
    if noise == 0:
        return filled
    # Drawn on the CPU, so that it is the same on every device.
    drawn = torch.randn(image.shape, generator=torch.Generator().manual_seed(_SEED))
    return torch.where(unknown, filled + noise * drawn.to(filled), filled)


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """The equations at one resolution: diagonal * x - neighbours(x) = right side at unknown pixels, x = 0 elsewhere.

    Attributes:
        unknown: (R, 1, h, w), 1 where unknown and 0 elsewhere.
        diagonal: (R, 1, h, w), the weights of the neighbours that exist where unknown (1 but at borders), 0 elsewhere.
        inverse: (R, 1, h, w), 1 / diagonal where unknown, and 0 elsewhere.
    """

    unknown: Tensor
    diagonal: Tensor
    inverse: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """The left side. x: (R, C, h, w), 0 where known."""
        return self.diagonal * x - self.unknown * _neighbours(x)


def _solve(known: Tensor, unknown: Tensor) -> Tensor:
    """Solve for the unknown pixels.

    Args:
        known: (R, C, H, W), 0 where unknown.
        unknown: bool (R, 1, H, W).

    Returns:
        (R, C, H, W), 0 where known.
    """
    levels = _levels(unknown, known.dtype)
    height, width = known.shape[-2:]
    fine_height, fine_width = levels[0].unknown.shape[-2:]
    residual = levels[0].unknown * _neighbours(F.pad(known, (0, fine_width - width, 0, fine_height - height)))
    goal = _TOLERANCE * _dot(residual, residual).sqrt()
    x = torch.zeros_like(residual)
    direction = better = _cycle(levels, 0, residual)
    slope = _dot(residual, better)
    for _ in range(_MAX_ROUNDS):
        # Each plane stops on its own: how far it comes must not depend on its batch mates.
        going = _dot(residual, residual).sqrt() > goal
        if not bool(going.any()):
            break
        across = levels[0].apply(direction)
        length = _ratio(slope, _dot(direction, across), going)
        x = x + length * direction
        residual = residual - length * across
        better = _cycle(levels, 0, residual)
        before, slope = slope, _dot(residual, better)
        direction = better + _ratio(slope, before, going) * direction
    return x[..., :height, :width]


def _levels(unknown: Tensor, dtype: torch.dtype) -> list[_Level]:
    """The equations at the image's resolution, at half of it, and so on; sides are padded to be halved evenly."""
    height, width = unknown.shape[-2:]
    halvings = 0
    while min(height, width) >> (halvings + 1) >= _COARSEST_PX:
        halvings += 1
    padding = (0, -width % (1 << halvings), 0, -height % (1 << halvings))
    exists = F.pad(torch.ones(1, 1, height, width, dtype=torch.bool, device=unknown.device), padding)
    missing = F.pad(unknown, padding)
    levels = [_level(missing, exists, dtype)]
    for _ in range(halvings):
        # A coarse pixel is unknown if all of it that exists is.
        missing = _all_of_four(missing | ~exists) & ~_all_of_four(~exists)
        exists = ~_all_of_four(~exists)
        levels.append(_level(missing, exists, dtype))
    return levels


def _level(missing: Tensor, exists: Tensor, dtype: torch.dtype) -> _Level:
    unknown = missing.to(dtype)
    diagonal = unknown * _neighbours(exists.to(dtype))
    # A pixel without neighbours has no equation; it becomes 0.
    inverse = unknown / torch.where(diagonal == 0, 1.0, diagonal)
    return _Level(unknown=unknown, diagonal=diagonal, inverse=inverse)


def _all_of_four(pixels: Tensor) -> Tensor:
    """Whether all of each block of 2 x 2 pixels are set: bool (R, 1, h / 2, w / 2) of bool (R, 1, h, w)."""
    pairs = pixels[..., 0::2, :] & pixels[..., 1::2, :]
    return pairs[..., 0::2] & pairs[..., 1::2]


def _cycle(levels: list[_Level], index: int, right: Tensor) -> Tensor:
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
    x = x + level.unknown * F.interpolate(correction, scale_factor=2, mode="bilinear", align_corners=False)
    return x + level.inverse * (right - level.apply(x))


def _neighbours(x: Tensor) -> Tensor:
    """The weighted sum of every pixel's neighbours; nothing is outside. (R, C, h, w).

    Sums of pairs of sums of pairs weigh 1, 2, 1: several times faster than a convolution of single planes.
    """
    around = F.pad(x, (1, 1, 1, 1))
    around = around[..., 1:] + around[..., :-1]
    around = around[..., 1:] + around[..., :-1]
    around = around[..., 1:, :] + around[..., :-1, :]
    around = around[..., 1:, :] + around[..., :-1, :]
    return (around - 4 * x) / 12


def _halved(x: Tensor) -> Tensor:
    """Gather onto half the resolution: the transpose of bilinear interpolation to twice. (R, C, h, w), even sides."""
    x = F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = 0.75 * (x[..., 1:-1:2, :] + x[..., 2:-1:2, :]) + 0.25 * (x[..., :-3:2, :] + x[..., 3::2, :])
    return 0.75 * (x[..., 1:-1:2] + x[..., 2:-1:2]) + 0.25 * (x[..., :-3:2] + x[..., 3::2])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner product of every plane: (R, C, 1, 1)."""
    return (x * y).sum((-2, -1), keepdim=True)


def _ratio(over: Tensor, under: Tensor, wanted: Tensor) -> Tensor:
    """The quotient where wanted, 0 elsewhere."""
    return torch.where(wanted, over / torch.where(wanted, under, 1.0), 0.0)
