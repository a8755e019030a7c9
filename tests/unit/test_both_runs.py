"""`make test` is two runs of pytest: both take place, and what fails in either one fails."""

import os
import re
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "run.py"
TESTS = """
import os, pytest

def test_parallel():
    assert "PYTEST_XDIST_WORKER" in os.environ
    assert False

@pytest.mark.serial
def test_alone():
    assert "PYTEST_XDIST_WORKER" not in os.environ
"""


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit status and the last line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # eight processes would import them
    command = [sys.executable, RUN, "-p", "no:cacheprovider", "-p", "xdist", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1]


def test_a_failure_in_the_first_run_is_told_after_the_second(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = serial\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    status, last = run(tmp_path)
    assert status == 1, last
    assert re.fullmatch(r"=+ 1 failed, 1 passed in [\d.]+s \(0:00:\d\d\) =+", last)
    # Of a selection, all may be of one kind.
    status, last = run(tmp_path, "-k", "alone")
    assert status == 0, last
    assert " 1 passed in " in last
