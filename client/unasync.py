"""Writes the client and the stream for threads from those for asyncio: `make sync-client`.

    python client/unasync.py            write the files
    python client/unasync.py --check    fail if a file differs from what would be written

Most of it is a change of words: `await` goes, `async def` becomes `def`, `AsyncClient` becomes `Client`. What is said
about threads, and not about tasks, is replaced sentence by sentence.
"""

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "heatlens"
FILES = {
    "_calls/async_client.py": "_calls/client.py",
    "_stream/async_link.py": "_stream/link.py",
    "_stream/async_stream.py": "_stream/stream.py",
}

WORDS = (
    (r"\bAsyncGenerator\[(\w+), None\]", r"Generator[\1, None, None]"),
    (r"\bStopAsyncIteration\b", "StopIteration"),
    (r"\bAsync(?=[A-Z])", ""),
    (r"\basync (?=(def|with|for)\b)", ""),
    (r"\bawait (?!`)", ""),
    (r"\b__a(?=(enter|exit|iter|next)__)", "__"),
    (r"\banext\(", "next("),
    (r"\basync_(?=(link|stream|run)\b)", ""),
    (r"\basyncio\.Lock\b", "threading.Lock"),
    (r"^import asyncio$", "import threading"),
    (r"^# ruff: noqa: ASYNC.*\n\n", ""),
)
# By file: what is written for tasks, and what for threads. Each is replaced before the words, and must be found.
SENTENCES = {
    "_calls/async_client.py": (
        ('"""The client for asyncio."""', '"""The client for threads."""'),
        (", from asyncio. Create it after forking", ". Thread-safe; create it after forking"),
        (
            """it restores itself. It belongs to that call's event
    loop. Use the client as an asynchronous context manager, or await `close`. Cancelling a task cancels its call.""",
            "it restores itself.\n    Use the client as a context manager, or call `close`.",
        ),
        ("in other tasks fail", "in other threads fail"),
    ),
    "_stream/async_link.py": (("under an `AsyncStream`", "under a `Stream`"),),
    "_stream/async_stream.py": (
        ('"""Streams for asyncio."""', '"""Streams for threads."""'),
        ("an asynchronous context manager", "a context manager"),
        ("called from different tasks", "called from different threads"),
        ("Also a task that is cancelled while it waits for the server:", "Also Ctrl-C while waiting for the server:"),
        ("Iterable[ImageSource] | AsyncIterable[ImageSource]", "Iterable[ImageSource]"),
        (
            """Frames are pulled in a task of their own, or, as they may block, in a thread if the iterable is no
        asynchronous one: with overflow="block" at most `window` frames ahead of the loop; with "drop-oldest" as they
        come, and when the server or the loop is late, older frames are answered `dropped`. Leaving the loop stops the
        pulling and forgets the answers still to come.""",
            """Frames are pulled in a thread of their own:
        with overflow="block" at most `window` frames ahead of the loop; with "drop-oldest" as they come, and when the
        server or the loop is late, older frames are answered `dropped`. Leaving the loop stops the pulling (it waits at
        most a second for a frame that is on its way) and forgets the answers still to come.""",
        ),
        ("cancelled. Idempotent.", "cancelled. Idempotent, from any thread."),
    ),
}


def unasync(source: str) -> str:
    """Return the text of the file for threads that belongs to a file for asyncio, as the formatter leaves it."""
    text = (PACKAGE / source).read_text()
    for for_tasks, for_threads in SENTENCES[source]:
        if text.count(for_tasks) != 1:
            raise SystemExit(f"{source}: expected once: {for_tasks!r}")
        text = text.replace(for_tasks, for_threads)
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    text = f"# Generated from heatlens/{source} by client/unasync.py; do not edit.\n{text}"
    for command in (["check", "--fix", "--select", "I,F401,F811"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--quiet", "--stdin-filename", PACKAGE / FILES[source], "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> None:
    """Write the files, or compare them."""
    stale = []
    for source, target in FILES.items():
        path, text = PACKAGE / target, unasync(source)
        if "--check" not in sys.argv:
            path.write_text(text)
        elif path.read_text() != text:
            stale.append(target)
    if stale:
        raise SystemExit(f"stale: {', '.join(stale)}; run make sync-client")


if __name__ == "__main__":
    main()
