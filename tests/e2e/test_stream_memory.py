"""A stream that never ends: the memory of both ends is flat. Both run in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from observed_server import SUPPORT, import_path, observed_server
from server_toml import model_toml, server_toml

TOML = server_toml(model_toml("tiny", max_batch_size=16), log_level="warning")

# Memory is that of two processes of their own: other tests may run beside this one.
FRAMES = 10_000
# The control needs fewer: what it keeps shows after a few thousand.
LEAKING_FRAMES = 3_000
WINDOW = 64

# An answer for one of these frames, kept, costs 1.5 to 2 kB. The allocator's own ups and downs, as the usual slope over
# half of the samples, are below 0.2 kB per frame.
TOLERANCE_BYTES_PER_FRAME = 500.0


def growth_bytes_per_frame(samples: list[list[int]]) -> tuple[float, float]:
    """The usual slope in the second half: of the server's memory, and of the client's.

    The median over pairs of samples, since systems may take pages from a process at any moment: a fall that a line
    through all samples would take for their slope.
    """
    values = np.asarray(samples[len(samples) // 2 :], float)
    apart = len(values) // 4
    frames, server, client = (values[apart:] - values[:-apart]).T
    return float(np.median(server / frames)), float(np.median(client / frames))


def soak(folder: Path, count: int, *, leak: bool) -> list[list[int]]:
    # The leak in the server is only there if the environment says so; the real server's code knows nothing of it.
    with observed_server(folder, TOML, env={"LEAK": "1" if leak else ""}) as server:
        done = subprocess.run(
            [sys.executable, str(SUPPORT / "soak_client.py"), server.address, str(server.pid), str(count), str(WINDOW)]
            + ["leak"] * leak,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=580,
            env={**os.environ, **import_path()},
        )
        held = server.until(lambda held: held.balanced)
        assert held.created["frames"] == held.created["tickets"] == count
        assert held.created["streams"] == 1
        assert server.stop() == 0
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("leak", [False, True], ids=["flat", "control"])
def test_memory_of_both_ends_is_flat_over_ten_thousand_frames(tmp_path, leak):
    samples = soak(tmp_path, LEAKING_FRAMES if leak else FRAMES, leak=leak)
    assert len(samples) == 200
    server, client = growth_bytes_per_frame(samples)
    print(f"bytes per frame: server {server:.0f}, client {client:.0f}")
    for grown in (server, client):
        assert (grown > TOLERANCE_BYTES_PER_FRAME) == leak, (server, client)
