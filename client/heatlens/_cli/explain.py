"""`heatlens explain`: explain images."""

import errno
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from heatlens._calls.client import Client
from heatlens._cli.answer_files import AnswerFolder
from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    CertOption,
    JsonOption,
    KeyOption,
    ServerOption,
    TimeoutOption,
    TlsOption,
    client_options,
    describe,
    fail,
    reporting,
    warn,
)
from heatlens._cli.explaining import IMAGE_OPTIONS, MAP_OPTIONS, ModelOption, VersionOption, chosen, takes
from heatlens._cli.interrupt import INTERRUPTED, TERMINATED, Interrupts, Terminated
from heatlens._exceptions import HeatlensError
from heatlens._results.answer_json import NO_FILES, AnswerFiles, answer_json
from heatlens._results.drawing import flat_note
from heatlens._results.overlay import color_table
from heatlens._results.results import ClassScore, Explanation, Result
from heatlens._video.inputs import SERVER_SUFFIXES, images_of

# Images in flight: enough to give the server batches, few enough to keep memory and queues small.
_CONCURRENCY = 8
# How often a wait looks whether an answer has come.
_LOOK_S = 0.005
_STDIN = "-"
# An image; an error in place of one that is not there.
_Image = Path | bytes | OSError


@takes(*MAP_OPTIONS, *IMAGE_OPTIONS, after="model")
def explain(
    *,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Image files, folders, quoted globs; - is standard input.")
    ],
    server: ServerOption = DEFAULT_SERVER,
    model: ModelOption = None,
    model_version: VersionOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Write NAME-CLASS.png (overlay) and .npy (map) there, NAME-all.png (all detections), NAME-mask.png, "
            "NAME-embedding.npy.",
        ),
    ] = None,
    colormap: Annotated[str, typer.Option(help="An OpenCV colour map, for the overlays.")] = "jet",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Opacity of the map, in the overlays.")] = 0.5,
    as_json: JsonOption = False,
    timeout: TimeoutOption = 30.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    **options: Any,  # noqa: ANN401 - the options of `takes`
) -> None:
    """Explain images: which pixels made the model say what it said.

    With --json, one object per image and line. Exits with 1 if an image failed; the others are still explained.
    """
    if output is None and options["return_mask"]:
        raise typer.BadParameter("give -o DIR, too", param_hint="--return-mask")
    failed = False
    with reporting():
        named = [one for text in images for one in _named(text)]
        folder = None if output is None else _folder(output, named, colormap, alpha)
        wanted = {"model": model, "version": model_version, **chosen(options)}
        with (
            Client(**client_options(server, tls=tls, ca=ca, cert=cert, key=key, timeout=timeout)) as client,
            Interrupts() as interrupts,
            _thread_pool(client) as pool,
        ):
            for name, image, answer in _answers(pool, client, named, wanted, interrupts):
                try:
                    result = answer.result()
                    assert not isinstance(image, OSError)
                    files = NO_FILES if folder is None else folder.write(result, image, _stem(name))
                except (HeatlensError, OSError) as error:
                    text = describe(error)
                    warn(f"error: {text}" if name in text else f"error: {name}: {text}")
                    failed = True
                    continue
                for warning in result.warnings:
                    warn(f"warning: {name}: {warning}")
                lines = (
                    [json.dumps(answer_json(result, path=name, files=files))]
                    if as_json
                    else _as_text(result, name, files)
                )
                typer.echo("\n".join(lines))
    if failed:
        raise typer.Exit(1)


def _named(text: str) -> list[tuple[str, _Image]]:
    """Return the images that an argument stands for, each with the name that the user knows it by."""
    if text == _STDIN:
        return [(_STDIN, typer.get_binary_stream("stdin").read())]
    try:
        paths = images_of(text, suffixes=SERVER_SUFFIXES)
    except OSError as error:
        return [(text, error)]
    if paths is None:
        return [(text, Path(text))]
    return [(str(path), path) for path in paths] or [(text, FileNotFoundError(errno.ENOENT, "no images there", text))]


def _stem(name: str) -> str:
    """Return what the names of an image's files begin with."""
    return "stdin" if name == _STDIN else Path(name).stem


def _folder(path: Path, named: list[tuple[str, _Image]], colormap: str, alpha: float) -> AnswerFolder:
    """Return the folder to write to, made if need be, after a look at what would be wrong only after the calls.

    Raises:
        InvalidArgumentError: there is no such colour map.
        OSError: the folder cannot be made.
    """
    seen: dict[str, str] = {}
    for name, _ in named:
        if seen.setdefault(_stem(name), name) != name:
            fail(f"{seen[_stem(name)]} and {name} would be written to the same files: give them different names")
    color_table(colormap)
    path.mkdir(parents=True, exist_ok=True)
    return AnswerFolder(path, colormap=colormap, alpha=alpha)


@contextmanager
def _thread_pool(client: Client) -> Iterator[ThreadPoolExecutor]:
    """Threads for calls. Interrupted, or on any other exception, the open calls are cancelled, not waited for."""
    pool = ThreadPoolExecutor(_CONCURRENCY)
    try:
        yield pool
    except Terminated:
        raise typer.Exit(TERMINATED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    finally:
        # The client first: a thread whose call is still open would hold up this process until the call's timeout.
        client.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _answers(
    pool: ThreadPoolExecutor,
    client: Client,
    named: list[tuple[str, _Image]],
    options: dict[str, Any],
    interrupts: Interrupts,
) -> Iterator[tuple[str, _Image, Future[Result]]]:
    """Yield every image with its name and answer, in order, while the next ones are under way.

    A signal that comes just when a lock is taken would leave it taken for ever, so it is held back then.
    """

    def explain(image: _Image) -> Result:
        if isinstance(image, OSError):
            raise image
        return client.explain(image, **options)

    rest = ((name, image, pool.submit(explain, image)) for name, image in named)
    with interrupts.held_back():
        pending = list(islice(rest, _CONCURRENCY))
    while pending:
        while True:
            with interrupts.held_back():
                if pending[0][2].done():
                    break
            time.sleep(_LOOK_S)
        yield pending.pop(0)
        with interrupts.held_back():
            pending += islice(rest, 1)


def _as_text(result: Result, name: str, files: AnswerFiles) -> list[str]:
    lines = [f"{name}: {result.model}"]
    for index, item in enumerate(result.explanations):
        parts = [_score_text(item)]
        if item.box is not None:
            parts.append(f"at {item.box.left:.0f},{item.box.top:.0f} to {item.box.right:.0f},{item.box.bottom:.0f}")
        if note := flat_note(item):
            parts.append(note)
        if item.area:
            parts.append(f"on {item.area:.1%} of the image")
        if item.faithfulness is not None:
            parts += [f"{metric} {value:.3f}" for metric, value in item.faithfulness.by_metric().items()]
        if files.explanations:
            written = files.explanations[index]
            parts += [str(path) for path in (written.overlay, written.predicted_mask) if path is not None]
        lines.append("  ".join(parts))
    if not result.explanations:
        lines.append("  nothing found")
    if result.predictions:
        title = "most probable" if result.predictions[0].value is None else "values"
        lines += [f"  {title}:", *(_score_text(item) for item in result.predictions)]
    whole = files.overlay, files.predicted_mask, files.embedding
    return lines + [f"  {path}" for path in whole if path is not None]


def _score_text(item: Explanation | ClassScore) -> str:
    score = f"{item.probability:>6.1%}" if item.value is None else f"{item.value:>6.4g}"
    return f"  {item.class_id:>5}  {score}  {item.label or '-'}"
