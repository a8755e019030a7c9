"""What a server answers beyond its capacity: `python -m bench.overload`.

Calls come at random times, at a rate that is set, whether or not earlier ones are answered (an open loop), and are made
once. The server runs in a process of its own, on the same cores as the client.
"""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated

import grpc
import grpc.aio
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import served
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc

RATES = (0.5, 0.8, 1.2, 3.0)
"""Of capacity."""

MIN_GOODPUT = 0.85
"""Beyond capacity, of it."""

MAX_REFUSAL_MS = 10.0

_CONNECTIONS = 4
_OPTIONS = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]


@dataclass(slots=True)
class Outcomes:
    """How calls ended, by status, and how long they took, in milliseconds."""

    took_ms: dict[str, list[float]] = field(default_factory=dict)

    def add(self, status: str, took_s: float) -> None:
        """Count a call."""
        self.took_ms.setdefault(status, []).append(1e3 * took_s)

    def count(self, status: str) -> int:
        """How many ended so."""
        return len(self.took_ms.get(status, ()))

    def p99_ms(self, status: str) -> float:
        """The 99th percentile of those; nan if there are none."""
        took = self.took_ms.get(status)
        return float(np.percentile(took, 99)) if took else float("nan")


class Callers:
    """Some connections to a server, used in turn."""

    def __init__(self, address: str) -> None:
        """Connect when the first call is made."""
        self._channels = [grpc.aio.insecure_channel(address, options=_OPTIONS) for _ in range(_CONNECTIONS)]
        self._stubs = [explain_pb2_grpc.ExplainServiceStub(channel) for channel in self._channels]

    async def call(self, number: int, request: pb.ExplainRequest, outcomes: Outcomes) -> None:
        """Make one call and count how it ended."""
        started = time.perf_counter()
        try:
            await self._stubs[number % _CONNECTIONS].Explain(request, timeout=60)
            status = "OK"
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        outcomes.add(status, time.perf_counter() - started)

    async def close(self) -> None:
        """Hang up."""
        for channel in self._channels:
            await channel.close()


async def capacity(callers: Callers, request: pb.ExplainRequest, *, seconds: float) -> float:
    """Calls per second that are answered when 32 callers ask again as soon as they are answered."""
    outcomes, end = Outcomes(), time.perf_counter() + seconds

    async def ask(number: int) -> None:
        while time.perf_counter() < end:
            await callers.call(number, request, outcomes)

    await asyncio.gather(*(ask(number) for number in range(32)))
    return outcomes.count("OK") / seconds


async def open_loop(callers: Callers, request: pb.ExplainRequest, *, rate: float, seconds: float) -> Outcomes:
    """Make `rate` calls a second at random times (Poisson), for so long."""
    chance, outcomes, calls = random.Random(0), Outcomes(), []
    start = due = time.perf_counter()
    while due < start + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        calls.append(asyncio.create_task(callers.call(len(calls), request, outcomes)))
        due += chance.expovariate(rate)
    await asyncio.gather(*calls)
    return outcomes


async def goodput(service: served.Service, *, seconds: float) -> Table:
    """Answers and refusals of open loops below and beyond capacity."""
    image = np.zeros((256, 256, 3), np.uint8)
    request = pb.ExplainRequest(
        image=pb.Image(pixels=pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=image.shape, data=image.tobytes()))
    )
    callers = Callers(service.address)
    await capacity(callers, request, seconds=1.0)
    most = await capacity(callers, request, seconds=seconds)
    table = Table(title=f"open loops of {seconds:g} s against a capacity of {most:.0f} calls/s (efficientnet_lite0)")
    for column in (
        "rate",
        "answered/s",
        "/ capacity",
        "p99 answer ms",
        "refused",
        "p99 refusal ms",
        "others",
        "target",
    ):
        table.add_column(column, justify="right")
    for rate in RATES:
        outcomes = await open_loop(callers, request, rate=rate * most, seconds=seconds)
        answered = outcomes.count("OK") / seconds
        refusal_ms = outcomes.p99_ms("RESOURCE_EXHAUSTED")
        others = Counter({status: len(took) for status, took in outcomes.took_ms.items()})
        del others["OK"], others["RESOURCE_EXHAUSTED"]
        met = answered >= MIN_GOODPUT * min(rate, 1.0) * most and not others and not refusal_ms > MAX_REFUSAL_MS
        table.add_row(
            f"{rate:g}x",
            f"{answered:.0f}",
            f"{answered / most:.2f}",
            f"{outcomes.p99_ms('OK'):.0f}",
            str(outcomes.count("RESOURCE_EXHAUSTED")),
            f"{refusal_ms:.1f}",
            ", ".join(f"{count} {status}" for status, count in others.items()) or "-",
            "met" if met else "MISSED",
        )
    await callers.close()
    return table


def main(
    seconds: Annotated[float, typer.Option(help="How long each open loop lasts.")] = 10.0,
) -> None:
    """Print goodput beyond capacity."""
    with served.serve() as service:
        Console(width=120).print(asyncio.run(goodput(service, seconds=seconds)))


if __name__ == "__main__":
    typer.run(main)
