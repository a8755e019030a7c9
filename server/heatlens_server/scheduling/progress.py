"""How far an entry is that is explained in steps."""

from collections.abc import Callable
from dataclasses import dataclass

from heatlens_server.core.engine import Steps


@dataclass(slots=True, eq=False)
class Progress:
    """What is kept of an entry between two of its steps. Belongs to the device thread, `discard` aside.

    Attributes:
        rows: the most rows that a step runs the model on.
        queue_s: seconds from decoded to the first step.
        discard: has this closed on the device thread, as nobody wants it any more; any thread may call it, and it
            returns at once.
        steps: the engine's; None before the first one, and to start anew.
        compute_s: seconds that the steps took so far.
    """

    rows: int
    queue_s: float
    discard: Callable[["Progress"], None]
    steps: Steps | None = None
    compute_s: float = 0.0
