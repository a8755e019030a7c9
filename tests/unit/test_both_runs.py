"""`make test` is two runs of pytest: both take place, and what fails in either one fails."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "run.py"
TESTS = """
import os, pytest

def test_beside():
    assert "PYTEST_XDIST_WORKER" in os.environ
    assert False

@pytest.mark.serial
def test_alone():
    assert "PYTEST_XDIST_WORKER" not in os.environ
"""


def test_a_failure_in_the_first_run_is_told_after_the_second(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = serial\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, RUN, "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"=+ 1 failed, 1 passed in [\d.]+s \(0:00:\d\d\) =+", last)


@pytest.mark.parametrize(
    ("beside", "alone", "of_all", "of_some"),
    [(0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 1), (2, 1, 2, 2), (0, 5, 5, 0), (5, 3, 5, 3), (5, 5, 5, 5)],
)
@pytest.mark.parametrize("arguments", [[], ["tests/unit"]])
def test_exit_code_is_that_of_the_first_run_that_fails(monkeypatch, capsys, beside, alone, of_all, of_some, arguments):
    spec = importlib.util.spec_from_file_location("run", RUN)
    both = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(both)
    statuses = {both.SIDE_BY_SIDE: beside, both.SERIAL: alone}
    monkeypatch.setenv("TESTS_CACHE_HOME", "")  # put back afterwards
    monkeypatch.setattr(both, "run", lambda selection, arguments, report: statuses.pop(selection))
    assert both.main(arguments) == (of_some if arguments else of_all)
    assert statuses == {}
    assert capsys.readouterr().out.count("no tests ran") == 1
