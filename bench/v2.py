"""The open inference protocol against the native one, by raw stubs on both sides, on the same server and images."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc.aio
import numpy as np
import psutil
import uvloop
from rich.table import Table

from bench.served import Images, Service, workloads
from bench.stream import cpu_s
from heatlens.v1 import explain_pb2, explain_pb2_grpc
from heatlens_server.transports.grpc.v2 import inference_pb2
from heatlens_server.transports.grpc.v2.service import SERVICE

IN_FLIGHT = (1, 8)
BATCH = 8
MIN_RATIO = 0.95

Call = Callable[[], Awaitable[object]]


def run(service: Service, *, turns: int, seconds: float) -> Table:
    """Measure and tabulate throughput, in turns."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_table(service, turns=turns, seconds=seconds))


async def _table(service: Service, *, turns: int, seconds: float) -> Table:
    table = Table(title="ModelInfer of v2 / native Explain, raw stubs (efficientnet_lite0)")
    for column in ("images", "in flight", "native/s", "v2/s", "v2 / native", "its server CPU", f"{BATCH} in a request"):
        table.add_column(column, justify="right")
    process = psutil.Process(service.pid)
    async with grpc.aio.insecure_channel(service.address) as channel:
        for kind, images in workloads().items():
            if kind == "pixels, photo":
                continue  # of different sizes, which no batch holds
            calls = {
                "native": _native(channel, images),
                "v2": _v2(channel, images, 1),
                "batch": _v2(channel, images, BATCH),
            }
            for in_flight in IN_FLIGHT:
                # As many images in flight, however they are sent.
                images_each = {"native": 1, "v2": 1} | ({"batch": BATCH} if in_flight == BATCH else {})
                measured: dict[str, list[_Load]] = {name: [] for name in images_each}
                for turn in range(turns + 1):
                    # Candidates go first in turns as well.
                    for name in sorted(images_each, reverse=bool(turn % 2)):
                        before_s = cpu_s(process)
                        rate, count = await _rate(
                            calls[name], in_flight // images_each[name], seconds=seconds if turn else 0.5
                        )
                        spent_s = (cpu_s(process) - before_s) / count
                        if turn:  # the first warms up
                            measured[name].append(_Load(rate * images_each[name], spent_s / images_each[name]))
                table.add_row(kind, str(in_flight), *_row(measured))
    table.caption = f"Target of v2 / native: >= {MIN_RATIO}. The last two columns are / native too."
    return table


@dataclass(frozen=True, slots=True)
class _Load:
    """One measured closed loop."""

    images_per_s: float
    cpu_s: float


def _row(measured: Mapping[str, Sequence[_Load]]) -> list[str]:
    def ratio(name: str, what: Callable[[_Load], float]) -> float:
        pairs = zip(measured[name], measured["native"], strict=True)
        return statistics.median(what(one) / what(native) for one, native in pairs)

    reached = ratio("v2", lambda load: load.images_per_s)
    return [
        *(f"{statistics.median(load.images_per_s for load in measured[name]):.1f}" for name in ("native", "v2")),
        f"{reached:.3f} ({'met' if reached >= MIN_RATIO else 'MISSED'})",
        f"{ratio('v2', lambda load: load.cpu_s):.3f}",
        f"{ratio('batch', lambda load: load.images_per_s):.3f}" if "batch" in measured else "",
    ]


async def _rate(calls: Sequence[Call], concurrency: int, *, seconds: float) -> tuple[float, int]:
    """Calls a second of a closed loop, and how many they were."""
    started, done = time.perf_counter(), 0

    async def caller(first: int) -> None:
        nonlocal done
        i = first
        while time.perf_counter() - started < seconds:
            await calls[i % len(calls)]()
            done += 1
            i += concurrency

    await asyncio.gather(*(caller(i) for i in range(concurrency)))
    return done / (time.perf_counter() - started), done


def _native(channel: grpc.aio.Channel, images: Images) -> list[Call]:
    stub = explain_pb2_grpc.ExplainServiceStub(channel)

    def call(image: np.ndarray | bytes) -> Call:
        def made() -> Awaitable[object]:
            if isinstance(image, bytes):
                sent = explain_pb2.Image(encoded=image)
            else:
                tensor = explain_pb2.Tensor(
                    data_type=explain_pb2.DATA_TYPE_UINT8, shape=image.shape, data=image.tobytes()
                )
                sent = explain_pb2.Image(pixels=tensor)
            return stub.Explain(explain_pb2.ExplainRequest(image=sent))

        return made

    return [call(image) for image in images]


def _v2(channel: grpc.aio.Channel, images: Images, batch: int) -> list[Call]:
    send = channel.unary_unary(
        f"/{SERVICE}/ModelInfer",
        inference_pb2.ModelInferRequest.SerializeToString,
        inference_pb2.ModelInferResponse.FromString,
    )

    def call(first: int) -> Call:
        def made() -> Awaitable[object]:
            chosen = [images[(first + i) % len(images)] for i in range(batch)]
            request = inference_pb2.ModelInferRequest()
            if isinstance(chosen[0], bytes):
                request.inputs.add(name="IMAGE", datatype="BYTES", shape=[batch])
                data = b"".join(len(file).to_bytes(4, "little") + bytes(file) for file in chosen)
            else:
                stacked = np.stack(chosen)
                request.inputs.add(name="IMAGE", datatype="UINT8", shape=stacked.shape)
                data = stacked.tobytes()
            request.raw_input_contents.append(data)
            return send(request)

        return made

    return [call(first) for first in range(len(images))]
