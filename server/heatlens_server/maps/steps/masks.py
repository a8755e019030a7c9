"""What methods of many runs change: masks over the image, channels taken out of a layer, places left alone in it.

A layer's output is given by its levels, maps (1, C_i, h_i, w_i): one, or those of a pyramid.
"""

from collections.abc import Sequence

from array_api_compat import array_namespace, device

from heatlens_server.maps.concrete import Array, upsample
from heatlens_server.maps.precision import at_least_float32


def constant_channels(features: Array) -> Array:
    """Which channels have one value everywhere: they say nothing about places.

    Args:
        features: (1, C, h, w).

    Returns:
        bool (C,).
    """
    xp = array_namespace(features)
    return (xp.max(features, axis=(-2, -1)) == xp.min(features, axis=(-2, -1)))[0]


def channel_masks(features: Array, size: tuple[int, int]) -> Array:
    """Every channel as a mask over the image: upsampled, then stretched to [0, 1].

    Wang et al. 2020, https://arxiv.org/abs/1910.01279, equations 5 and 6, upsampled with half-pixel centres as in the
    authors' code (and `torch-cam`; the `grad-cam` package aligns corners instead). The mask of a constant channel,
    0 / 0 in the paper, is zero: found before the upsampling, whose rounding would else be stretched to a mask.

    Args:
        features: (1, C, h, w).
        size: (height, width) of the image.

    Returns:
        (C, 1, height, width), float32 or wider.
    """
    xp = array_namespace(features)
    maps = xp.permute_dims(upsample(at_least_float32(features), size), (1, 0, 2, 3))
    least = xp.min(maps, axis=(-2, -1), keepdims=True)
    spread = xp.max(maps, axis=(-2, -1), keepdims=True) - least
    nothing = constant_channels(features)[:, None, None, None] | (spread == 0)
    return xp.where(nothing, 0.0, (maps - least) / xp.where(nothing, 1.0, spread))


def place_masks(places: Array, height: int, width: int, *, neighbours: bool) -> Array:
    """Masks over a layer that each leave one place alone, or a place and, weaker, its neighbours.

    The neighbours' are the 3x3 Gaussian of Recipro-CAM and ViT-Recipro-CAM, the product of (1/4, 1/2, 1/4) down and
    across. Beyond the edge is nothing, and nothing makes up for that.

    Args:
        places: int64 (R,), each in [0, height * width): row by row.
        height: of the layer.
        width: of the layer.
        neighbours: whether a mask is the 3x3 Gaussian around its place, not 1 at the place itself.

    Returns:
        float32 (R, height, width).
    """
    down, across = _near(places // width, height, neighbours), _near(places % width, width, neighbours)
    return down[:, :, None] * across[:, None, :]


def _near(at: Array, length: int, neighbours: bool) -> Array:
    """How much each of `length` places in a row counts around the places `at`, (R,): float32 (R, length)."""
    xp = array_namespace(at)
    distance = xp.abs(xp.arange(length, device=device(at)) - at[:, None])
    itself = xp.astype(distance == 0, xp.float32)
    return 0.5 * itself + 0.25 * xp.astype(distance == 1, xp.float32) if neighbours else itself


def empty_channels(levels: Sequence[Array]) -> Array:
    """Which channels of a layer's map are zero everywhere: nothing can be taken out of them.

    Args:
        levels: of the layer's output for one image.

    Returns:
        bool (C,), level after level.
    """
    xp = array_namespace(*levels)
    return xp.concat([xp.all(features == 0, axis=(-2, -1))[0] for features in levels])


def without_channels(levels: Sequence[Array], channels: Array) -> list[Array]:
    """Copies of a layer's output for one image, with one channel of the map set to zero in each.

    In a pyramid, a channel is one of the level that it comes from, and the other levels stay as they are.

    Args:
        levels: of the layer's output for one image.
        channels: int64 (R,), counted level after level.

    Returns:
        Levels of R rows.
    """
    xp = array_namespace(channels)
    changed, first = [], 0
    for features in levels:
        own = xp.arange(first, first + features.shape[1], device=device(features))
        out = (own == channels[:, None])[:, :, None, None]
        changed.append(xp.where(out, 0.0, features))
        first += features.shape[1]
    return changed


def places_alone(levels: Sequence[Array], masks: Array) -> list[Array]:
    """Copies of a layer's output for one image, each multiplied by a mask.

    Masks are resized to each level of a pyramid without interpolation, so that every place of a finer level belongs to
    one place of the mask.

    Args:
        levels: of the layer's output for one image.
        masks: (R, h, w), of the map's size.

    Returns:
        Levels of R rows.
    """
    xp = array_namespace(masks)
    changed = []
    for features in levels:
        resized = masks
        for axis in (1, 2):
            length = features.shape[axis + 1]
            resized = xp.take(resized, xp.arange(length, device=device(masks)) * masks.shape[axis] // length, axis=axis)
        changed.append(features * xp.astype(resized, features.dtype)[:, None])
    return changed
