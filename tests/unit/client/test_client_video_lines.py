"""Lines of JSON in a file or on stdout."""

import io
import sys
from pathlib import Path

import pytest

from heatlens._video.lines import Lines


def test_the_file_is_replaced_by_the_first_line_and_not_before(tmp_path):
    path = tmp_path / "precious.jsonl"
    path.write_text("precious")
    lines = Lines(path)
    assert path.read_text() == "precious"
    lines.write("ä\n")
    assert path.read_text(encoding="utf-8") == "ä\n"
    lines.write("b\n")
    lines.close()
    lines.close()
    assert path.read_text(encoding="utf-8") == "ä\nb\n"


def test_without_a_line_there_is_no_file(tmp_path):
    Lines(tmp_path / "lines.jsonl").close()
    assert list(tmp_path.iterdir()) == []


def test_stdout(capsys):
    lines = Lines(None)
    lines.write("a\n")
    lines.close()
    print("still open")
    assert capsys.readouterr().out == "a\nstill open\n"
    assert not lines.reader_left


def test_a_file_that_cannot_be_created_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Lines(tmp_path / "missing" / "lines.jsonl").write("a\n")
    assert caught.value.filename == str(tmp_path / "missing" / "lines.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named():
    lines = Lines(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left") as caught:
        lines.write("a\n")
    assert caught.value.filename == "/dev/full"
    lines.close()
    assert not lines.reader_left


class ClosedPipe(io.StringIO):
    def flush(self):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_left(monkeypatch):
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    lines = Lines(None)
    with pytest.raises(BrokenPipeError):
        lines.write("a\n")
    assert lines.reader_left
