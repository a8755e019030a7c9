"""gRPC alone: a server that answers every frame of a stream with one and the same message. What no server can save."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import uvloop

from bench.wire import answer
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc


class BareServicer(explain_pb2_grpc.ExplainServiceServicer):
    """Reads a frame, writes the answer, reads the next one."""

    async def StreamExplain(  # type: ignore[override]  # noqa: N802 - the contract's name
        self,
        request_iterator: AsyncIterator[pb.StreamExplainRequest],
        context: Any,  # noqa: ANN401 - grpc's context
    ) -> None:
        """Answer."""
        result = answer()
        async for request in request_iterator:
            if request.HasField("config"):
                started = pb.StreamStarted(model="bare", max_in_flight=request.config.max_in_flight)
                await context.write(pb.StreamExplainResponse(started=started))
            else:
                await context.write(pb.StreamExplainResponse(frame_id=request.frame.frame_id, result=result))


@contextmanager
def serve_bare() -> Iterator[tuple[str, int]]:
    """Run the server in a process of its own; yield its address and process id."""
    command = [sys.executable, "-m", "bench.bare_stream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        if process.stdout is None:
            raise RuntimeError("the server has no output")
        yield f"127.0.0.1:{process.stdout.readline().strip()}", process.pid
    finally:
        process.terminate()
        process.wait()


async def _serve() -> None:
    server = grpc.aio.server()
    explain_pb2_grpc.add_ExplainServiceServicer_to_server(BareServicer(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
