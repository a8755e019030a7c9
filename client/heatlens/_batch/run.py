"""Many images explained at once, answered in their order."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias

from heatlens._exceptions import (
    DeadlineExceededError,
    HeatlensError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
)
from heatlens._results.results import Result

Answer: TypeAlias = Result | HeatlensError | OSError

_IMAGES_OWN = (DeadlineExceededError, InternalError, ResourceExhaustedError)


class MapType(StrEnum):
    """How a table holds maps."""

    FLOAT16 = "float16"
    UINT8 = "uint8"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Item:
    """One image.

    Attributes:
        path: what the table calls it: a file, or "FILE:ROW" for bytes in row ROW of a Parquet file.
        image: a file, or the bytes of one; None: the row of the Parquet file is empty.
    """

    path: str
    image: Path | bytes | None


async def answers(
    items: Iterator[Item], explain: Callable[[Item], Awaitable[Result]], *, concurrency: int
) -> AsyncIterator[tuple[Item, Answer]]:
    """Explain images, so many at once, and yield each with its answer, or with what is wrong with it, in order.

    Raises:
        HeatlensError: what the next image would meet as well: no server, a wrong option.
    """
    free = asyncio.Semaphore(concurrency)

    async def one(item: Item) -> Answer:
        async with free:
            try:
                return await explain(item)
            except (HeatlensError, OSError) as error:
                if not is_the_images_own(error):
                    raise
                return error

    # Twice as many: while the oldest is slow, others go on.
    under_way: deque[tuple[Item, asyncio.Task[Answer]]] = deque()
    try:
        for item in items:
            under_way.append((item, asyncio.create_task(one(item))))
            if len(under_way) >= 2 * concurrency:
                first, task = under_way.popleft()
                yield first, await task
        while under_way:
            first, task = under_way.popleft()
            yield first, await task
    finally:
        for _, task in under_way:
            task.cancel()
        await asyncio.gather(*(task for _, task in under_way), return_exceptions=True)


def is_the_images_own(error: HeatlensError | OSError) -> bool:
    """Whether another image may be explained all the same."""
    if isinstance(error, InvalidArgumentError):
        return error.reason.startswith("IMAGE_") or any(
            violation.field.partition(".")[0] == "image" for violation in error.field_violations
        )
    return isinstance(error, (OSError, *_IMAGES_OWN))
