"""How long a batch of a given size is likely to run, learned from the batches that ran."""

_WEIGHT = 0.25
"""Weight of the newest batch in the moving average."""


class BatchTimeEstimate:
    """An exponential moving average of the running time per batch size. Not thread-safe: its owner's lock guards it."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def add(self, batch_size: int, seconds: float) -> None:
        """Learn from a batch that ran."""
        known = self._seconds.get(batch_size)
        self._seconds[batch_size] = seconds if known is None else known + _WEIGHT * (seconds - known)

    def seconds(self, batch_size: int) -> float:
        """Expected running time, in seconds; 0.0 when nothing is known.

        A size never seen is scaled from the nearest one: down from a larger one not at all (small batches use a
        device badly), up from a smaller one in proportion.
        """
        if not self._seconds:
            return 0.0
        known = self._seconds.get(batch_size)
        if known is not None:
            return known
        nearest = min(self._seconds, key=lambda size: abs(size - batch_size))
        return self._seconds[nearest] * max(1.0, batch_size / nearest)

    def images_per_second(self) -> float:
        """The best throughput seen; 0.0 when nothing is known."""
        return max((size / seconds for size, seconds in self._seconds.items() if seconds > 0), default=0.0)
