"""`.atoll/accesslog`: one line per request, for as long as somebody reads it.

Owns the lines not yet read by each reader. Lines are made only while there is a reader.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Final

# A reader that is slow, or stopped, loses the oldest lines: the log must never hold up the file system.
_LINES_KEPT: Final = 16_384
# A read(2) is answered at least this often: a process that waits in the kernel for a FUSE answer cannot be killed.
_ANSWER_S: Final = 1.0
_NOTHING: Final = b"#\n"


class AccessLogReader:
    """One open descriptor of the log."""

    def __init__(self, log: AccessLog) -> None:
        self._log = log
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._arrived = asyncio.Event()

    def add(self, line: bytes) -> None:
        """Take a line; the oldest is dropped when there are too many."""
        if len(self._lines) >= _LINES_KEPT:
            self._lines.popleft()
            self._lost += 1
        self._lines.append(line)
        self._arrived.set()

    async def read(self, size: int) -> bytes:
        """Return whole lines, up to `size` bytes of them; `#` alone if nothing happened for a second."""
        if not self._lines:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), _ANSWER_S)
            except TimeoutError:
                return _NOTHING
        taken: list[bytes] = []
        if self._lost:
            taken.append(b"# %d lines lost\n" % self._lost)
            self._lost = 0
        left = size - sum(map(len, taken))
        while self._lines and len(self._lines[0]) <= left:
            line = self._lines.popleft()
            left -= len(line)
            taken.append(line)
        if not taken:  # a line longer than the read: its beginning
            taken.append(self._lines.popleft()[: size - 1] + b"\n")
        return b"".join(taken)

    def close(self) -> None:
        """Stop collecting lines for this reader."""
        self._log.readers.discard(self)


class AccessLog:
    """Who reads the log, and what a line looks like."""

    def __init__(self) -> None:
        self.readers: set[AccessLogReader] = set()

    def open(self) -> AccessLogReader:
        """Return a new reader; it sees what happens from now on."""
        reader = AccessLogReader(self)
        self.readers.add(reader)
        return reader

    def record(
        self, request: str, arguments: str, *, uid: int, gid: int, pid: int, answer: str, duration_ns: int
    ) -> None:
        """Add a line: `time [uid,gid,pid] OPERATION-number (arguments): answer <seconds>`. Only while there are readers."""
        now_ns = time.time_ns()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now_ns // 1_000_000_000))
        line = (
            f"{stamp}.{now_ns // 1000 % 1_000_000:06d} [{uid},{gid},{pid}] "
            f"{request} ({arguments}): {answer} <{duration_ns / 1e9:.6f}>\n"
        ).encode("utf-8", "backslashreplace")
        for reader in self.readers:
            reader.add(line)
