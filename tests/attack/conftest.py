"""Attacks on real servers. `make test` runs their short form; `make attack` sets ATTACK_FULL and takes minutes."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from raw_http2 import RawConnection

T = TypeVar("T")


@pytest.fixture(scope="session")
def sized() -> Callable[[T, T], T]:
    """`sized(short, full)` is what this run attacks with."""
    full = bool(os.environ.get("ATTACK_FULL"))
    return lambda short, whole: whole if full else short


@pytest.fixture
def connect() -> Iterator[Callable[..., RawConnection]]:
    """Make peers that speak HTTP/2 by hand: `connect(address)`. They hang up when the test is over."""
    peers: list[RawConnection] = []

    def make(address: str, **options: object) -> RawConnection:
        peers.append(RawConnection(address, **options))
        return peers[-1]

    yield make
    for peer in peers:
        peer.close()
