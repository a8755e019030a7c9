"""How native libraries' threads wait, in a process of its own: they read it when they are loaded."""

import json
import os
import subprocess
import sys

import pytest

PROBE = """
import json, os
from heatlens_server.native_threads import wait_briefly

wait_briefly()

import numpy
from threadpoolctl import threadpool_info

found = [pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"]
print(json.dumps([found, os.environ["GOMP_SPINCOUNT"]]))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, [[1], "1000"]), ({"OPENBLAS_NUM_THREADS": "2", "GOMP_SPINCOUNT": "7"}, [[2], "7"])],
    ids=["unset", "set"],
)
def test_openblas_has_one_thread_and_openmp_spins_briefly_unless_told_otherwise(given, expected):
    others = {
        name: value for name, value in os.environ.items() if name not in {"OPENBLAS_NUM_THREADS", "GOMP_SPINCOUNT"}
    }
    found = subprocess.run(
        [sys.executable, "-c", PROBE], env={**others, **given}, check=True, capture_output=True, text=True, timeout=60
    )
    assert json.loads(found.stdout) == expected
