"""Clients that are killed: a program forks them, lets them talk to a server, and ends them with SIGKILL.

    python killed_clients.py ADDRESS SEED SECONDS AT_ONCE

Everything but the scheduling follows from the seed. Prints how many died of it, by what they were doing. A client that
ends before it is killed, which none should, makes the program fail.
"""

import collections
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

import grpc
import numpy as np

from heatlens import Client
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from messages import distinct, encoded, pixels

LONGEST_LIFE_S = 0.5
IMAGES = distinct(8)
LARGE = np.zeros((512, 512, 3), np.uint8)


def _stub(address: str) -> explain_pb2_grpc.ExplainServiceStub:
    return explain_pb2_grpc.ExplainServiceStub(grpc.insecure_channel(address))


def _requests(image: pb.Image, **config: object) -> Iterator[pb.StreamExplainRequest]:
    yield pb.StreamExplainRequest(config=pb.StreamConfig(**config))
    for i in itertools.count():
        yield pb.StreamExplainRequest(frame=pb.Frame(frame_id=i, image=image))


def film(address: str) -> None:
    """A well-behaved stream of the SDK."""
    with Client(address) as client, client.stream(max_in_flight=16) as stream:
        for item in stream.map(itertools.cycle(IMAGES)):
            assert item.error is None, item


def flood(address: str) -> None:
    """Sends as fast as it can; most is dropped."""
    for answer in _stub(address).StreamExplain(
        _requests(encoded(IMAGES[0]), overflow_policy=pb.OVERFLOW_POLICY_DROP_OLDEST)
    ):
        assert answer.WhichOneof("payload") in ("started", "result", "error")


def stall(address: str) -> None:
    """Reads nothing, until neither side can send."""
    options = pb.ExplainOptions(top_k=10, map_size=pb.MAP_SIZE_SOURCE)
    call = _stub(address).StreamExplain(_requests(pixels(LARGE), options=options, max_in_flight=2))
    next(call)
    signal.pause()


def say_nothing(address: str) -> None:
    """Opens a stream and sends nothing."""
    next(_stub(address).StreamExplain(iter(signal.pause, 0)))


def come_and_go(address: str) -> None:
    """Many short streams, some cancelled and some finished."""
    stub = _stub(address)
    for i in itertools.count():
        call = stub.StreamExplain(itertools.islice(_requests(pixels(IMAGES[0])), 4))
        answers = list(itertools.islice(call, 2 if i % 2 else None))
        assert len(answers) == (2 if i % 2 else 4)
        call.cancel()


def ask(address: str) -> None:
    """Calls Explain."""
    with Client(address) as client:
        for image in itertools.cycle(IMAGES):
            client.explain(image)


LIVES: tuple[Callable[[str], None], ...] = (film, flood, stall, say_nothing, come_and_go, ask)


def _live(life: Callable[[str], None], address: str) -> None:
    """What a forked client does; never returns."""
    try:
        life(address)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def run(address: str, seed: int, duration_s: float, at_once: int) -> dict[str, int]:
    """Let clients live and die; how many died, by what they did."""
    rng = random.Random(seed)
    died: collections.Counter[str] = collections.Counter()
    living: dict[int, tuple[float, str]] = {}
    end_s = time.monotonic() + duration_s
    # In turn, so that no seed leaves one out.
    lives = itertools.cycle(LIVES)
    while living or time.monotonic() < end_s:
        while len(living) < at_once and time.monotonic() < end_s:
            life, death_s = next(lives), time.monotonic() + rng.uniform(0, LONGEST_LIFE_S)
            pid = os.fork()
            if pid == 0:
                _live(life, address)
            living[pid] = (death_s, life.__name__)
        pid, (death_s, name) = min(living.items(), key=lambda item: item[1])
        time.sleep(max(0.0, death_s - time.monotonic()))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise SystemExit(f"a client that should {name} ended by itself")
        del living[pid]
        died[name] += 1
    return dict(died)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))))
