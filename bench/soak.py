"""How a server's memory goes under hours of mixed load: `python -m bench.soak --minutes 60`.

Eight callers and two streams take from one mix: tensors, files of four formats, several classes, layers and map sizes,
smoothing, a method in steps, files that are broken, deadlines that pass. The server runs in a process of its own.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated

import cv2
import grpc
import grpc.aio
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import served
from bench.models import photo_paths
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2

MAX_SLOPE_MB_PER_MIN = 1.0
WARM_UP = 1 / 6
"""Share of the time that is for what is made once."""

CALLERS, STREAMS = 8, 2
_FRAMES = 60
_POINTS = 60
_SIDES_PX = (64, 256, 600)
_FORMATS = (".jpg", ".png", ".webp", ".bmp")
_METHODS = (
    method_pb2.METHOD_GRAD_CAM,
    method_pb2.METHOD_LAYER_CAM,
    method_pb2.METHOD_EIGEN_CAM,
    method_pb2.METHOD_RECIPRO_CAM,
)
_SIZES = (pb.MAP_SIZE_LAYER, pb.MAP_SIZE_INPUT, pb.MAP_SIZE_SOURCE)


def images(chance: np.random.Generator) -> list[pb.Image]:
    """Good ones, and one file in ten that ends too early."""
    found = []
    for side_px in _SIDES_PX:
        pixels = chance.integers(0, 256, (side_px, side_px, 3), np.uint8)
        tensor = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=pixels.shape, data=pixels.tobytes())
        found.append(pb.Image(pixels=tensor))
    files = [cv2.imencode(suffix, cv2.imread(str(path)))[1].tobytes() for path in photo_paths() for suffix in _FORMATS]
    found += [pb.Image(encoded=file) for file in files]
    found += [pb.Image(encoded=file[: len(file) // 2]) for file in files[: len(found) // 9]]
    return found


def options(chance: random.Random) -> pb.ExplainOptions:
    """One of the mix."""
    return pb.ExplainOptions(
        method=chance.choices(_METHODS, (8, 4, 2, 1))[0],
        top_k=chance.choice((1, 1, 2, 5, 10)),
        map_size=chance.choice(_SIZES),
        smoothing=pb.Smoothing(augmentation=chance.random() < 0.1),
        top_predictions=chance.choice((0, 5)),
    )


async def call(stub: explain_pb2_grpc.ExplainServiceStub, given: Sequence[pb.Image], chance: random.Random) -> str:
    """Make one call of the mix; return its status."""
    timeout_s = chance.choice((60.0, 60.0, 60.0, 0.02))
    try:
        await stub.Explain(pb.ExplainRequest(image=chance.choice(given), options=options(chance)), timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def stream(stub: explain_pb2_grpc.ExplainServiceStub, given: Sequence[pb.Image], chance: random.Random) -> str:
    """Send a film whose frames come faster than they are explained; now and then, leave in the middle."""

    async def frames() -> AsyncIterator[pb.StreamExplainRequest]:
        config = pb.StreamConfig(options=pb.ExplainOptions(), overflow_policy=pb.OVERFLOW_POLICY_DROP_OLDEST)
        yield pb.StreamExplainRequest(config=config)
        for number in range(1, _FRAMES + 1):
            yield pb.StreamExplainRequest(frame=pb.Frame(frame_id=number, image=chance.choice(given)))
            await asyncio.sleep(0.02)

    last = _FRAMES if chance.random() < 0.8 else _FRAMES // 2
    answers = stub.StreamExplain(frames())
    try:
        async for answer in answers:
            if answer.frame_id >= last:
                break
    except grpc.aio.AioRpcError as error:
        return f"stream {error.code().name}"
    answers.cancel()
    return "stream OK"


async def soak(service: served.Service, *, minutes: float) -> Table:
    """Load a server for so long, and fit a line to its resident memory."""
    given = images(np.random.default_rng(0))
    start, outcomes = time.perf_counter(), Counter[str]()
    points: list[tuple[float, float]] = []
    channels = [grpc.aio.insecure_channel(service.address) for _ in range(2)]
    stubs = [explain_pb2_grpc.ExplainServiceStub(channel) for channel in channels]

    async def load(number: int) -> None:
        chance, one = random.Random(number), call if number < CALLERS else stream
        while time.perf_counter() < start + 60 * minutes:
            outcomes[await one(stubs[number % len(stubs)], given, chance)] += 1

    loads = asyncio.gather(*(load(number) for number in range(CALLERS + STREAMS)))
    while not loads.done():
        points.append(((time.perf_counter() - start) / 60, resident_mb(service.pid)))
        await asyncio.wait([loads], timeout=60 * minutes / _POINTS)
    await loads
    for channel in channels:
        await channel.close()
    later = [(minute, size) for minute, size in points if minute > minutes * WARM_UP]
    slope = float(np.polyfit(*np.transpose(later), 1)[0]) if len(later) > 2 else float("nan")
    table = Table(
        title=f"resident memory under {minutes:g} min of mixed load: "
        + ", ".join(f"{count} {status}" for status, count in outcomes.most_common())
    )
    for column in ("at first MB", "after warm-up MB", "at last MB", "most MB", "slope MB/min", "target"):
        table.add_column(column, justify="right")
    sizes = [size for _, size in points]
    table.add_row(
        f"{sizes[0]:.0f}",
        f"{later[0][1]:.0f}" if later else "-",
        f"{sizes[-1]:.0f}",
        f"{max(sizes):.0f}",
        f"{slope:+.2f}",
        "met" if slope < MAX_SLOPE_MB_PER_MIN else "MISSED",
    )
    return table


def resident_mb(pid: int) -> float:
    """Resident memory of a process, as the kernel says it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS:"))) / 1024


def main(
    minutes: Annotated[float, typer.Option(help="How long; a sixth of it is warm-up.")] = 60.0,
) -> None:
    """Print the slope of a server's resident memory."""
    with served.serve() as service:
        Console(width=120).print(asyncio.run(soak(service, minutes=minutes)))


if __name__ == "__main__":
    typer.run(main)
