"""A model as transports see it: whether it is ready, and what answers then."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import cast

from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.errors import ModelInterrupted
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.scheduling.model_queue import ModelQueue


def batch_size_of(config: ModelConfig, info: Capabilities) -> int:
    """How many images of a model run at once, at most."""
    return 1 if info.runs_one_by_one else config.batching.max_batch_size


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A ready model.

    Attributes:
        name: shared by its versions.
        version: of the weights.
        labels: one per class; empty if unknown.
        preprocess: from source image to input pixels.
        capabilities: what the engine can do.
        default_method: for requests that name none; one of `capabilities.requestable_methods`.
        max_batch_size: most images run at once.
        max_delay_s: the batching window, in seconds.
        queue: the way to the device.
        assumptions: what was found or assumed when it was loaded, one sentence each, with the key that overrides it.
        generation: counts the models that have served under this name, from 1 on.
        hang_after_s: see `config.ModelConfig`.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    preprocess: PreprocessSpec
    capabilities: Capabilities
    default_method: Method
    max_batch_size: int
    max_delay_s: float
    queue: ModelQueue
    assumptions: tuple[str, ...] = ()
    generation: int = 1
    hang_after_s: float = 120.0

    @property
    def class_count(self) -> int:
        """How many classes there are; of an embedding model, the embedding's length. 0 if nothing tells."""
        return self.capabilities.class_count or len(self.labels)

    def weights_bytes(self) -> dict[str, int]:
        """What its weights take now, in bytes, by device: a second engine may have been loaded since it was."""
        found: dict[str, int] = {}
        for info in (engine.info for engine in self.queue.engines):
            # Engines on one device share them.
            found[info.device] = max(found.get(info.device, 0), info.weights_bytes)
        return found

    def label(self, class_id: int) -> str:
        """The class's name; empty if the model has none for it. A detector may find labels that its file lacks."""
        return self.labels[class_id] if 0 <= class_id < len(self.labels) else ""


class ModelState(Enum):
    """Whether a model can answer."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    """It was ready, and cannot answer for now."""
    IDLE = "idle"
    """It was ready, and was unloaded; the next request loads it again."""


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model of a fleet, at one moment.

    Attributes:
        config: what it is, or is to be, made from.
        state: whether it can answer.
        served: what answers; None unless READY or UNAVAILABLE.
        message: why it is FAILED or UNAVAILABLE, or could not be loaded again, for clients; empty otherwise.
        outage: what callers are told while it is UNAVAILABLE; None otherwise.
        next_engine: what takes over once the export that is being made is verified; empty if nothing does.
        known: what served before it was IDLE, without its queue; None otherwise.
        known_bytes: what its weights took then, by device.
    """

    config: ModelConfig
    state: ModelState = ModelState.LOADING
    served: ServedModel | None = None
    message: str = ""
    outage: ModelInterrupted | None = None
    next_engine: str = ""
    known: ServedModel | None = None
    known_bytes: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def about(self) -> ServedModel | None:
        """What is known about the model, whose queue is there if it is `served`; None if it never served."""
        return self.served or self.known

    @property
    def name(self) -> str:
        """The model's name."""
        return self.config.name

    @property
    def version(self) -> str:
        """Its version; empty as long as nothing tells."""
        return self.config.version if self.about is None else self.about.version

    def at_rest(self) -> "ModelStatus":
        """What a model that serves is once it is IDLE: nothing of its engines is held."""
        assert self.served is not None
        known = replace(self.served, queue=cast("ModelQueue", None))
        return ModelStatus(self.config, ModelState.IDLE, known=known, known_bytes=self.served.weights_bytes())

    @property
    def key(self) -> str:
        """What tells it from other models and other versions."""
        return self.config.key

    @property
    def can_answer(self) -> bool:
        """Whether a request that may go to another version may go to this one."""
        return self.state in {ModelState.READY, ModelState.IDLE}
