"""`python -m bench.coverage`: export every network of the list, each in a process of its own, and write the table."""

import datetime
import json
import multiprocessing
import os
import platform
import warnings
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.coverage.measure import measure
from bench.coverage.models import names
from bench.coverage.table import render

PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")


def main(
    results: Annotated[
        Path, typer.Option(help="Where results are kept; networks that are in it are not run again.")
    ] = (Path("out/coverage.jsonl")),
    output: Annotated[Path, typer.Option(help="The table.")] = Path("docs/export-coverage.md"),
    timeout_s: Annotated[float, typer.Option(help="Longest time for one network, in seconds.")] = 1800.0,
    only: Annotated[str, typer.Option(help="Run networks whose name contains this.")] = "",
    table_only: Annotated[bool, typer.Option(help="Run nothing, write the table.")] = False,
) -> None:
    """Export every network of the list to ONNX, judge the maps in float64, and write the table."""
    console = Console(stderr=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    known = read(results)
    for source in [] if table_only else names():
        if source in known or only not in source:
            continue
        known[source] = measured(source, timeout_s)
        with results.open("a") as file:
            file.write(json.dumps(known[source]) + "\n")
        console.print(f"{len(known)} {source} {known[source].get('reason', 'exported')}", soft_wrap=True)
    versions = {package: version(package) for package in PACKAGES}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    order = [source for source in names() if source in known]
    today = datetime.date.today()  # noqa: DTZ011 - the reader's date
    output.write_text(render([known[source] for source in order], len(names()), versions, machine, today))
    console.print(f"wrote {output}")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Results by source, the last of each."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["source"]: result for result in map(json.loads, lines)}


def measured(source: str, timeout_s: float, measure: Callable[[str], dict[str, Any]] = measure) -> dict[str, Any]:
    """Measure one network in a process of its own: memory comes back, and a crash is a result.

    Forked, so that importing torch is paid for once; this process never runs anything with it.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_into, args=(sender, source, measure))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout_s):
            return {"source": source, "reason": f"not finished after {timeout_s:.0f} s"}
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        return {"source": source, "reason": f"the process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return result


def _measure_into(sender: Connection, source: str, measure: Callable[[str], dict[str, Any]]) -> None:
    warnings.simplefilter("ignore")
    sender.send(measure(source))


if __name__ == "__main__":
    typer.run(main)
