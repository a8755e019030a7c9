"""The limit of open files, in processes of their own: a hard limit that was lowered is never raised again."""

import subprocess
import sys

import pytest

PROBE = """
import logging, resource, sys
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s", stream=sys.stdout)
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from heatlens_server.file_descriptors import connections_within_limit
print(connections_within_limit(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "held", "soft_after", "said"),
    [
        (400, 4096, 1024, 1024, 1280, ["INFO limit of open files raised from 400 to 1280"]),
        (1280, 1280, 1024, 1024, 1280, []),
        (400, 1000, 1024, 744, 1000, ["INFO limit of open files raised from 400 to 1000", "WARNING at most 744 conn"]),
        (200, 200, 10, 1, 200, ["WARNING at most 1 conn"]),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_connections_need_it(soft, hard, wanted, held, soft_after, said):
    command = [sys.executable, "-c", PROBE, str(soft), str(hard), str(wanted)]
    probe = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, last = probe.stdout.splitlines()
    assert last == f"{held} {soft_after}"
    assert len(lines) == len(said)
    assert all(line.startswith(start) for line, start in zip(lines, said, strict=True))
