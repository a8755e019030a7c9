"""The models by name and the state each is in. Knows nothing about what a model is."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from heatlens_server.core.errors import ModelFailed, ModelLoading, ModelNotFound

T = TypeVar("T")

_RETRY_S = 1.0
_SHOWN_CHARACTERS = 80
"""How much of a caller's text an error repeats."""


class ModelState(Enum):
    """Whether a model can answer."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Slot(Generic[T]):
    """One model.

    Attributes:
        name: unique.
        state: whether it can answer.
        value: what serves it; None unless READY.
        message: why it is not ready; empty when it is.
    """

    name: str
    state: ModelState = ModelState.LOADING
    value: T | None = None
    message: str = ""


class Registry(Generic[T]):
    """The models of a server, in the order of the configuration. Belongs to the event loop."""

    def __init__(self, names: Sequence[str], *, default: str) -> None:
        """Make a registry in which every model is LOADING.

        Args:
            names: unique names.
            default: the name that an empty name stands for; one of `names`.
        """
        self._slots: dict[str, Slot[T]] = {name: Slot(name) for name in names}
        self.default = default

    @property
    def slots(self) -> tuple[Slot[T], ...]:
        """All models, in order."""
        return tuple(self._slots.values())

    def set_ready(self, name: str, value: T) -> None:
        """The model can answer from now on."""
        self._slots[name] = Slot(name, ModelState.READY, value)

    def set_failed(self, name: str, message: str) -> None:
        """The model could not be loaded. The message is shown to clients."""
        self._slots[name] = Slot(name, ModelState.FAILED, message=message)

    def get(self, name: str) -> T:
        """The ready model of that name; the default one for an empty name.

        Raises:
            ModelNotFound: there is none.
            ModelLoading: not yet.
            ModelFailed: it could not be loaded.
        """
        slot = self._slots.get(name or self.default)
        if slot is None:
            raise ModelNotFound(name[:_SHOWN_CHARACTERS], list(self._slots))
        if slot.value is not None:
            return slot.value
        if slot.state is ModelState.FAILED:
            raise ModelFailed(slot.name, slot.message)
        raise ModelLoading(f"model {slot.name!r} is loading", metadata={"model": slot.name}, retry_after_s=_RETRY_S)
