"""The client and the stream for threads are those for asyncio, in other words."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CLIENT = Path(__file__).parents[3] / "client"


def check(script):
    return subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)


def test_generated_files_are_current():
    done = check(CLIENT / "unasync.py")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("_stream/stream.py", ("def close", "def shut_down"), "stale: _stream/stream.py; run make sync-client"),
        ("_calls/async_client.py", ("in other tasks fail", "fail"), "expected once: 'in other tasks fail'"),
    ],
)
def test_changes_on_one_side_are_found(tmp_path, name, change, message):
    shutil.copytree(CLIENT, tmp_path / "client", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CLIENT.parent / "pyproject.toml", tmp_path)
    changed = tmp_path / "client" / "heatlens" / name
    changed.write_text(changed.read_text().replace(*change))
    done = check(tmp_path / "client" / "unasync.py")
    assert done.returncode == 1
    assert message in done.stderr
