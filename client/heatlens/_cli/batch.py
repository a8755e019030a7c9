"""`heatlens batch`: explain stored images by the thousand into one Parquet file."""

import asyncio
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

from heatlens._batch.run import Answer, Item, MapType, answers
from heatlens._calls.async_client import AsyncClient
from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    CertOption,
    ClientOptions,
    KeyOption,
    ServerOption,
    TimeoutOption,
    TlsOption,
    client_options,
    describe,
    fail,
    progress,
    reporting,
    warn,
)
from heatlens._cli.explaining import MAP_OPTIONS, ModelOption, chosen, takes
from heatlens._cli.interrupt import INTERRUPTED, TERMINATED
from heatlens._exceptions import HeatlensError, UnavailableError
from heatlens._results.results import Result

if TYPE_CHECKING:
    from heatlens._batch.table import Table

_FLUSH_S = 30.0
"""How much work a crash may lose, in seconds."""

_GOES_ON = "the same command, without --overwrite, goes on"


@takes(*MAP_OPTIONS, after="model")
def batch(
    *,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT", help="Folders with all in them, lists of paths (.txt), Parquet files, images."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT.parquet", help="The table: one row per image, in order.")
    ],
    server: ServerOption = DEFAULT_SERVER,
    model: ModelOption = None,
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default="path, image, ...", help="Of Parquet files: paths, or bytes."),
    ] = None,
    map_type: Annotated[MapType, typer.Option(help="How maps are stored.")] = MapType.FLOAT16,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="Images under way at once.")] = 16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever is there.")] = False,
    timeout: TimeoutOption = 60.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    **options: Any,  # noqa: ANN401 - the options of `takes`
) -> None:
    """Explain stored images by the thousand into one Parquet file.

    An image that fails is a row with its error. What is interrupted goes on when the same command is run again, without
    --overwrite. Exits with 1 if it could not go on to the end, or every image failed.
    """
    if find_spec("pyarrow") is None:
        fail("Parquet files need pyarrow: pip install 'heatlens[batch]'")
    from heatlens._batch.inputs import count_of, items_of  # noqa: PLC0415 - an extra
    from heatlens._batch.table import Table  # noqa: PLC0415 - an extra

    if not output.name or output.is_dir():
        raise typer.BadParameter(f"expected the name of a file, got '{output}'", param_hint="--output")
    if any(Path(text).exists() and output.resolve() == Path(text).resolve() for text in inputs):
        raise typer.BadParameter("is an INPUT as well", param_hint="--output")
    with reporting():
        wanted: dict[str, Any] = {"model": model, **chosen(options)}
        total = count_of(inputs)
        if not total:
            fail("no images there")
        table = Table(output, {"inputs": inputs, **wanted}, map_type=map_type, overwrite=overwrite)
        with closing(table):
            items = _rest(items_of(inputs, column), table)
            connection = client_options(server, tls=tls, ca=ca, cert=cert, key=key, timeout=timeout)
            if map_type is not MapType.NONE:
                wanted["map_type"] = map_type.value
            ended = asyncio.run(_run(connection, items, table, wanted, concurrency=concurrency, total=total))
            if ended is None:
                table.finish()
    if ended is not None:
        warn(f"interrupted after {table.done} of {total} images: {_GOES_ON}")
        raise typer.Exit(ended)
    typer.echo(f"{output}: {table.done} images, {table.failed} failed")
    if table.failed == table.done:
        raise typer.Exit(1)


def _rest(items: Iterator[Item], table: "Table") -> Iterator[Item]:
    """Leave out what is done already."""
    if table.done:
        last = deque(enumerate(islice(items, table.done), start=1), maxlen=1)
        if [(count, item.path) for count, item in last] != [(table.done, table.last_path)]:
            fail("the inputs are not what they were when this batch was interrupted: --overwrite begins anew")
        warn(f"{table.done} images are done already")
    return items


async def _run(
    connection: ClientOptions,
    items: Iterator[Item],
    table: "Table",
    wanted: dict[str, Any],
    *,
    concurrency: int,
    total: int,
) -> int | None:
    """Fill the table; return the exit code of an interruption, None at the end.

    Raises:
        HeatlensError: no further image can be explained. What was answered is kept.
    """
    interrupted: list[int] = []
    task = asyncio.current_task()
    assert task is not None

    def interrupt(code: int) -> None:
        interrupted.append(code)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number, code in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)):
        # Not in other threads than the main one.
        with suppress(ValueError, RuntimeError):
            loop.add_signal_handler(number, interrupt, code)
    columns = (MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with progress("explaining", *columns, total=total, rate="") as update:
        try:
            async with AsyncClient(**connection) as client:

                async def explain(item: Item) -> Result:
                    if item.image is None:
                        raise FileNotFoundError("the row is empty")
                    return await client.explain(item.image, **wanted)

                await _fill(table, answers(items, explain, concurrency=concurrency), update)
        except asyncio.CancelledError:
            if not interrupted:
                raise
        except HeatlensError as error:
            goes_on = f"; {_GOES_ON}" if isinstance(error, UnavailableError) else ""
            error.message = f"after {table.done} of {total} images: {error.message}{goes_on}"
            raise
        finally:
            table.flush()
    return interrupted[0] if interrupted else None


async def _fill(table: "Table", answered: AsyncIterator[tuple[Item, Answer]], update: Callable[..., None]) -> None:
    began_s = flushed_s = time.monotonic()
    first = table.done
    async for item, answer in answered:
        table.add(item.path, answer)
        if not isinstance(answer, Result):
            text = describe(answer)
            warn(f"error: {text}" if item.path in text else f"error: {item.path}: {text}")
        now_s = time.monotonic()
        if now_s - flushed_s > _FLUSH_S:
            table.flush()
            flushed_s = now_s
        rate = (table.done - first) / max(now_s - began_s, 1e-3)
        update(completed=table.done, rate=f"{rate:.1f}/s, {table.failed} failed")
