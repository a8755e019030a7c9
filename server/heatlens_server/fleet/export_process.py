"""A model's export: from the cache, or made in a process of its own, `python -m heatlens_server.fleet.export_process`.

An export takes gigabytes that a process would keep, and the interpreter's lock for a minute. The server starts this
process, which leaves the export in the cache and ends. Standard input holds the order as one line of JSON and then
stays open: its end means that the server has ended. Standard output has one JSON object per line.
"""

import contextlib
import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from heatlens_server.backends.onnx.export_cache import ExportCache
from heatlens_server.config import ModelConfig
from heatlens_server.core.causes import with_causes
from heatlens_server.core.errors import ExportError, ModelLoadError
from heatlens_server.core.graph_spec import Format
from heatlens_server.fleet.cache_key import export_key, is_settled
from heatlens_server.fleet.export import (
    Export,
    NotWrittenError,
    Report,
    TransientError,
    check_failure,
    importing_torch,
    make_export,
)
from heatlens_server.fleet.torch_record import read_record
from heatlens_server.telemetry.logs import configure_logging

if TYPE_CHECKING:
    from heatlens_server.backends.torch.sources.loaded_model import LoadedModel

_log = logging.getLogger(__name__)

Make = Callable[..., str]
"""As `make_export`."""

_TAIL_BYTES = 2000
# The narrowest first.
_ERRORS: dict[str, type[Exception]] = {
    "not-written": NotWrittenError,
    "transient": TransientError,
    "export": ExportError,
    "load": ModelLoadError,
}

# One at a time: each takes gigabytes and as many cores as there are.
_running = threading.Lock()


def get_or_export(
    config: ModelConfig,
    file_format: Format,
    *,
    load: "Callable[[], LoadedModel]",
    cache: ExportCache,
    retry: bool,
    report: Report,
    make: Make | None = None,
) -> Export:
    """Return a model's export: the cached one if it is whole and still right, else a new one.

    Args:
        config: the model.
        file_format: ONNX or TORCHSCRIPT.
        load: gives the loaded model, if its key or its export's check needs it.
        cache: where exports are kept.
        retry: try again what failed at an earlier start.
        report: told each phase of an export.
        make: makes it; None for `export_in_process`.

    Raises:
        ExportError: the model cannot be exported, its export is wrong, or the other process died.
        ModelLoadError: the model cannot be loaded or explained at all.
    """
    model = None if is_settled(config) else load()
    key = export_key(config, file_format, model)
    found = _find(cache, key, model)
    if found is not None:
        return found
    if not retry:
        check_failure(cache, key)
    cache = cache.writable()
    with _running:
        # Of a network that is never twice the same, the key is another.
        run = functools.partial(make or export_in_process, config, file_format, retry=retry, report=report)
        try:
            key = run(cache=cache)
        except NotWrittenError as error:
            # A full disk, mostly: there may be room elsewhere.
            cache = cache.temporary(str(error))
            key = run(cache=cache)
    found = _find(cache, key, None)
    if found is None:
        raise TransientError("the export was damaged or removed as soon as it was made")
    return replace(found, was_cached=False)


def is_missing(config: ModelConfig, file_format: Format, cache: ExportCache, load: "Callable[[], LoadedModel]") -> bool:
    """Whether the cache holds neither a model's export nor why there is none.

    Raises:
        ModelLoadError: the model has to be loaded to be known, and cannot be.
    """
    key = export_key(config, file_format, None if is_settled(config) else load())
    return cache.find(key) is None and cache.failure(key) is None


