"""`python -m bench`: every ratio, on this machine, in this run."""

import os
import platform
from typing import Annotated

import typer
from rich.console import Console

from heatlens_server.allocator import keep_freed_memory


def main(
    turns: Annotated[int, typer.Option(help="How often each candidate runs; medians are printed.")] = 7,
    seconds: Annotated[float, typer.Option(help="How long each load lasts, in seconds.")] = 4.0,
    only: Annotated[
        str,
        typer.Option(
            help="wire, engine, files, decode, served, stream, v2, batch, watched, instances or ray; empty: not ray."
        ),
    ] = "",
    images: Annotated[int, typer.Option(help="How many images a batch has.")] = 20_000,
) -> None:
    """Print speed ratios measured in one run on this machine."""
    # What the server does at its start, before torch is imported. Every candidate in this process profits from it,
    # the baselines too.
    keep_freed_memory()
    import torch  # noqa: PLC0415 - after malloc is told

    from bench import (  # noqa: PLC0415 - after malloc is told
        batch,
        decode,
        engine,
        files,
        instances,
        served,
        stream,
        v2,
        watched,
        wire,
    )
    from bench.models import photo_paths  # noqa: PLC0415 - after malloc is told

    console = Console(width=None if os.isatty(1) else 120)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    if only in {"", "wire"}:
        console.print(wire.run(photo_paths()[-1]))
    if only in {"", "engine"}:
        for table in engine.run(turns=turns):
            console.print(table)
    if only in {"", "files"}:
        for table in files.run(turns=turns):
            console.print(table)
    if only in {"", "decode"}:
        console.print(decode.run())
    if only in {"", "served", "stream", "v2"}:
        with served.serve() as service:
            if only in {"", "served"}:
                for table in served.run(service, turns=max(3, turns // 2), seconds=seconds):
                    console.print(table)
            if only in {"", "stream"}:
                for table in stream.run(service, turns=turns, seconds=seconds):
                    console.print(table)
            if only in {"", "v2"}:
                console.print(v2.run(service, turns=turns, seconds=seconds))
    if only in {"", "batch"}:
        console.print(batch.run(turns=max(1, turns // 3), images=images))
    if only in {"", "watched"}:
        console.print(watched.run(turns=turns, seconds=seconds))
    if only in {"", "instances"}:
        for table in instances.run(turns=turns, seconds=seconds):
            console.print(table)
    if only == "ray":
        from bench import on_ray  # noqa: PLC0415 - an extra

        for table in on_ray.run(turns=turns, seconds=seconds):
            console.print(table)


typer.run(main)
