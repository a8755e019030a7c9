"""What a caller notices while another host floods: `python -m bench.floods`.

A host of its own, 127.0.0.2, sends frames or calls without number for some seconds, from a process of its own on the
same cores, while a plain caller makes one call after the other on a new connection each. The server is one that lets
it, and one with `server.refuse_floods`, in turns.
"""

import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import served
from heatlens import Client, HeatlensError

# What the tests attack with.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from floods import KINDS, flood

_PAUSE_S = 0.1


def attack(address: str, kind: str, connections: int, seconds: float) -> None:
    """Flood for so long."""
    over = threading.Event()
    for _ in range(connections):
        threading.Thread(target=flood, args=(address, kind, over), daemon=True).start()
    time.sleep(seconds)
    over.set()


def calls_beside(address: str, kind: str, connections: int, seconds: float) -> tuple[list[float], Counter[str]]:
    """How long the plain calls took that a flood went on beside, in ms, and the reasons of those that failed."""
    image = np.zeros((256, 256, 3), np.uint8)
    took_ms: list[float] = []
    failed: Counter[str] = Counter()
    attacker = multiprocessing.get_context("spawn").Process(target=attack, args=(address, kind, connections, seconds))
    attacker.start()
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        began_s = time.monotonic()
        with Client(address, timeout=20.0) as client:
            try:
                client.explain(image)
            except HeatlensError as error:
                failed[error.reason] += 1
        took_ms.append(1000 * (time.monotonic() - began_s))
        time.sleep(_PAUSE_S)
    attacker.join()
    return took_ms, failed


def main(
    seconds: Annotated[float, typer.Option(help="How long each flood lasts.")] = 8.0,
    connections: Annotated[int, typer.Option(help="Of the host that floods.")] = 8,
) -> None:
    """Print how long plain calls take beside floods."""
    table = Table(title=f"plain calls beside floods of {seconds:g} s on {connections} connections (efficientnet_lite0)")
    for column in ("flood", "refuse_floods", "calls", "median ms", "most ms", "failed"):
        table.add_column(column, justify="right")
    for kind in KINDS:
        for refuses in ("false", "true"):
            os.environ["HEATLENS_SERVER__REFUSE_FLOODS"] = refuses
            with served.serve() as service:
                took_ms, failed = calls_beside(service.address, kind, connections, seconds)
            table.add_row(
                kind,
                refuses,
                str(len(took_ms)),
                f"{statistics.median(took_ms):.0f}",
                f"{max(took_ms):.0f}",
                ", ".join(f"{count} {reason}" for reason, count in failed.items()) or "-",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
