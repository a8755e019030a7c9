"""A client in a process of its own: one stream of many tiny frames, and the memory of both ends on the way.

    python soak_client.py ADDRESS SERVER_PID FRAMES WINDOW [leak]

Prints one line of JSON per sample: frames answered, the server's resident bytes, this process's.
"""

import json
import os
import sys

import numpy as np

from heatlens import Client
from observed_server import rss_bytes

SAMPLES = 200


def soak(address: str, server_pid: int, count: int, window: int, *, leak: bool) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3), np.uint8) for _ in range(64)]
    kept = []
    with Client(address) as client, client.stream(max_in_flight=window) as stream:
        assert stream.window == window
        for i, item in enumerate(stream.map(images[i % len(images)] for i in range(count)), 1):
            assert item.result is not None, item
            if leak:
                kept.append(item.result)
            if i % (count // SAMPLES) == 0:
                print(json.dumps([i, rss_bytes(server_pid), rss_bytes(os.getpid())]), flush=True)


if __name__ == "__main__":
    soak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), leak="leak" in sys.argv[5:])
