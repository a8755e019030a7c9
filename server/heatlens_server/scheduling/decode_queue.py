"""Images that are to be decoded, those of one model or large ones, on threads that all models share."""

import threading
from collections.abc import Callable
from concurrent.futures import Executor

from heatlens_server.scheduling.cost_queue import CostQueue
from heatlens_server.scheduling.entry import Entry


class DecodeQueue:
    """Has entries decoded on an executor's threads, their owners and costs in turns. Thread-safe.

    An executor works first come, first served: a stream that sends a whole window at once would keep all others
    waiting. So entries wait here, and the executor gets at most `at_once` calls, each of which asks for the next entry
    when it runs. A call that is done goes to the executor's end, so that models take turns as well.
    """

    def __init__(self, threads: Executor, decode: Callable[[Entry], None], *, at_once: int) -> None:
        """Start nothing yet.

        Args:
            threads: where to decode.
            decode: decodes an entry; called on one of the threads. Must not raise.
            at_once: most entries of this queue that are decoded at the same time.
        """
        self._threads = threads
        self._decode = decode
        self._at_once = at_once
        self._lock = threading.Lock()
        self._waiting: CostQueue[Entry] = CostQueue()
        self._calls = 0

    def __len__(self) -> int:
        """Entries that wait to be decoded."""
        with self._lock:
            return len(self._waiting)

    def add(self, entry: Entry) -> None:
        """Have an entry decoded.

        Raises:
            RuntimeError: the executor is shut down.
        """
        with self._lock:
            self._waiting.put(entry.owner, entry, cost=entry.decode_s)
            if self._calls == self._at_once:
                return
            self._calls += 1
        try:
            self._threads.submit(self._decode_next)
        except BaseException:
            with self._lock:
                self._calls -= 1
            self.discard(entry)
            raise

    def discard(self, entry: Entry) -> bool:
        """Forget an entry.

        Returns:
            False if it is being decoded or gone.
        """
        with self._lock:
            keep_turn = entry.source is not None
            return self._waiting.remove(entry.owner, entry, cost=entry.decode_s, keep_turn=keep_turn)

    def _decode_next(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._calls -= 1
                    return
                entry = self._waiting.take()
            self._decode(entry)
            del entry  # or its image would live until this thread has work again
            with self._lock:
                if not self._waiting:
                    self._calls -= 1
                    return
            try:
                self._threads.submit(self._decode_next)
            except RuntimeError:
                continue  # shut down: what was admitted is decoded all the same
            return
