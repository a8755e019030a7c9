"""What watching a server costs: throughput and CPU time per call with metrics and traces, against a server without.

The servers run side by side and are loaded in turns. Spans go to a collector in this process, which drops them.
"""

import itertools
import os
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np
import psutil
from rich.table import Table

from bench import served
from bench.stream import cpu_s
from heatlens_server.core.extras import is_installed

MAX_COST = 0.02
CONCURRENCY = 8

_METRICS = '[metrics]\nlisten = "127.0.0.1:0"\n'
_TRACING = "[tracing]\nenabled = true\n"
_SAMPLED = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}


def run(*, turns: int, seconds: float) -> Table:
    """Measure and tabulate, for the default model."""
    kinds = {"neither": "", "metrics": _METRICS}
    if is_installed("opentelemetry") and is_installed("opentelemetry.exporter"):
        kinds |= {"traces": _TRACING, "both": _METRICS + _TRACING, "both, a tenth traced": _METRICS + _TRACING}
    table = Table(title=f"watched / unwatched, calls at a concurrency of {CONCURRENCY}, medians of turns")
    for column in ("with", "images/s", "/ without", "target", "server CPU per call, ms", "/ without"):
        table.add_column(column, justify="right")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (served.RESIZED_PX, served.RESIZED_PX, 3), np.uint8) for _ in range(4)]
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    spent_ms: dict[str, list[float]] = {kind: [] for kind in kinds}
    with ExitStack() as stack:
        stack.enter_context(_collector())
        services = {}
        for kind, keys in kinds.items():
            os.environ |= _SAMPLED if kind.endswith("a tenth traced") else {}
            services[kind] = stack.enter_context(served.serve(keys + served.DEFAULT_MODEL))
        for name in _SAMPLED:
            os.environ.pop(name, None)
        for service in services.values():
            served.measure(service, images, CONCURRENCY, seconds=1.0)
        for turn in range(turns):
            # Who begins changes: the first finds the machine as the one before left it.
            for kind in itertools.islice(itertools.cycle(services), turn, turn + len(services)):
                process = psutil.Process(services[kind].pid)
                before_s = cpu_s(process)
                load = served.measure(services[kind], images, CONCURRENCY, seconds=seconds)
                spent_ms[kind].append((cpu_s(process) - before_s) / len(load.timings) * 1e3)
                rates[kind].append(load.images_per_s)
    for kind in kinds:
        ratio = statistics.median(one / other for one, other in zip(rates[kind], rates["neither"], strict=True))
        cpu = statistics.median(one / other for one, other in zip(spent_ms[kind], spent_ms["neither"], strict=True))
        table.add_row(
            kind,
            f"{statistics.median(rates[kind]):.1f}",
            f"{ratio:.3f}",
            "" if kind == "neither" else "met" if ratio >= 1 - MAX_COST else "MISSED",
            f"{statistics.median(spent_ms[kind]):.2f}",
            f"{cpu:.3f}",
        )
    table.caption = f"Target: at least {1 - MAX_COST:.2f} of the throughput without. Every call is traced, or a tenth."
    return table


@contextmanager
def _collector() -> Iterator[None]:
    """An OTLP collector that drops what it gets; servers that are started meanwhile send to it."""
    method = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
    drop = grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")

    class Handlers(grpc.GenericRpcHandler):
        def service(
            self, handler_call_details: grpc.HandlerCallDetails
        ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
            return drop if handler_call_details.method == method else None

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handlers()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{port}"
    try:
        yield
    finally:
        del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
        server.stop(None)
