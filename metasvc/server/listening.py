"""Taking connections, at a pace that leaves the event loop to those that are there.

Owns the listening sockets. Knows nothing of what is said on a connection.

Why not the loop's own server: uvloop takes connections until none waits, in one turn, which a flood of them never lets it
reach. 10,000 connections at 2,500 in a second were pauses of 0.4 s for everybody else. Here a turn takes `AT_ONCE`, and after
`BURST` there are `PER_SECOND`: the kernel keeps the others, and whom it refuses tries again. At 1,000 in a second others had
0.72 to 0.80 of their speed, at 300 0.93 to 0.98 (`bench/attacks.py --only silent`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any, Final

__all__ = ["Listener"]

BACKLOG: Final = 1024
"""Connections that the kernel keeps until they are taken (if net.core.somaxconn allows it)."""
AT_ONCE: Final = 8
PER_SECOND: Final = 300.0
BURST: Final = 1024
"""Machines that come back at once after a service was away."""
PAUSE_S: Final = 1.0
"""Until it is tried again after none could be taken: the process has no descriptor left, for one."""
_NOT_HERE: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

log = logging.getLogger(__name__)


class Listener:
    """Sockets that listen, from `start` to `close`."""

    def __init__(self, take: Callable[[socket.socket], object]) -> None:
        """``take``: gets each connection, non-blocking, and owns it from then on."""
        self._take = take
        self._sockets: list[socket.socket] = []
        self._free = float(BURST)
        """Connections that may be taken now."""
        self._counted_s = 0.0
        self._pause: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen on all addresses of a host ("": of this machine); the port, of the first one if 0 asks for any. OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        refused: list[OSError] = []
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                self._sockets.append(_listening(family, address))
            except OSError as error:
                refused.append(error)
        # A machine may know of IPv6 and not have it.
        taken = next((error for error in refused if error.errno not in _NOT_HERE), None)
        if taken is not None or not self._sockets:
            self.close()
            raise taken or refused[0]
        self._counted_s = loop.time()
        self._listen()
        listening: int = self._sockets[0].getsockname()[1]
        return listening

    def close(self) -> None:
        """Take no more. Those that the kernel keeps are reset."""
        if self._pause is None:
            self._ignore()
        else:
            self._pause.cancel()
        for one in self._sockets:
            one.close()
        self._sockets = []

    def _listen(self) -> None:
        self._pause = None
        for one in self._sockets:
            asyncio.get_running_loop().add_reader(one.fileno(), self._accept, one)

    def _ignore(self) -> None:
        for one in self._sockets:
            asyncio.get_running_loop().remove_reader(one.fileno())

    def _wait(self, seconds: float) -> None:
        self._ignore()
        self._pause = asyncio.get_running_loop().call_later(seconds, self._listen)

    def _accept(self, listening: socket.socket) -> None:
        """Take a few of those that wait."""
        if self._pause is not None:
            # Another one of the sockets has used up what was free, in this turn.
            return
        now_s = asyncio.get_running_loop().time()
        self._free = min(BURST, self._free + (now_s - self._counted_s) * PER_SECOND)
        self._counted_s = now_s
        for _ in range(AT_ONCE):
            if self._free < 1:
                self._wait(AT_ONCE / PER_SECOND)
                return
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("no connection can be taken: %s", error.strerror)
                self._wait(PAUSE_S)
                return
            self._free -= 1
            connection.setblocking(False)
            self._take(connection)


def _listening(family: int, address: tuple[Any, ...]) -> socket.socket:
    """Listen on one address. OSError."""
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setblocking(False)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Beside the one for IPv4.
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
        one.listen(BACKLOG)
    except OSError:
        one.close()
        raise
    return one
