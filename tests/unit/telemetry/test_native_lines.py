"""What native code writes to standard error, in a process of its own."""

import json
import subprocess
import sys

START = """
import faulthandler, os, subprocess, sys
from heatlens_server.telemetry.logs import configure_logging
from heatlens_server.telemetry.native_lines import take_native_lines
from heatlens_server.telemetry.output import end_output, queue_output
queue_output()
configure_logging(log_format="json", level="info")
take_native_lines()
faulthandler.enable()
"""

LINES = """
os.write(2, b"E0000 00:00:1.5 1 tcp.cc:7] connection ")
os.write(2, b"reset\\n\\nW0000 00:00:1.5 1 x.cc:7] slow\\nplain \\xff\\n")
os.write(2, b'{"event": "of a child"}\\n{not json\\n')
subprocess.run(["sh", "-c", "echo shell >&2"], check=True)
os.write(2, b"y" * 100_000 + b"\\n" + b"cut off")
end_output()
os._exit(0)
"""


def run(program: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, "-c", START + program], capture_output=True, check=False, timeout=60)


def test_every_line_is_json_with_its_level_and_logger():
    done = run(LINES)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    said = [(line.get("logger"), line.get("level"), line["event"][:40]) for line in lines]
    long = said.index(("native", "warning", "y" * 40))
    assert said[:long] == [
        ("grpc", "error", "E0000 00:00:1.5 1 tcp.cc:7] connection r"),
        ("grpc", "warning", "W0000 00:00:1.5 1 x.cc:7] slow"),
        ("native", "warning", "plain \\xff"),
        (None, None, "of a child"),
        ("native", "warning", "{not json"),
        ("native", "warning", "shell"),
    ]


def test_the_stacks_of_a_crash_are_written_all_the_same():
    done = run("faulthandler._sigsegv()")
    assert done.returncode == -11
    assert b"Fatal Python error: Segmentation fault" in done.stderr
