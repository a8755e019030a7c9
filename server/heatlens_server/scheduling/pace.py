"""How much of an explanation runs in one go, by the time that runs of the model took: others wait for no longer.

What is unknown counts as slow: the first explanation of a kind goes by one goal, or with as many rows as the model's
batches allow, and teaches how long that takes.
"""

import dataclasses
import threading
from collections import OrderedDict
from typing import TypeVar

from heatlens_server.core.engine import MapSpec

STEP_S = 0.05
"""How long a step is to last while others wait, in seconds. One run of the model may take longer, and is a step."""

ALONE_S = 0.5
"""How long while nobody does."""

_USUAL = 2
K = TypeVar("K")
_KNOWN_SPECS = 256
_NEWEST_WEIGHT = 0.25


class Pace:
    """What runs of one model take. Thread-safe."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._lock = threading.Lock()
        # Seconds of a run, by row and pixel; of a goal, where images share batches.
        # Which specs there are is up to callers: the last ones are kept.
        self._runs: OrderedDict[MapSpec, float] = OrderedDict()
        self._batches: float | None = None
        # Seconds of an image in a batch, by pixel and the batch's size, where it has one goal by one layer.
        self._plain: OrderedDict[tuple[MapSpec, int], float] = OrderedDict()
        self._slow: dict[MapSpec, float] = {}

    def learn_batch(self, spec: MapSpec, size: int, pixel_count: int, seconds: float, *, count: int = 1) -> None:
        """A batch of so many images, of so many pixels and at most `count` goals each, took so long."""
        parts = spec.parts(count)
        with self._lock:
            self._batches = _average(self._batches, seconds / (size * pixel_count))
            taken = seconds / (size * parts * pixel_count)
            if parts > 1:
                _learn(self._runs, spec, taken)
            else:
                self._learn_plain(spec, size, taken)

    def learn_run(self, spec: MapSpec, rows: int, pixel_count: int, seconds: float) -> None:
        """One run of an explanation in steps took so long, with so many rows; by goal it is one row."""
        with self._lock:
            _learn(self._runs, spec, seconds / (pixel_count if spec.by_goal else rows * pixel_count))

    def divided(self, spec: MapSpec, pixel_count: int, count: int) -> MapSpec:
        """The spec by which an image is explained: goal by goal if all goals in one go would take too long.

        Args:
            spec: what was asked for.
            pixel_count: height times width.
            count: the most goals that it has.
        """
        parts = spec.parts(count)
        if parts == 1 or spec.in_steps:
            return spec
        by_goal = dataclasses.replace(spec, by_goal=True)
        with self._lock:
            known = self._runs.get(by_goal)
        return by_goal if known is None or parts * pixel_count * known > STEP_S else spec

    def most_images(self, spec: MapSpec, pixel_count: int, count: int, most: int) -> int:
        """How many images with so many goals share a batch, so that others do not wait for long.

        Of several goals or layers: as many as have all their goals explained in the time of a step. Of one: `most`, or
        as many as a step has time for if they take over twice as long as by the model's fastest method and layer.

        Returns:
            `most`, or a power of two below it: entries that differ in it share no batch.
        """
        parts = spec.parts(count)
        if spec.in_steps:
            return most
        with self._lock:
            if parts == 1:
                taken = self._slow.get(spec, 0.0)
            else:
                # A device that runs goals of many images at once, as a GPU, takes less for each than for one alone.
                known = [self._runs.get(one) for one in (spec, dataclasses.replace(spec, by_goal=True))]
                taken = min((one for one in known if one is not None), default=0.0) * parts
        fit = int(STEP_S / max(taken * pixel_count, STEP_S / most))
        return most if fit >= most else 1 << max(0, fit.bit_length() - 1)

    def rows(self, spec: MapSpec, pixel_count: int, most: int) -> int:
        """How many rows a step runs the model on, so that it takes `STEP_S`: 1 to `most`."""
        with self._lock:
            known = self._runs.get(spec, self._batches)
        if known is None:
            return 1
        return max(1, min(most, int(STEP_S / max(known * pixel_count, STEP_S / most))))

    def _learn_plain(self, spec: MapSpec, size: int, taken: float) -> None:
        """Find out whether images take far longer than others in batches as large, or smaller, which are slower."""
        key = spec, size.bit_length()
        _learn(self._plain, key, taken)
        fastest = min(known for (_, other), known in self._plain.items() if other <= key[1])
        self._slow.pop(spec, None)
        if self._plain[key] > _USUAL * fastest:
            self._slow[spec] = self._plain[key]
            if len(self._slow) > _KNOWN_SPECS:
                del self._slow[next(iter(self._slow))]

    def most_s(self, *, others_wait: bool) -> float:
        """How long a step may last, in seconds."""
        return STEP_S if others_wait else ALONE_S


def _learn(known: OrderedDict[K, float], key: K, taken: float) -> None:
    known[key] = _average(known.get(key), taken)
    known.move_to_end(key)
    if len(known) > _KNOWN_SPECS:
        known.popitem(last=False)


def _average(known: float | None, newest: float) -> float:
    return newest if known is None else known + _NEWEST_WEIGHT * (newest - known)
