"""The real `heatlens` command in a process of its own."""

import os
import subprocess
import sys

_PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.{handler})
from heatlens._cli.commands import app
app()
"""


def start_cli(*arguments: object, ignore_interrupts: bool = False) -> "subprocess.Popen[str]":
    """Start the command; it inherits no settings.

    A process that job runners and some shells start in the background ignores SIGINT, and so do its children: whether
    this one does is set, not inherited.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HEATLENS_", "OPENCV_"))}
    program = _PROGRAM.format(handler="SIG_IGN" if ignore_interrupts else "default_int_handler")
    command = [sys.executable, "-c", program, *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def next_line(process: "subprocess.Popen[str]") -> str:
    """Read a line of stdout and nothing after it: `communicate` passes over what `readline` has read ahead."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(process.stdout.fileno(), 1)):
        line += byte
    return line.decode()
