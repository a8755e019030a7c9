"""Explain a photo on a Ray cluster of two local nodes, and write the answer as a picture: `make ray`.

What a cluster of machines would be, on one: two nodes of one CPU, a replica on each, one address.
"""

import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ray.cluster_utils import Cluster
from rich.console import Console

from heatlens import Client, HeatlensError

PHOTO = Path(__file__).parents[1] / "server/heatlens_server/backends/torch/export/photos/chelsea.jpg"
OUT = Path("out/ray")
PORT = 50071
MIB = 2**20
CALLS, CALLERS = 40, 4
START_TIMEOUT_S = 300.0


def main() -> None:
    """Start the nodes and the application, explain, and end them."""
    console, began = Console(), time.monotonic()
    node = {"num_cpus": 1, "object_store_memory": 80 * MIB}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    console.print(f"two nodes after {time.monotonic() - began:.1f} s")
    command = [sys.executable, "-m", "heatlens_server", "ray", "--address", cluster.address, "--port", str(PORT)]
    # Half a CPU each, so that an update finds room for one more.
    with subprocess.Popen([*command, "--replicas", "2", "--num-cpus", "0.5"], env=os.environ) as server:
        try:
            with Client(f"127.0.0.1:{PORT}", timeout=START_TIMEOUT_S, wait_for_ready=True) as client:
                wait_until_it_answers(client)
                explain(client, console, began)
        finally:
            server.terminate()
            server.wait()
    cluster.shutdown()


def wait_until_it_answers(client: Client) -> None:
    """Wait for an application: before it is there, Ray's proxies refuse calls."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with suppress(HeatlensError):
            client.models()
            return
        time.sleep(0.2)
    client.models()


def explain(client: Client, console: Console, began: float) -> None:
    """Explain the photo, then put some load on both replicas."""
    result = client.explain(PHOTO)
    console.print(f"first answer after {time.monotonic() - began:.1f} s: {result.explanations[0].label}")
    OUT.mkdir(parents=True, exist_ok=True)
    result.explanations[0].heatmap.save(OUT / "why.png", PHOTO)
    console.print(f"wrote {OUT / 'why.png'}")
    started = time.monotonic()
    with ThreadPoolExecutor(CALLERS) as pool:
        batches = Counter(pool.map(lambda _: client.explain(PHOTO).timing.batch_size, range(CALLS)))
    rate = CALLS / (time.monotonic() - started)
    console.print(f"{rate:.1f} images/s by two replicas of one thread; batches: {dict(sorted(batches.items()))}")


if __name__ == "__main__":
    main()
