"""What a server tells about its models and itself, beside the models' `fleet.ModelStatus`, whatever the transport."""

import functools
from dataclasses import dataclass
from importlib.metadata import version

from heatlens_server.api.checks import Limits
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.methods import Method
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.served_model import ModelState, ModelStatus
from heatlens_server.fleet.versions import default_of


@dataclass(frozen=True, slots=True)
class MethodSupport:
    """How a model explains by one method.

    Attributes:
        method: a method that requests may name.
        engine: the name of the engine that runs it.
        in_steps: whether it takes many runs of the model per image.
    """

    method: Method
    engine: str
    in_steps: bool


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server and the limits in force.

    Attributes:
        version: of heatlens.
        limits: what requests are checked against.
        max_batch_size: the largest of any model.
        max_delay_s: the longest batching window of any model, in seconds.
    """

    version: str
    limits: Limits
    max_batch_size: int
    max_delay_s: float


def supported_methods(capabilities: Capabilities) -> tuple[MethodSupport, ...]:
    """The methods that requests may name, in the order of `Method`."""
    return tuple(_support(method, capabilities) for method in capabilities.requestable_methods)


def server_info(fleet: Fleet, limits: Limits) -> ServerInfo:
    """What the server is at this moment: its models come and go."""
    return ServerInfo(heatlens_version(), limits, fleet.max_batch_size, fleet.max_delay_s)


def model_states(fleet: Fleet) -> dict[str, ModelStatus]:
    """The status of each model: a version that is loaded beside one that answers keeps nobody waiting."""
    names = dict.fromkeys(status.name for status in fleet)
    return {name: default_of([one for one in fleet if one.name == name]) for name in names}


def is_ready(fleet: Fleet) -> bool:
    """Whether no model is loading, and at least one can answer."""
    states = model_states(fleet).values()
    is_loading = any(status.state is ModelState.LOADING for status in states)
    return not is_loading and any(status.can_answer for status in states)


def known_name(fleet: Fleet, name: str) -> str:
    """The name of the model that a caller's name stands for; empty if there is none."""
    wanted = name or fleet.default
    return wanted if any(status.name == wanted for status in fleet) else ""


@functools.cache
def heatlens_version() -> str:
    """The version of the installed package."""
    return version("heatlens")


def _support(method: Method, capabilities: Capabilities) -> MethodSupport:
    preset = method.as_preset
    is_fallback = preset.method in capabilities.fallback_methods or preset.score in capabilities.fallback_scores
    return MethodSupport(method, "torch" if is_fallback else capabilities.engine_name, preset.method.traits.in_steps)
