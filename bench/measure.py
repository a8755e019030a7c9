"""Timing that survives a noisy machine: candidates take turns, and ratios are taken turn by turn."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FairQueue:
    """Seconds per candidate, one entry per turn."""

    seconds: Mapping[str, list[float]]

    def median_ms(self, name: str) -> float:
        """Median time of a candidate, in milliseconds."""
        return statistics.median(self.seconds[name]) * 1e3

    def ratio(self, name: str, baseline: str) -> float:
        """Median over the turns of the candidate's time divided by the baseline's in the same turn."""
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return statistics.median(one / other for one, other in pairs)


def take_turns(candidates: Mapping[str, Callable[[], object]], *, turns: int, warm_up: int = 2) -> FairQueue:
    """Run the candidates A B C A B C ...

    Args:
        candidates: name to function. One that returns a float has timed itself, in seconds.
        turns: how often each runs.
        warm_up: how often each runs before, unmeasured.
    """
    for _ in range(warm_up):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, run in candidates.items():
            started = time.perf_counter()
            own = run()
            seconds[name].append(own if isinstance(own, float) else time.perf_counter() - started)
    return FairQueue(seconds)
