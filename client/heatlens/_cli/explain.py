"""`heatlens explain`: explain image files."""

import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer

from heatlens._calls.client import Client
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
from heatlens._cli.explaining import MAP_OPTIONS, ModelOption, chosen, takes
from heatlens._exceptions import HeatlensError
from heatlens._results.drawing import caption, draw_banner, flat_note
from heatlens._results.images import write_image
from heatlens._results.results import Result

# Files in flight: enough to give the server batches, few enough to keep memory and queues small.
_CONCURRENCY = 8
# What shells say of a command that Ctrl-C ended: 128 + SIGINT.
_INTERRUPTED = 130


@takes(*MAP_OPTIONS, "faithfulness", "mask", "reference", "min_score", "return_mask", after="model")
def explain(
    *,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Image files.")],
    server: ServerOption = DEFAULT_SERVER,
    model: ModelOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Write NAME-CLASS.png (overlay) and .npy (map) there; embeddings as NAME-embedding.npy.",
        ),
    ] = None,
    colormap: Annotated[str, typer.Option(help="An OpenCV colour map, for the overlays.")] = "jet",
    as_json: JsonOption = False,
    timeout: TimeoutOption = 30.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    **options: Any,  # noqa: ANN401 - the options of `takes`
) -> None:
    """Explain images: which pixels made the model say what it said.

    With --json, one object per image and line. Exits with 1 if an image failed; the others are still explained.
    """
    if output is not None:
        _check_names(images)
    elif options["return_mask"]:
        raise typer.BadParameter("give -o DIR, too", param_hint="--return-mask")
    failed = False
    with reporting():
        wanted = {"model": model, **chosen(options)}
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        with (
            Client(**client_options(server, tls=tls, ca=ca, timeout=timeout)) as client,
            _thread_pool(client) as pool,
        ):
            for path, answer in _answers(pool, client, images, wanted):
                try:
                    result = answer.result()
                    files = _NO_FILES if output is None else _write(result, path, output, colormap)
                except (HeatlensError, OSError) as error:
                    text = describe(error)
                    warn(f"error: {text}" if str(path) in text else f"error: {path}: {text}")
                    failed = True
                    continue
                for warning in result.warnings:
                    warn(f"warning: {path}: {warning}")
                lines = [json.dumps(_as_dict(result, path, files))] if as_json else _as_text(result, path, files)
                typer.echo("\n".join(lines))
    if failed:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Files:
    """What was written for one image: an overlay and a map per explanation, and what else its task has."""

    overlays: tuple[Path, ...] = ()
    maps: tuple[Path, ...] = ()
    mask: Path | None = None
    embedding: Path | None = None


_NO_FILES = _Files()


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


def _write(result: Result, image: Path, folder: Path, colormap: str) -> _Files:
    overlays, maps = [], []
    seen: Counter[int] = Counter()
    for explanation in result.explanations:
        # Detections may be several of one class.
        seen[explanation.class_id] += 1
        number = seen[explanation.class_id]
        name = f"{image.stem}-{explanation.class_id}" + (f"-{number}" if number > 1 else "")
        overlays.append(folder / f"{name}.png")
        maps.append(folder / f"{name}.npy")
        picture = explanation.heatmap.overlay(image, colormap=colormap)
        if explanation.heatmap.is_flat:
            draw_banner(picture, [caption(explanation)])
        write_image(overlays[-1], picture)
        explanation.heatmap.save(maps[-1])
    mask = embedding = None
    if result.predicted_mask is not None:
        mask = folder / f"{image.stem}-mask.png"
        mask.write_bytes(cv2.imencode(".png", result.predicted_mask)[1].tobytes())
    if result.embedding is not None:
        embedding = folder / f"{image.stem}-embedding.npy"
        np.save(embedding, result.embedding, allow_pickle=False)
    return _Files(overlays=tuple(overlays), maps=tuple(maps), mask=mask, embedding=embedding)


def _as_dict(result: Result, image: Path, files: _Files) -> dict[str, Any]:
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
            "scale": item.heatmap.scale,
            "offset": item.heatmap.offset,
            "flat": item.heatmap.is_flat,
        }
        if item.area:
            explanation["area"] = item.area
        if item.box is not None:
            explanation["box"] = asdict(item.box)
        if item.faithfulness is not None:
            explanation["faithfulness"] = item.faithfulness.by_metric()
        if files.maps:
            explanation |= {"overlay": str(files.overlays[index]), "map": str(files.maps[index])}
        explanations.append(explanation)
    whole = {"predicted_mask": files.mask, "embedding": files.embedding}
    return {
        "image": str(image),
        "model": result.model,
        "model_version": result.model_version,
        "source_region": asdict(result.source_region),
        "source_size": result.source_size,
        "explanations": explanations,
        "timing": asdict(result.timing),
        "warnings": result.warnings,
        **{name: str(path) for name, path in whole.items() if path is not None},
    }


def _as_text(result: Result, image: Path, files: _Files) -> list[str]:
    lines = [f"{image}: {result.model}"]
    for index, item in enumerate(result.explanations):
        parts = [f"  {item.class_id:>5}  {item.probability:>6.1%}  {item.label or '-'}"]
        if item.box is not None:
            parts.append("at {left:.0f},{top:.0f} to {right:.0f},{bottom:.0f}".format(**asdict(item.box)))
        if note := flat_note(item.heatmap):
            parts.append(note)
        if item.area:
            parts.append(f"on {item.area:.1%} of the image")
        if item.faithfulness is not None:
            parts += [f"{metric} {value:.3f}" for metric, value in item.faithfulness.by_metric().items()]
        if files.overlays:
            parts.append(str(files.overlays[index]))
        lines.append("  ".join(parts))
    return lines + [f"  {path}" for path in (files.mask, files.embedding) if path is not None]
