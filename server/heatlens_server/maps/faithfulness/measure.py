"""All measures of one map, in steps: each runs the model on some changed images."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from array_api_compat import array_namespace

from heatlens_server.core.methods import Metric
from heatlens_server.maps.concrete import Array
from heatlens_server.maps.faithfulness.map_statistics import gini, rank_correlation
from heatlens_server.maps.faithfulness.perturbation import (
    PERCENTILES,
    STEPS,
    area,
    deleted,
    imputed,
    inserted,
    mean_change,
)

SANITY_CHECKS = (Metric.MODEL_RANDOMISATION, Metric.CLASS_SENSITIVITY)
"""The measures that compare with another map: of the model with new weights, of the least probable class."""

_IMPUTED_AT_ONCE = 3

_MORF_BASED = frozenset({Metric.ROAD_MORF, Metric.ROAD_COMBINED})
_LERF_BASED = frozenset({Metric.ROAD_LERF, Metric.ROAD_COMBINED})
_CONFIDENCE_BASED = frozenset({Metric.AVERAGE_DROP, Metric.INCREASE})
_NEED_ORIGINAL = frozenset({Metric.DELETION, Metric.INSERTION}) | _MORF_BASED | _LERF_BASED | _CONFIDENCE_BASED


def measure(
    metrics: Sequence[Metric],
    *,
    saliency: Array,
    image: Array,
    probability: Callable[[Array], Array],
    rows: int,
    others: Mapping[Metric, Array] | None = None,
) -> Generator[None, None, dict[Metric, float]]:
    """Measure how faithful a map is. Definitions and ranges: docs/faithfulness.md.

    Yields after each run of the model, and between imputations, which take longer than that on a CPU; returns the
    measures when driven to the end. Keeps no thread-local state between steps.

    Args:
        metrics: what to measure; nothing runs for those that need no run.
        saliency: (H, W) in [0, 1], the map at the size of the model's input.
        image: (C, H, W), what the model saw: normalised, on its device, in its dtype.
        probability: the explained class's probability, (R,) in [0, 1], of R images (R, C, H, W) like `image`.
        rows: the most images of a call, >= 1.
        others: for SANITY_CHECKS among the metrics, the map to compare with; as large as `saliency`.

    Returns:
        The measures, in the order asked for.

    Raises:
        ValueError: the map is not as large as the image, a map to compare with is missing or of another size, or rows
            is not positive.
    """
    others = {} if others is None else others
    if saliency.shape != image.shape[-2:]:
        raise ValueError(f"saliency: must be {tuple(image.shape[-2:])}, not {tuple(saliency.shape)}")
    if rows < 1:
        raise ValueError(f"rows: must be positive, not {rows}")
    for metric in SANITY_CHECKS:
        if metric in metrics and metric not in others:
            raise ValueError(f"others: must hold a map for {metric}")
    xp = array_namespace(image)
    probes = _probes(frozenset(metrics), saliency, image)
    found: list[float] = []
    for parts in _chunks(list(probes.values()), rows):
        images: list[Array] = []
        for part in parts:
            if part.is_slow and images:
                yield
            images.append(xp.astype(part.images(), image.dtype))
        found += probability(xp.concat(images)).tolist()
        yield
    answers: dict[str, list[float]] = {}
    for name, probe in probes.items():
        answers[name], found = found[: probe.count], found[probe.count :]
    return {metric: _value(metric, answers, saliency, others) for metric in metrics}


def runs_to_measure(metrics: Sequence[Metric]) -> int:
    """How many changed images measuring one map asks the model about."""
    nothing = np.empty((0, 0))
    return sum(probe.count for probe in _probes(frozenset(metrics), nothing, nothing).values())


@dataclass(frozen=True, slots=True)
class _Probe:
    """Changed images to ask the model about.

    Attributes:
        count: how many.
        images: makes those of [start, stop): (stop - start, C, H, W).
        at_once: the most to make in one step; None for any number.
    """

    count: int
    images: Callable[[int, int], Array]
    at_once: int | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Some images of a probe, not made yet.

    Attributes:
        images: makes them.
        is_slow: whether making them is a step of its own.
    """

    images: Callable[[], Array]
    is_slow: bool


def _probes(metrics: frozenset[Metric], saliency: Array, image: Array) -> dict[str, _Probe]:
    """What to ask for these metrics, by name; what several of them need is asked once."""
    probes: dict[str, _Probe] = {}
    if metrics & _NEED_ORIGINAL:
        probes["original"] = _Probe(1, lambda _start, _stop: image[None])
    if Metric.DELETION in metrics:
        # Nothing deleted is the original.
        probes["deleted"] = _Probe(STEPS, lambda start, stop: deleted(image, saliency, start + 1, stop + 1))
    if Metric.INSERTION in metrics:
        # Everything inserted is, too.
        probes["inserted"] = _Probe(STEPS, lambda start, stop: inserted(image, saliency, start, stop))
    if metrics & _CONFIDENCE_BASED:
        probes["salient"] = _Probe(1, lambda _start, _stop: (image * saliency)[None])
    for name, based, most_first in (("morf", _MORF_BASED, True), ("lerf", _LERF_BASED, False)):
        if metrics & based:
            impute = partial(imputed, image, saliency, most_first=most_first)
            probes[name] = _Probe(len(PERCENTILES), impute, at_once=_IMPUTED_AT_ONCE)
    return probes


def _chunks(probes: Sequence[_Probe], rows: int) -> Iterator[list[_Part]]:
    """Parts of probes that come to at most `rows` images, and to as many wherever there are; in order."""
    parts: list[_Part] = []
    room = rows
    for probe in probes:
        start = 0
        while start < probe.count:
            stop = min(probe.count, start + room, start + (probe.at_once or room))
            parts.append(_Part(partial(probe.images, start, stop), is_slow=probe.at_once is not None))
            room -= stop - start
            start = stop
            if room == 0:
                yield parts
                parts, room = [], rows
    if parts:
        yield parts


def _value(
    metric: Metric, answers: Mapping[str, list[float]], saliency: Array, others: Mapping[Metric, Array]
) -> float:
    """One metric, from the probabilities of what was asked."""
    if metric is Metric.SPARSENESS:
        return gini(saliency)
    if metric in SANITY_CHECKS:
        return rank_correlation(saliency, others[metric])
    return _FROM_ANSWERS[metric](answers["original"][0], answers)


def _relative_drop(original: float, salient: float) -> float:
    return max(0.0, original - salient) / original if original > 0 else 0.0


_FROM_ANSWERS: Mapping[Metric, Callable[[float, Mapping[str, list[float]]], float]] = {
    Metric.DELETION: lambda original, answers: area([original, *answers["deleted"]]),
    Metric.INSERTION: lambda original, answers: area([*answers["inserted"], original]),
    Metric.ROAD_MORF: lambda original, answers: mean_change(answers["morf"], original),
    Metric.ROAD_LERF: lambda original, answers: mean_change(answers["lerf"], original),
    Metric.ROAD_COMBINED: lambda original, answers: (
        (mean_change(answers["lerf"], original) - mean_change(answers["morf"], original)) / 2
    ),
    Metric.AVERAGE_DROP: lambda original, answers: _relative_drop(original, answers["salient"][0]),
    Metric.INCREASE: lambda original, answers: float(answers["salient"][0] > original),
}
