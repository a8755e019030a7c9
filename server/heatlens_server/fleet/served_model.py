"""A model that is ready to answer, as transports see it."""

from dataclasses import dataclass

from heatlens_server.core.engine import Capabilities
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.scheduling.model_queue import ModelQueue


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A ready model.

    Attributes:
        name: unique name.
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

    @property
    def class_count(self) -> int:
        """How many classes there are; of an embedding model, the embedding's length. 0 if nothing tells."""
        return self.capabilities.class_count or len(self.labels)

    def label(self, class_id: int) -> str:
        """The class's name; empty if the model has none for it. A detector may find labels that its file lacks."""
        return self.labels[class_id] if 0 <= class_id < len(self.labels) else ""
