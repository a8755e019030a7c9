"""Standard error that nobody reads, that is gone, or that takes nothing."""

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
import threading

import pytest

from heatlens_server.telemetry.output import QueuedOutput

PATIENCE_S = 60.0
PIPE_BYTES = 4096


@pytest.fixture
def pipe():
    """The ends of a small pipe."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    yield reader, writer
    for end in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(end)


def read_until(reader: int, last: bytes) -> bytes:
    data = b""
    while last not in data:
        piece = os.read(reader, 65536)
        assert piece
        data += piece
    return data


def test_writes_arrive_in_order_and_as_whole_lines(pipe):
    reader, writer = pipe
    output = QueuedOutput(writer, "test")
    lines = [f"line {i}\n".encode() for i in range(2000)]
    threading.Thread(target=lambda: [output.write(line) for line in lines], daemon=True).start()
    assert read_until(reader, lines[-1]) == b"".join(lines)
    assert output.end(PATIENCE_S)


def test_what_nobody_reads_is_dropped_counted_and_said(pipe, caplog):
    reader, writer = pipe
    os.write(writer, b"." * PIPE_BYTES)
    output = QueuedOutput(writer, "stderr", max_bytes=1000)
    for _ in range(1000):
        assert output.write(b"x" * 99 + b"\n") == 100
    assert not output.end(0.01)
    received = b""
    while len(received) < PIPE_BYTES + 1000:
        received += os.read(reader, 65536)
    assert output.end(PATIENCE_S)
    assert received == b"." * PIPE_BYTES + 10 * (b"x" * 99 + b"\n")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("990 writes to stderr were dropped")


def test_a_write_longer_than_the_bound_goes_alone(pipe):
    reader, writer = pipe
    output = QueuedOutput(writer, "test", max_bytes=10)
    output.write(b"y" * 9999 + b"\n")
    assert read_until(reader, b"\n") == b"y" * 9999 + b"\n"
    assert output.end(PATIENCE_S)


def test_a_reader_that_is_gone_harms_nothing(pipe):
    reader, writer = pipe
    os.close(reader)
    output = QueuedOutput(writer, "test")
    for _ in range(100):
        output.write(b"line\n")
    assert output.end(PATIENCE_S)


def test_a_descriptor_that_does_not_block_is_waited_for(pipe):
    reader, writer = pipe
    os.set_blocking(writer, False)
    output = QueuedOutput(writer, "test")
    data = b"y" * 99_999 + b"\n"
    output.write(data)
    assert read_until(reader, b"\n") == data
    assert output.end(PATIENCE_S)


def test_text_written_by_parts_is_whole(pipe):
    reader, writer = pipe
    output = QueuedOutput(writer, "test")
    text = io.TextIOWrapper(output, encoding="utf-8", errors="backslashreplace", write_through=True)
    print("half a pair: \ud800", 3, file=text)
    assert read_until(reader, b"\n") == b"half a pair: \\ud800 3\n"
    assert (text.fileno(), text.isatty()) == (writer, False)
    assert output.end(PATIENCE_S)


PROGRAM = """
import json, os, sys
from heatlens_server.telemetry.output import queue_output
queue_output()
print("to stdout")
print("to stderr", file=sys.stderr)
for descriptor in (0, 1, 2):
    os.fstat(descriptor)
answer = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
try:
    native = os.write(2, b"x" * 1_000_000)
except BlockingIOError:
    native = 0
os.write(answer, json.dumps([answer, native]).encode())
"""


def test_what_is_printed_comes_out_at_the_end(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "a"], capture_output=True, check=True)
    assert done.stdout == b"to stdout\n"
    assert done.stderr.startswith(b"to stderr\n") or done.stderr.endswith(b"to stderr\n")


def test_closed_descriptors_are_taken_by_nothing_else(tmp_path):
    command = f'exec "{sys.executable}" -c "$PROGRAM" "{tmp_path / "a"}" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", command], env={**os.environ, "PROGRAM": PROGRAM}, check=True)
    descriptor, _ = json.loads((tmp_path / "a").read_text())
    assert descriptor > 2


def test_native_code_does_not_wait_for_a_pipe_that_nobody_reads(tmp_path, pipe):
    reader, writer = pipe
    # `run` does not read: the process must end by itself.
    subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "a"], stderr=writer, check=True, timeout=PATIENCE_S)
    _, native = json.loads((tmp_path / "a").read_text())
    assert native < 1_000_000
    assert os.read(reader, 1)
