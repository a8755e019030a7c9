"""Exporting in a process of its own: `python -m heatlens_server.fleet.export_process`.

An export takes gigabytes that a process would keep, and the interpreter's lock for a minute. The server starts this
process, which leaves the export in the cache and ends. Standard input holds the order as one line of JSON and then
stays open: its end means that the server has ended. Standard output has one JSON object per line.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from heatlens_server.backends.onnx.export_cache import ArtefactCache
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ExportError, ModelLoadError
from heatlens_server.core.graph_spec import Format
from heatlens_server.fleet.artefact import Artefact, LazyModel, PassingError, Report, find, obtain
from heatlens_server.fleet.cache_key import artefact_key, is_settled

_log = logging.getLogger(__name__)

_TAIL_BYTES = 2000
_ERRORS: dict[str, type[Exception]] = {"export": ExportError, "passing": PassingError, "load": ModelLoadError}

# One at a time: each takes gigabytes and as many cores as there are.
_running = threading.Lock()


def obtain_apart(
    config: ModelConfig,
    file_format: Format,
    *,
    lazy: LazyModel,
    cache: ArtefactCache,
    retry: bool,
    report: Report,
) -> Artefact:
    """Do what `obtain` does, and export in another process if this one does not need the model otherwise.

    Args: as those of `obtain`.

    Raises:
        ExportError: the model cannot be exported, its export is wrong, or the other process died.
        ModelLoadError: the model cannot be loaded or explained at all.
    """
    if is_settled(config):
        key = artefact_key(config, file_format)
        found = find(cache, key, None)
        is_hopeless = not retry and cache.failure(key) is not None
        if found is None and not is_hopeless and cache.is_writable:
            with _running:
                _run(config, file_format, cache, retry=retry, report=report)
            found = find(cache, key, None)
        if found is not None:
            return found
    return obtain(config, file_format, lazy=lazy, cache=cache, retry=retry, report=report)


def _run(config: ModelConfig, file_format: Format, cache: ArtefactCache, *, retry: bool, report: Report) -> None:
    order = {
        "config": config.model_dump_json(),
        "format": file_format,
        "cache": os.fspath(cache.folder or ""),
        "retry": retry,
    }
    # -P: with -m alone, modules of the current folder would come before those that are installed.
    command = [sys.executable, "-P", "-m", __name__]
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True) as process,
    ):
        error = _follow(process, order, report)
        exit_code = process.wait()
        if exit_code != 0 and error is None:
            error = PassingError(f"the exporting process ended with {exit_code}")
        if isinstance(error, PassingError):
            messages.seek(max(0, messages.seek(0, os.SEEK_END) - _TAIL_BYTES))
            _log.error("model %s: %s: %s", config.name, error, messages.read().decode(errors="replace").strip())
        if error is not None:
            raise error


def _follow(process: "subprocess.Popen[str]", order: dict[str, Any], report: Report) -> Exception | None:
    """Give the order, pass on reports, and return the error that ended it, if any."""
    assert process.stdin is not None
    assert process.stdout is not None
    error = None
    try:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            said = json.loads(line)
            if "report" in said:
                report(said["report"])
            else:
                error = _ERRORS[said["error"]](said["message"])
    # It died, and its exit code says so.
    except BrokenPipeError:
        # Closing sends what is still buffered, and would fail again, in place of that exit code.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    except BaseException:
        process.kill()
        raise
    return error


def main() -> int:
    """Carry out the order on standard input; return the exit code."""
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    config = ModelConfig.model_validate_json(order["config"])

    def answer(**said: str) -> None:
        answers.write(json.dumps(said) + "\n")

    try:
        obtain(
            config,
            Format(order["format"]),
            lazy=LazyModel(config),
            cache=ArtefactCache(Path(order["cache"])),
            retry=order["retry"],
            report=lambda line: answer(report=line),
        )
    except tuple(_ERRORS.values()) as error:
        kind = next(kind for kind in ("passing", "export", "load") if isinstance(error, _ERRORS[kind]))
        answer(error=kind, message=str(error))
        return 1
    return 0


def _end_with(stream: IO[str]) -> None:
    """End this process when whoever holds the other end of a stream ends."""
    stream.read()
    os._exit(1)


if __name__ == "__main__":
    # Interpreters that hold half a library's threads take their time to end.
    code = main()
    sys.stderr.flush()
    os._exit(code)
