"""Which version of a model a request gets. Pure functions of the models' states at one moment."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from heatlens_server.core.errors import ModelChangeRefused, ModelNotFound, VersionNotFound
from heatlens_server.fleet.served_model import ModelStatus

Point = Callable[[], float]
"""Where a request lies in [0, 1), as `point_of` says it; called only if that decides something."""


def at_the_start() -> float:
    """A point for requests that are all alike."""
    return 0.0


def point_of(*parts: bytes) -> float:
    """A number in [0, 1): equal parts have equal ones, and others are spread evenly."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    # 53 bits: more would round up to 1.
    return (int.from_bytes(digest.digest()) >> 11) / 2**53


def choose(statuses: Iterable[ModelStatus], name: str, version: str, point: Point) -> ModelStatus:
    """The version that answers a request.

    A request that names a version gets it, whatever its state. Others get a version by its weight, if that can answer,
    or the default one.

    Raises:
        ModelNotFound, VersionNotFound: there is none.
    """
    versions = _named(statuses, name)
    if version:
        return _of_version(versions, version)
    fixed = _configured_default(versions)
    canaries = [one for one in versions if one is not fixed and one.config.weight]
    if canaries:
        at, up_to = point(), 0.0
        for one in canaries:
            up_to += one.config.weight
            if at < up_to:
                return one if one.can_answer else default_of(versions)
    return default_of(versions)


def find(statuses: Iterable[ModelStatus], name: str, version: str) -> ModelStatus:
    """The version that an administrator means; an empty one is the only one.

    Raises:
        ModelNotFound, VersionNotFound: there is none.
        ModelChangeRefused: there are several.
    """
    versions = _named(statuses, name)
    if version:
        return _of_version(versions, version)
    if len(versions) > 1:
        refuse_several(name, [one.version for one in versions])
    return versions[0]


def default_of(versions: Sequence[ModelStatus]) -> ModelStatus:
    """The version that answers for the others: the default, or if it cannot, the first that can."""
    fixed = _configured_default(versions)
    return fixed if fixed.can_answer else next((one for one in versions if one.can_answer), fixed)


def is_default(status: ModelStatus, statuses: Iterable[ModelStatus]) -> bool:
    """Whether a model is the version that answers for the others of its name."""
    return default_of([one for one in statuses if one.name == status.name]) is status


def refuse_several(name: str, versions: Sequence[str]) -> NoReturn:
    """Raise ModelChangeRefused, as it is not said which of several versions is meant."""
    message = f"there are several versions of the model {name!r}, {', '.join(versions)}: say which"
    raise ModelChangeRefused(message, metadata={"model": name})


def _named(statuses: Iterable[ModelStatus], name: str) -> list[ModelStatus]:
    statuses = list(statuses)
    versions = [one for one in statuses if one.name == name]
    if not versions:
        raise ModelNotFound(name, [one.name for one in statuses])
    return versions


def _of_version(versions: Sequence[ModelStatus], version: str) -> ModelStatus:
    found = next((one for one in versions if one.version == version), None)
    if found is None:
        raise VersionNotFound(versions[0].name, version, [one.version for one in versions])
    return found


def _configured_default(versions: Sequence[ModelStatus]) -> ModelStatus:
    return next((one for one in versions if one.config.default), versions[0])
