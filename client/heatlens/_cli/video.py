"""`heatlens video`: explain a film or a camera, frame by frame."""

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice, takewhile
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.progress import TimeElapsedColumn

from heatlens._calls.client import Client
from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    CertOption,
    KeyOption,
    Overflow,
    ServerOption,
    TlsOption,
    client_options,
    describe,
    fail,
    progress,
    reporting,
    warn,
)
from heatlens._cli.explaining import MAP_OPTIONS, ModelOption, VersionOption, chosen, takes
from heatlens._cli.interrupt import INTERRUPTED, TERMINATED, Interrupts, Terminated
from heatlens._exceptions import HeatlensError, InvalidArgumentError
from heatlens._results.overlay import color_table
from heatlens._stream.stream import Stream
from heatlens._video.feed import answers
from heatlens._video.inputs import files_of, images_of, is_url, open_source
from heatlens._video.record import JsonLines, Record, Status
from heatlens._video.source import Source, VideoFrame

_STDOUT = Path("-")
_FILM_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")
_DEFAULT_QUALITY = 90


@takes(*MAP_OPTIONS, after="model")
def video(
    *,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT", help="A video file, a folder or glob of images, a URL (RTSP, HTTP) or a camera's number."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="The film to write: .mp4, .m4v, .mov or .mkv. Odd sides get one pixel more: H.264 has even ones.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write one JSON object per frame there; - is stdout.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    model: ModelOption = None,
    model_version: VersionOption = None,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Explain the first of every N frames.")] = 1,
    max_fps: Annotated[
        float | None, typer.Option(metavar="F", help="Explain at most F frames per second of film.")
    ] = None,
    smooth: Annotated[
        float, typer.Option(metavar="W", help="Smooth maps over time: the weight of the past, 0 to below 1.")
    ] = 0.0,
    max_in_flight: Annotated[
        int | None, typer.Option(metavar="N", min=1, show_default="the server's", help="Most unanswered frames.")
    ] = None,
    overflow: Annotated[
        Overflow | None,
        typer.Option(
            show_default="block; live: drop-oldest", help="Frames too many: wait for the server, or drop the oldest."
        ),
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, show_default=f"{_DEFAULT_QUALITY}", help="Of the JPEGs that are sent.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send pixels, not JPEGs: exact, and many more bytes.")] = False,
    fps: Annotated[
        float | None,
        typer.Option(
            metavar="F", show_default="the input's, or 25", help="Frames per second, whatever the input says."
        ),
    ] = None,
    max_frames: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after N frames.")] = None,
    duration: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Stop after this time, on the film's clock.")
    ] = None,
    colormap: Annotated[str, typer.Option(help="An OpenCV colour map.")] = "jet",
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Opacity of the map.")] = 0.5,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="Time for one frame to be run, for a URL to open, and for a camera to give its next frame.",
        ),
    ] = 30.0,
    reconnect_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="How long a camera that drops out is opened again; 0: not at all."),
    ] = 60.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    **options: Any,  # noqa: ANN401 - the options of `takes`
) -> None:
    """Explain a film while it plays: every frame with its map over it, and which class it is for.

    Of several classes, the first one's map is drawn; of detections every box and map. Frames left out or dropped show
    the map before them. Ctrl-C and SIGTERM leave a playable film. A camera that drops out is opened again. Of several
    servers, another one goes on where one drains or dies. Exits with 1 if a frame failed, the input broke off or a
    camera did not come back.
    """
    if output is None and json_file is None:
        raise typer.BadParameter("give -o FILE, --json FILE or both")
    if raw and quality is not None:
        raise typer.BadParameter("give --quality or --raw, not both")
    if not math.isfinite(reconnect_timeout):
        raise typer.BadParameter("must be finite", param_hint="--reconnect-timeout")
    for option, value in (("--max-fps", max_fps), ("--duration", duration)):
        # nan compares false with everything.
        if not (value is None or 0 < value < math.inf):
            raise typer.BadParameter("must be positive and finite", param_hint=option)
    if not (fps is None or 0.01 <= fps <= 1000):
        raise typer.BadParameter("must be from 0.01 to 1000", param_hint="--fps")
    stream: dict[str, Any] = {
        "model": model,
        "version": model_version,
        **chosen(options),
        "every": every,
        "max_fps": max_fps,
        "smooth": smooth,
        "max_in_flight": max_in_flight,
        "frame_timeout": timeout,
        "jpeg_quality": None if raw else quality or _DEFAULT_QUALITY,
    }
    unreadable: list[Path] = []
    try:
        with reporting(), Interrupts() as interrupts, ExitStack() as stack:
            with _usage():
                _check_files(source, output, json_file)
                color_table(colormap)
                connection = client_options(server, tls=tls, ca=ca, cert=cert, key=key, timeout=timeout)
                stream["resume"] = _may_be_several(connection["address"])
                client = stack.enter_context(Client(**connection))
                opened = open_source(
                    source,
                    fps=fps,
                    timeout_s=timeout,
                    reconnect_timeout_s=reconnect_timeout,
                    on_unreadable=unreadable.append,
                    tell=warn,
                )
                stack.enter_context(closing(opened))
                stream["overflow"] = (overflow or (Overflow.DROP_OLDEST if opened.live else Overflow.BLOCK)).value
                answering = client.stream(**stream)
            lines = None if json_file is None else JsonLines(None if json_file == _STDOUT else json_file)
            record = Record(opened, film=output, lines=lines, colormap=colormap, alpha=alpha)
            frames = _limited(opened, max_frames, duration)
            start_s = time.monotonic()
            try:
                with _progress(_total(opened, max_frames, duration)) as advance:
                    _explain(answering, frames, record, interrupts=interrupts, on_answer=advance)
            finally:
                with interrupts.held_back():
                    record.close()
                    if lines is not None:
                        lines.close()
                        # Like other commands in a pipe whose reader has seen enough.
                        if lines.reader_left:
                            raise typer.Exit(1)
                    _print_summary(record, opened, output, time.monotonic() - start_s, err=json_file == _STDOUT)
                    _warn_of_missing(opened, unreadable)
    except Terminated:
        raise typer.Exit(TERMINATED) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    if record.counts[Status.FAILED] or unreadable or opened.missing:
        raise typer.Exit(1)


