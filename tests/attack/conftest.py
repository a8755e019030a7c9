"""Attacks on real servers. `make test` runs their short form; `make attack` sets ATTACK_FULL and takes minutes."""

import os
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")


@pytest.fixture(scope="session")
def sized() -> Callable[[T, T], T]:
    """`sized(short, full)` is what this run attacks with."""
    full = bool(os.environ.get("ATTACK_FULL"))
    return lambda short, whole: whole if full else short
