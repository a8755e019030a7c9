"""How much of an explanation runs in one go, by the time that runs of the model took: others wait for no longer.

What is unknown counts as slow: the first explanation of a kind goes by one goal, or with as many rows as the model's
batches allow, and teaches how long that takes.
"""

import dataclasses
import threading
from collections import OrderedDict

from heatlens_server.core.engine import MapSpec

STEP_S = 0.05
"""How long a step is to last while others wait, in seconds. One run of the model may take longer, and is a step."""

ALONE_S = 0.5
"""How long while nobody does."""

_KNOWN_SPECS = 256
_NEWEST_WEIGHT = 0.25


class Pace:
    """What runs of one model take. Thread-safe."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._lock = threading.Lock()
        # Seconds of a run, by row and pixel. Which specs there are is up to callers: the last ones are kept.
        self._runs: OrderedDict[MapSpec, float] = OrderedDict()
        self._batches: float | None = None

    def learn_batch(self, size: int, pixel_count: int, seconds: float) -> None:
        """A batch of so many images, of so many pixels each, took so long."""
        with self._lock:
            self._batches = _average(self._batches, seconds / (size * pixel_count))

    def learn_run(self, spec: MapSpec, rows: int, pixel_count: int, seconds: float) -> None:
        """One run of an explanation in steps took so long, with so many rows; by goal it is one row."""
        with self._lock:
            taken = seconds / (pixel_count if spec.by_goal else rows * pixel_count)
            self._runs[spec] = _average(self._runs.get(spec), taken)
            self._runs.move_to_end(spec)
            if len(self._runs) > _KNOWN_SPECS:
                self._runs.popitem(last=False)

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

    def rows(self, spec: MapSpec, pixel_count: int, most: int) -> int:
        """How many rows a step runs the model on, so that it takes `STEP_S`: 1 to `most`."""
        with self._lock:
            known = self._runs.get(spec, self._batches)
        if known is None:
            return 1
        return max(1, min(most, int(STEP_S / max(known * pixel_count, STEP_S / most))))

    def most_s(self, *, others_wait: bool) -> float:
        """How long a step may last, in seconds."""
        return STEP_S if others_wait else ALONE_S


def _average(known: float | None, newest: float) -> float:
    return newest if known is None else known + _NEWEST_WEIGHT * (newest - known)
