"""Models that are being built, each on a thread of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Callable

from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError, ModelUnloaded, ServerDraining
from heatlens_server.fleet.built_model import BuiltModel


class Builds:
    """The builds that go on, at most one for a key of a model. Belongs to the event loop."""

    def __init__(self) -> None:
        """Nothing is being built."""
        self._futures: dict[str, asyncio.Future[BuiltModel]] = {}
        self._threads: set[threading.Thread] = set()

    def __contains__(self, key: str) -> bool:
        """Whether a model is being built that is to have the place of that key."""
        return key in self._futures

    @property
    def are_running(self) -> bool:
        """Whether a thread still builds, wanted or not."""
        return any(thread.is_alive() for thread in self._threads)

    def start(
        self, key: str, config: ModelConfig, build: Callable[[ModelConfig], BuiltModel]
    ) -> "asyncio.Future[BuiltModel]":
        """Build in a daemon thread: a download may hang for minutes, and must not keep a draining process alive."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[BuiltModel] = loop.create_future()

        def settle(built: BuiltModel | None, error: Exception | None) -> None:
            self._threads.discard(thread)
            if future.done():
                if built is not None:
                    close_aside(built)
            elif built is None:
                future.set_exception(error or RuntimeError("nothing was built"))
            else:
                future.set_result(built)

        def run() -> None:
            built, error = None, None
            try:
                built = build(config)
            except Exception as raised:
                error = raised
            except BaseException as raised:
                error = ModelLoadError(f"the model's code raised {type(raised).__name__}")
                error.__cause__ = raised
            # After the server's end the loop is closed and no task waits for this model.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, built, error)

        thread = threading.Thread(target=run, name=f"load-{key}", daemon=True)
        self._threads.add(thread)
        self._futures[key] = future
        thread.start()
        return future

    async def wait(self, key: str, config: ModelConfig, build: "asyncio.Future[BuiltModel]") -> BuiltModel:
        """Wait for a build; what was given up, or is waited for no longer, is closed.

        Raises:
            ModelLoadError: whatever went wrong.
            ModelUnloaded, ServerDraining: it was given up.
        """
        try:
            built = await build
        except (ModelLoadError, ModelUnloaded, ServerDraining):
            raise
        except Exception as error:
            raise UnexpectedLoadError from error
        except asyncio.CancelledError:
            if build.done() and not build.cancelled() and build.exception() is None:
                close_aside(build.result())
            raise
        finally:
            is_wanted = self._futures.get(key) is build
            if is_wanted:
                del self._futures[key]
        if not is_wanted:
            # Given up between the end of the thread and this task's turn.
            close_aside(built)
            raise ModelUnloaded(config.name, "was unloaded")
        return built

    def give_up(self, key: str, error: Exception) -> None:
        """Let a build, if there is one of that key, end with an error for those who wait for it."""
        build = self._futures.pop(key, None)
        if build is not None and not build.done():
            build.set_exception(error)
            # Counts as retrieved, should the task that waits for it be cancelled.
            build.exception()

    def give_up_all(self, error: Exception) -> None:
        """`give_up` of every build."""
        for key in list(self._futures):
            self.give_up(key, error)


def close_aside(built: BuiltModel) -> None:
    """Close a model that never served: on another thread, as that may take a moment."""
    asyncio.get_running_loop().run_in_executor(None, built.close)


class UnexpectedLoadError(ModelLoadError):
    """Loading failed in a way that nobody expected: its cause may hold anything, and goes to the log alone."""

    def __init__(self) -> None:
        super().__init__("an unexpected error while loading; the server's log has it")


def fault_of(error: ModelLoadError) -> Exception | None:
    """What the log shows the traceback of."""
    return error if isinstance(error, UnexpectedLoadError) else None
