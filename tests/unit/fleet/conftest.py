"""A fleet of engines behind gates, for the tests of what changes it."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest_asyncio

from fleets import PATIENCE_S, Rig


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    with ThreadPoolExecutor(4) as decoders:
        made = Rig(decoders)
        yield made
        for gate in [*made.gates.values(), *(engine.gate for engine in made.engines)]:
            gate.set()
        await made.fleet.close(timeout_s=PATIENCE_S)