def export_in_process(
    config: ModelConfig, file_format: Format, *, cache: ExportCache, retry: bool, report: Report, niceness: int = 0
) -> str:
    """Do what `make_export` does, in a process of its own, of so much lower priority than this one.

    Raises:
        ExportError, ModelLoadError: as `make_export`; TransientError also if the process died.
    """
    order = {
        "config": config.model_dump_json(),
        "format": file_format,
        "cache": os.fspath(cache.folder or ""),
        "retry": retry,
        "niceness": niceness,
        # Code of the operator's is to be found there as it is here.
        "path": sys.path if config.source.startswith("python:") else [],
    }
    # -P: with -m alone, modules of the current folder would come before those that are installed.
    command = [sys.executable, "-P", "-m", __name__]
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True) as process,
    ):
        ended = _follow(process, order, report)
        exit_code = process.wait()
        if ended is None:
            ended = TransientError(f"the exporting process ended with {exit_code}")
        if isinstance(ended, TransientError):
            messages.seek(max(0, messages.seek(0, os.SEEK_END) - _TAIL_BYTES))
            _log.error("model %s: %s: %s", config.name, ended, messages.read().decode(errors="replace").strip())
        if isinstance(ended, Exception):
            raise ended
        return ended


def _find(cache: ExportCache, key: str, model: "LoadedModel | None") -> Export | None:
    """Return a cached export; None if there is none that is whole and still says what the model, if given, says."""
    found = cache.find(key)
    if found is None:
        return None
    export = Export(*found)
    if model is None or _is_of(export, model):
        return export
    _log.warning("the cached export %s is not of the model %s as it is now: it is removed", key, model.name)
    cache.remove(key)
    return None


def _is_of(export: Export, model: "LoadedModel") -> bool:
    """Whether a network answers noise as it did when it was exported."""
    with importing_torch():
        from heatlens_server.backends.torch.engine import TorchEngine  # noqa: PLC0415 - imports torch

    record = read_record(export.folder, export.manifest)
    reference = TorchEngine(model, device="cpu")
    try:
        return record is not None and record.agrees(reference)
    # What cannot be run is as wrong as what runs wrongly.
    except Exception:
        _log.exception("model %s: its cached export cannot be compared with it", model.name)
        return False
    finally:
        reference.close()


def _follow(process: "subprocess.Popen[str]", order: dict[str, Any], report: Report) -> str | Exception | None:
    """Give the order and pass on reports; the key, the error that ended it, or None if it died without a word."""
    assert process.stdin is not None
    assert process.stdout is not None
    ended: str | Exception | None = None
    try:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            said = json.loads(line)
            if "report" in said:
                report(said["report"])
            elif "key" in said:
                ended = str(said["key"])
            else:
                ended = _ERRORS[said["error"]](said["message"])
                for note in said["notes"]:
                    ended.add_note(note)
    # It died, and its exit code says so.
    except BrokenPipeError:
        # Closing sends what is still buffered, and would fail again, in place of that exit code.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    except BaseException:
        process.kill()
        raise
    return ended


def main() -> int:
    """Carry out the order on standard input; return the exit code."""
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    configure_logging(log_format="console", level="warning")
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    sys.path[:] = order["path"] or sys.path
    os.nice(order["niceness"])

    def answer(**said: str | list[str]) -> None:
        answers.write(json.dumps(said) + "\n")

    try:
        key = make_export(
            ModelConfig.model_validate_json(order["config"]),
            Format(order["format"]),
            cache=ExportCache(Path(order["cache"])),
            retry=order["retry"],
            report=lambda line: answer(report=line),
        )
    except tuple(_ERRORS.values()) as error:
        kind = next(kind for kind, known in _ERRORS.items() if isinstance(error, known))
        # Causes do not pass from process to process: as notes they reach the log, and no client.
        told = with_causes(error).removeprefix(str(error)).removeprefix("; ")
        answer(error=kind, message=str(error), notes=[told] if told else [])
        return 1
    answer(key=key)
    return 0


def _end_with(stream: IO[str]) -> None:
    """End this process when the process at the other end of a stream ends."""
    stream.read()
    os._exit(1)


if __name__ == "__main__":
    # Interpreters that hold half a library's threads take their time to end.
    code = main()
    sys.stderr.flush()
    os._exit(code)
