"""From the classes wanted to the scalar to differentiate, and to its derivative by the scores.

Written over the Python array API, so that torch, numpy and graphs share it. Nothing here depends on the data.
"""

from typing import Any

from array_api_compat import array_namespace, device

from heatlens_server.core.methods import RANKED, Score
from heatlens_server.maps.precision import at_least_float32

CONTRASTED = 3
"""How many classes `Score.CONTRAST` compares a class with, as in the `grad-cam` package."""

Array = Any
"""An array of any library that has the array API."""


def resolve(logits: Array, wanted: Array) -> Array:
    """Turn the classes wanted into class ids.

    Equal logits rank by class id, lowest first, on every device and at every batch size.

    Args:
        logits: (N, C) floating point.
        wanted: int64 (N, K), K <= C. An entry is a class id in [0, C), `RANKED` or `ABSENT`. Ids are not checked
            here: that would make the graph depend on the data.

    Returns:
        int64 (N, K) class ids; `ABSENT` where `wanted` is.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    xp = array_namespace(logits, wanted)
    if logits.ndim != 2:
        raise ValueError(f"logits: must be (N, C), not {tuple(logits.shape)}")
    if wanted.ndim != 2 or wanted.dtype != xp.int64 or wanted.shape[0] != logits.shape[0]:
        raise ValueError(f"wanted: must be int64 ({logits.shape[0]}, K), not {wanted.dtype} {tuple(wanted.shape)}")
    count = wanted.shape[1]
    # In a graph it may be any number.
    if isinstance(count, int) and not 1 <= count <= logits.shape[1]:
        raise ValueError(f"wanted: must hold 1 to {logits.shape[1]} classes per image, not {count}")
    if count == 1:
        # The common case: argmax takes the first of equals by contract and costs a fraction of a sort.
        ranked = xp.argmax(logits, axis=1, keepdims=True)
    else:
        # A gather, not a slice: sliced strides make a traced graph doubt that K may be any number.
        positions = xp.broadcast_to(xp.arange(count, device=device(logits)), (logits.shape[0], count))
        ranked = _at(xp.argsort(logits, axis=1, descending=True, stable=True), positions)
    return xp.where(xp.equal(wanted, RANKED), ranked, wanted)


def probabilities(logits: Array, *, sigmoid: bool = False) -> Array:
    """Turn logits into probabilities.

    Args:
        logits: (..., C) floating point.
        sigmoid: whether each class is judged on its own (a multi-label head) instead of one against the others.

    Returns:
        (..., C) in [0, 1], float32 or wider.
    """
    logits = at_least_float32(logits)
    return _sigmoid(logits) if sigmoid else _softmax(logits)


def class_scores(logits: Array, class_ids: Array, kind: Score = Score.LOGIT, *, sigmoid: bool = False) -> Array:
    """The scalar that is explained about each class; `backends.torch.cam.targets.class_scores` tells what it is.

    Args:
        logits: (N, C) floating point.
        class_ids: int64 (N, K), each in [0, C) or `ABSENT`, as `resolve` returns them.
        kind: which scalar.
        sigmoid: whether a class's probability is its sigmoid.

    Returns:
        (N, K), float32 or wider; 0 where the class is absent.
    """
    xp = array_namespace(logits, class_ids)
    logits = at_least_float32(logits)
    chosen = _chosen(logits, class_ids)
    if kind is Score.CONTRAST:
        if logits.shape[1] > 1:
            values = xp.expand_dims(logits, axis=1)
            weights = _softmax(xp.where(_alike(logits, class_ids), values, -xp.inf))
            chosen = chosen - xp.sum(weights * values, axis=2, keepdims=True)
    elif kind is not Score.LOGIT:
        if not sigmoid:
            chosen = chosen + xp.inf if logits.shape[1] == 1 else chosen - _others(logits, class_ids)[0]
        # Of -|x|, which cannot overflow.
        logarithm = xp.where(chosen < 0, chosen, 0.0) - xp.log1p(xp.exp(-xp.abs(chosen)))
        chosen = logarithm if kind is Score.LOG_PROBABILITY else xp.exp(logarithm)
    return _where_present(class_ids, chosen)[:, :, 0]


def seeds(logits: Array, class_ids: Array, kind: Score = Score.LOGIT, *, sigmoid: bool = False) -> Array:
    """The derivative of each class's score by all logits, in closed form: what a backward pass starts with.

    `backends.torch.cam.targets.class_scores` tells what the scores are.

    Args:
        logits: (N, C) floating point.
        class_ids: int64 (N, K), each in [0, C) or `ABSENT`, as `resolve` returns them.
        kind: which scalar.
        sigmoid: whether a class's probability is its sigmoid.

    Returns:
        (N, K, C), float32 or wider: d class_scores[n, k] / d logits[n, c]; 0 where the class is absent.
    """
    xp = array_namespace(logits, class_ids)
    logits = at_least_float32(logits)
    values = xp.expand_dims(logits, axis=1)
    hot = _hot(logits, class_ids)
    # Every seed is this, but for absent classes: an absent one is nowhere hot.
    seed = xp.astype(hot, logits.dtype)
    if kind is Score.LOGIT:
        return seed
    if kind is Score.CONTRAST:
        if logits.shape[1] == 1:
            return seed
        weights = _softmax(xp.where(_alike(logits, class_ids), values, -xp.inf))
        mean = xp.sum(weights * values, axis=2, keepdims=True)
        return _where_present(class_ids, seed - weights * (1.0 + values - mean))
    chosen = _chosen(logits, class_ids)
    if sigmoid:
        slope = _sigmoid(-chosen)
    elif logits.shape[1] == 1:
        slope = chosen * 0.0
    else:
        rivals, shares = _others(logits, class_ids)
        chosen = chosen - rivals
        seed = seed - shares
        slope = _sigmoid(-chosen)
    if kind is Score.PROBABILITY:
        slope = slope * _sigmoid(chosen)
    return _where_present(class_ids, seed * slope)


def _hot(logits: Array, class_ids: Array) -> Array:
    """Where each wanted class is: bool (N, K, C); nowhere if it is absent."""
    xp = array_namespace(logits, class_ids)
    return xp.equal(xp.expand_dims(class_ids, axis=2), xp.arange(logits.shape[1], device=device(logits)))


def _chosen(logits: Array, class_ids: Array) -> Array:
    """The logits of the wanted classes, (N, K, 1)."""
    xp = array_namespace(logits, class_ids)
    placed = xp.where(class_ids < 0, 0, class_ids)
    return xp.expand_dims(_at(logits, placed), axis=2)


def _at(values: Array, places: Array) -> Array:
    """Entries (N, K) of values (N, C)."""
    # Of torch, take_along_axis broadcasts: while it is traced it asks for N, and the graph is right for no other.
    if hasattr(values, "gather"):
        return values.gather(1, places)
    return array_namespace(values, places).take_along_axis(values, places, axis=1)


def _others(logits: Array, class_ids: Array) -> tuple[Array, Array]:
    """The logits of all other classes together, (N, K, 1), and the share of each in them, (N, K, C).

    A class's probability is the sigmoid of how far its logit is ahead of these.
    """
    xp = array_namespace(logits, class_ids)
    others = xp.where(_hot(logits, class_ids), -xp.inf, xp.expand_dims(logits, axis=1))
    top = xp.max(others, axis=2, keepdims=True)
    rest = xp.exp(others - top)
    total = xp.sum(rest, axis=2, keepdims=True)
    return xp.log(total) + top, rest / total


def _where_present(class_ids: Array, seed: Array) -> Array:
    xp = array_namespace(class_ids, seed)
    return xp.where(xp.expand_dims(class_ids, axis=2) < 0, 0.0, seed)


def _alike(logits: Array, class_ids: Array) -> Array:
    """Where the classes are that a class is compared with: bool (N, K, C)."""
    xp = array_namespace(logits, class_ids)
    hot = _hot(logits, class_ids)
    likeness = xp.where(hot, -xp.inf, -xp.abs(xp.expand_dims(logits, axis=1) - _chosen(logits, class_ids)))
    places = xp.arange(logits.shape[1], device=device(logits))
    alike = None
    # One after the other: argmax takes the first of equals by contract, which sorting does not in every library.
    for _ in range(min(CONTRASTED, logits.shape[1] - 1)):
        left = likeness if alike is None else xp.where(alike, -xp.inf, likeness)
        nearest = xp.equal(places, xp.argmax(left, axis=2, keepdims=True))
        alike = nearest if alike is None else xp.logical_or(alike, nearest)
    return alike


def _softmax(values: Array) -> Array:
    """Over the last axis."""
    xp = array_namespace(values)
    exponentials = xp.exp(values - xp.max(values, axis=-1, keepdims=True))
    return exponentials / xp.sum(exponentials, axis=-1, keepdims=True)


def _sigmoid(values: Array) -> Array:
    """Of -|x|, which cannot overflow."""
    xp = array_namespace(values)
    small = xp.exp(-xp.abs(values))
    return xp.where(values < 0, small, 1.0) / (1.0 + small)
