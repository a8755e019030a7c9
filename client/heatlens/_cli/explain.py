"""`heatlens explain`: explain image files."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    JsonOption,
    ServerOption,
    TimeoutOption,
    TlsOption,
    client_options,
    describe,
    fail,
    reporting,
    warn,
)
from heatlens._client import Client
from heatlens._exceptions import HeatlensError
from heatlens._results import Result

# Files in flight: enough to give the server batches, few enough to keep memory and queues small.
_CONCURRENCY = 8
# What shells say of a command that Ctrl-C ended: 128 + SIGINT.
_INTERRUPTED = 130


def explain(
    *,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="JPEG, PNG or WebP files.")],
    server: ServerOption = DEFAULT_SERVER,
    model: Annotated[str | None, typer.Option(show_default="the server's", help="A served model.")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Explain the N most probable classes.")] = None,
    class_ids: Annotated[
        list[int] | None, typer.Option("--class", metavar="ID", help="Explain this class. Repeatable.")
    ] = None,
    method: Annotated[str | None, typer.Option(show_default="the model's", help="grad-cam, layer-cam, ...")] = None,
    layers: Annotated[
        list[str] | None, typer.Option("--layer", metavar="NAME", help="Explain this layer. Repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Write NAME-CLASS.png (overlay) and .npy (map) there."),
    ] = None,
    colormap: Annotated[str, typer.Option(help="An OpenCV colour map, for the overlays.")] = "jet",
    as_json: JsonOption = False,
    timeout: TimeoutOption = 30.0,
    tls: TlsOption = False,
    ca: CaOption = None,
) -> None:
    """Explain images: which pixels made the model say what it said.

    With --json, one object per image and line. Exits with 1 if an image failed; the others are still explained.
    """
    if output is not None:
        _check_names(images)
    options = {
        "model": model,
        "top_k": top_k,
        "class_ids": class_ids or None,
        "method": method,
        "layers": layers or None,
    }
    failed = False
    with reporting():
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        with (
            Client(**client_options(server, tls=tls, ca=ca, timeout=timeout)) as client,
            _thread_pool(client) as pool,
        ):
            for path, answer in _answers(pool, client, images, options):
                try:
                    result = answer.result()
                    files = [] if output is None else _write(result, path, output, colormap)
                except (HeatlensError, OSError) as error:
                    text = describe(error)
                    warn(f"error: {text}" if str(path) in text else f"error: {path}: {text}")
                    failed = True
                    continue
                lines = [json.dumps(_as_dict(result, path, files))] if as_json else _as_text(result, path, files)
                typer.echo("\n".join(lines))
    if failed:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Files:
    """What was written for one explanation."""

    overlay: Path
    map: Path


def _check_names(images: list[Path]) -> None:
    seen: dict[str, Path] = {}
    for image in images:
        if seen.setdefault(image.stem, image) != image:
            fail(f"{seen[image.stem]} and {image} would be written to the same files: give them different names")


@contextmanager
def _thread_pool(client: Client) -> Iterator[ThreadPoolExecutor]:
    """Threads for calls. Interrupted, or on any other exception, the open calls are cancelled, not waited for."""
    pool = ThreadPoolExecutor(_CONCURRENCY)
    try:
        yield pool
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    finally:
        # The client first: a thread whose call is still open would hold up this process until the call's timeout.
        client.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _answers(
    pool: ThreadPoolExecutor, client: Client, images: list[Path], options: dict[str, Any]
) -> Iterator[tuple[Path, Future[Result]]]:
    """Yield every image's answer, in order, while the next ones are under way."""
    rest = iter(images)
    pending = [(path, pool.submit(client.explain, path, **options)) for path in islice(rest, _CONCURRENCY)]
    while pending:
        path, answer = pending.pop(0)
        yield path, answer
        pending += [(path, pool.submit(client.explain, path, **options)) for path in islice(rest, 1)]


def _write(result: Result, image: Path, folder: Path, colormap: str) -> list[_Files]:
    files = []
    for explanation in result.explanations:
        name = f"{image.stem}-{explanation.class_id}"
        pair = _Files(overlay=folder / f"{name}.png", map=folder / f"{name}.npy")
        explanation.heatmap.save(pair.overlay, image, colormap=colormap)
        explanation.heatmap.save(pair.map)
        files.append(pair)
    return files


def _as_dict(result: Result, image: Path, files: list[_Files]) -> dict[str, Any]:
    explanations = []
    for index, item in enumerate(result.explanations):
        height, width = item.heatmap.values.shape
        explanation = {
            "class_id": item.class_id,
            "label": item.label,
            "logit": item.logit,
            "probability": item.probability,
            "map_height": height,
            "map_width": width,
        }
        if files:
            explanation |= {"overlay": str(files[index].overlay), "map": str(files[index].map)}
        explanations.append(explanation)
    return {
        "image": str(image),
        "model": result.model,
        "model_version": result.model_version,
        "source_region": asdict(result.source_region),
        "source_size": result.source_size,
        "explanations": explanations,
        "timing": asdict(result.timing),
    }


def _as_text(result: Result, image: Path, files: list[_Files]) -> list[str]:
    lines = [f"{image}: {result.model}"]
    for index, item in enumerate(result.explanations):
        written = f"  {files[index].overlay}" if files else ""
        lines.append(f"  {item.class_id:>5}  {item.probability:>6.1%}  {item.label or '-'}{written}")
    return lines
