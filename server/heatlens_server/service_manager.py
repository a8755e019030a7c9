"""What systemd is told of a server that it started: sd_notify(3), by datagrams to a socket that it names.

A unit with Type=notify or notify-reload and WatchdogSec: deploy/heatlens.service.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

_log = logging.getLogger("heatlens")

_SOCKET: Final = "NOTIFY_SOCKET"
_WATCHDOG_US: Final = "WATCHDOG_USEC"
_WATCHDOG_PID: Final = "WATCHDOG_PID"


class ServiceManager:
    """The systemd that started this process; without one, nothing is told to anybody.

    Attributes:
        watchdog_s: how long it waits for a sign of life before it ends the process, in seconds; None: for ever.
    """

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Take its variables out of the environment: they are for this process, not for those that it starts."""
        self._address = environment.pop(_SOCKET, "")
        watchdog_us, pid = environment.pop(_WATCHDOG_US, ""), environment.pop(_WATCHDOG_PID, str(os.getpid()))
        is_watched = bool(self._address) and watchdog_us.isdecimal() and pid == str(os.getpid())
        self.watchdog_s = int(watchdog_us) / 1e6 if is_watched else None

    def ready(self, status: str) -> None:
        """The start, or a reload, has ended."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """A reload has begun."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The server drains, and ends."""
        self._tell("STOPPING=1")

    async def show_life(self) -> None:
        """Give signs of life, three in the time in which one is due, as long as the event loop runs."""
        while self.watchdog_s is not None:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / 3)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        # "@" stands for the NUL of an abstract address.
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            _log.warning("the service manager is not told %s: %s", lines[0], error.strerror or error)
