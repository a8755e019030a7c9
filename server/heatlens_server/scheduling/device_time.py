"""What a device runs, since when, and how long such things take, learned from those that ran."""

import math

from heatlens_server.scheduling.estimate import BatchTimeEstimate

_UNKNOWN_S = 1.0


class DeviceTime:
    """Keeps the time of one device. Not thread-safe: its owner's lock guards it. Times are on the owner's clock."""

    def __init__(self) -> None:
        """Nothing runs and nothing is known."""
        self._since: float | None = None
        self._size = 0
        self._step = False
        self.batches = BatchTimeEstimate()
        # Apart: a step runs the model on as many rows as it likes.
        self.steps = BatchTimeEstimate()
        self._explanation_s = BatchTimeEstimate()

    @property
    def runs(self) -> bool:
        """Whether the device runs something."""
        return self._since is not None

    @property
    def runs_step(self) -> bool:
        """Whether that is a step."""
        return self.runs and self._step

    def start(self, now: float, size: int, *, step: bool) -> None:
        """The device begins to run a batch of a size, or a step."""
        self._since, self._size, self._step = now, size, step

    def finish(self, now: float) -> float:
        """The device is free; how long it ran, in seconds, is learned and returned. 0.0 if nothing ran."""
        if self._since is None:
            return 0.0
        seconds = now - self._since
        self._estimate.add(self._size, seconds)
        self._since = None
        return seconds

    def step_s(self, now: float) -> float:
        """How long the step that runs has run, in seconds; 0.0 if none does."""
        return now - self._since if self._since is not None and self._step else 0.0

    def ends_at(self) -> float:
        """When what runs is expected to end; -infinity if nothing runs."""
        return -math.inf if self._since is None else self._since + self._estimate.seconds(self._size)

    def learn_explanation(self, seconds: float) -> None:
        """An explanation in steps took so long on the device, all in all."""
        self._explanation_s.add(1, seconds)

    def place_s(self, batch_size: int, *, batched: bool, in_steps: bool) -> float:
        """How long until one of those that wait makes room, roughly, in seconds.

        Args:
            batch_size: of a full batch.
            batched: whether some of them wait for a batch: then the next one makes room.
            in_steps: whether some of them are explained in steps. A batch then waits for a step as well; if no batch is
                to come, the first explanation to end makes room. Several that take turns end later, but as many do.
        """
        if in_steps and not batched:
            return self._explanation_s.seconds(1) or _UNKNOWN_S
        rate = self.batches.images_per_second()
        batch_s = batch_size / rate if rate else _UNKNOWN_S
        return batch_s + (self.steps.seconds(1) if in_steps else 0.0)

    @property
    def _estimate(self) -> BatchTimeEstimate:
        return self.steps if self._step else self.batches