def _may_be_several(address: str | list[str]) -> bool:
    """Whether an address may stand for several servers."""
    return not isinstance(address, str) or address.startswith(("dns:", "ipv4:", "ipv6:"))


@contextmanager
def _usage() -> Iterator[None]:
    """Exit with 2, as for any wrong option, when what is raised says that one is."""
    try:
        yield
    except InvalidArgumentError as error:
        _refuse(describe(error))


def _refuse(message: str) -> NoReturn:
    fail(message, exit_code=2)


def _check_files(source: str, output: Path | None, json_file: Path | None) -> None:
    """Refuse to write over the input or to where nothing can be written, before anything is read.

    Raises:
        InvalidArgumentError: INPUT is empty.
        OSError: INPUT cannot be looked at.
    """
    inputs = files_of(source)
    named = [("-o", output)]
    if json_file != _STDOUT:
        named.append(("--json", json_file))
    for option, path in named:
        if path is None:
            continue
        if not path.parent.is_dir():
            _refuse(f"{option} {path}: there is no folder {path.parent}")
        if path.is_dir():
            _refuse(f"{option} {path}: is a folder")
        if path.exists() and any(entry.exists() and path.samefile(entry) for entry in inputs):
            _refuse(f"{option} {path}: is the input" if len(inputs) == 1 else f"{option} {path}: is one of the inputs")
    if output is not None and output.suffix.lower() not in _FILM_SUFFIXES:
        _refuse(f"-o {output}: expected a name that ends in {', '.join(_FILM_SUFFIXES)}")
    if output is not None and json_file is not None and json_file != _STDOUT and _same_file(output, json_file):
        _refuse(f"--json {json_file}: is the film")
    if (output is not None or is_url(source) or images_of(source) is None) and importlib.util.find_spec("av") is None:
        _refuse("videos need PyAV: pip install 'heatlens[video]'")


def _same_file(path: Path, other: Path) -> bool:
    """Return whether two names stand for one file, which need not exist yet."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


def _limited(source: Source, max_frames: int | None, duration_s: float | None) -> Iterator[VideoFrame]:
    frames = islice(source, max_frames)
    return frames if duration_s is None else takewhile(lambda frame: frame.time_s < duration_s, frames)


def _total(source: Source, max_frames: int | None, duration_s: float | None) -> int | None:
    """Return how many frames there will be at most; None if that is unknown."""
    limits = [source.total, max_frames, None if duration_s is None else math.ceil(duration_s * source.fps)]
    return min((limit for limit in limits if limit is not None), default=None)


def _explain(
    answering: Stream,
    frames: Iterator[VideoFrame],
    record: Record,
    *,
    interrupts: Interrupts,
    on_answer: Callable[[Record], None],
) -> None:
    """Stream the frames and keep the answers. If the stream breaks, say how far it came, and exit.

    What the server warns of is said once, not at every frame.
    """
    told: set[str] = set()
    try:
        with answering as stream, closing(answers(stream, frames)) as answered:
            for frame, answer in answered:
                with interrupts.held_back():
                    record.add(frame, answer)
                warnings = set() if answer.result is None else set(answer.result.warnings) - told
                for warning in sorted(warnings):
                    warn(f"warning: frame {frame.frame_id}: {warning}")
                told |= warnings
                on_answer(record)
    except HeatlensError as error:
        if error.last_frame_id is None:
            raise
        fail(f"{describe(error)}; the last frame answered was {error.last_frame_id}")


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[Record], None]]:
    """Show progress; yields what to call after each frame."""
    start_s = time.monotonic()
    columns = "{task.completed} frames", "{task.fields[rate]:.1f}/s", "{task.fields[lost]}", TimeElapsedColumn()
    with progress("explaining", *columns, total=total, rate=0.0, lost="") as update:

        def advance(record: Record) -> None:
            rate = record.frames / max(time.monotonic() - start_s, 1e-9)
            lost = f"{record.counts[Status.DROPPED]} dropped, {record.counts[Status.FAILED]} failed"
            update(completed=record.frames, rate=rate, lost=lost)

        yield advance


def _print_summary(record: Record, source: Source, output: Path | None, elapsed_s: float, *, err: bool) -> None:
    """Print what was done, in one line, unless nothing was."""
    if not record.frames:
        return
    parts = [f"{record.frames} frames in {elapsed_s:.1f} s ({record.frames / elapsed_s:.1f}/s)"]
    parts += [f"{record.counts[status]} {status}" for status in Status if record.counts[status]]
    if source.lost:
        parts.append(f"{source.lost} never taken from the camera")
    if record.has_film:
        parts.append(f"wrote {output} (H.264)")
    typer.echo(", ".join(parts), err=err)


def _warn_of_missing(source: Source, unreadable: list[Path]) -> None:
    """Warn of what INPUT should have held."""
    for path in unreadable:
        warn(f"error: {path}: cannot be read as an image; left out")
    if source.missing and source.total is not None:
        found = source.total - source.missing
        warn(f"error: INPUT ended after {found} frames of {source.total}: it is damaged or cut off")
