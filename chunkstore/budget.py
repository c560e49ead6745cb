"""Bounds on bytes held in memory: who wants more waits, first come first served.

Pure bookkeeping on one event loop; knows nothing of what the bytes are. No method awaits between reading and changing a
count, so each is atomic. Waits have no deadline of their own: what is acquired is released by work that has one (a request
to the bucket with its budget, a write to a local disk).
"""

from __future__ import annotations

import asyncio
from collections import deque

from chunkstore.errors import AtollError, CacheFull


class ByteBudget:
    """Bound a number of bytes. A request over the whole limit is granted when nothing else is out."""

    __slots__ = ("_waiters", "limit_bytes", "used_bytes")

    def __init__(self, limit_bytes: int) -> None:
        """Start with nothing out."""
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def has_waiters(self) -> bool:
        """Return whether somebody waits."""
        return bool(self._waiters)

    def _fits(self, size_bytes: int) -> bool:
        return self.used_bytes + size_bytes <= self.limit_bytes or self.used_bytes == 0

    def try_acquire(self, size_bytes: int, *, of_limit: float = 1.0) -> bool:
        """Take bytes if that needs no waiting and stays within a share of the limit; return whether they were taken."""
        if self._waiters or not self._fits(size_bytes) or self.used_bytes + size_bytes > self.limit_bytes * of_limit:
            return False
        self.used_bytes += size_bytes
        return True

    async def acquire(self, size_bytes: int) -> None:
        """Take bytes, waiting for them in turn. Cancelled while waiting: nothing was taken."""
        if not self._waiters and self._fits(size_bytes):
            self.used_bytes += size_bytes
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (size_bytes, turn)
        self._waiters.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiters.remove(entry)
                self._grant()
            else:
                # Granted in the same tick as the cancellation.
                self.release(size_bytes)
            raise

    def release(self, size_bytes: int) -> None:
        """Give bytes back, and grant those whose turn has come."""
        self.used_bytes -= size_bytes
        assert self.used_bytes >= 0, "released more than was acquired"
        self._grant()

    def _grant(self) -> None:
        while self._waiters:
            size_bytes, turn = self._waiters[0]
            if turn.cancelled():
                # Its task has not run yet, and will remove the entry itself.
                return
            if not self._fits(size_bytes):
                return
            self._waiters.popleft()
            self.used_bytes += size_bytes
            turn.set_result(None)


class WriteMemory:
    """Bound the written bytes that are held in memory: tails of open writers, and blocks on their way.

    Bytes enter as part of a tail, and become in flight when their block is full; that step needs no room, so it never waits.
    Tails get at most half: they may lie idle for hours, while what is in flight moves on. Hence a wait for room ends as long
    as uploads succeed or blocks can be put aside on disk. What can do neither is *stuck*, and then waiting raises its error.
    """

    __slots__ = ("_error", "_waiters", "limit_bytes", "stuck_bytes", "tail_bytes", "used_bytes")

    def __init__(self, limit_bytes: int) -> None:
        """Start with nothing held."""
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.tail_bytes = 0
        self.stuck_bytes = 0
        self._error: AtollError | None = None
        self._waiters: deque[asyncio.Future[None]] = deque()

    def has_tail_room(self, size_bytes: int) -> bool:
        """Return whether tails may grow by so much without any of them going to disk."""
        return self.tail_bytes + size_bytes <= self.limit_bytes // 2

    def try_take_tail(self, size_bytes: int) -> bool:
        """Charge bytes to a tail if there is room at once."""
        if self.used_bytes + size_bytes > self.limit_bytes or not self.has_tail_room(size_bytes):
            return False
        self.used_bytes += size_bytes
        self.tail_bytes += size_bytes
        return True

    def tail_to_flight(self, size_bytes: int) -> None:
        """Note that a tail became a block on its way."""
        self.tail_bytes -= size_bytes
        self._wake()

    def release_tail(self, size_bytes: int) -> None:
        """Give back what a tail held."""
        self.tail_bytes -= size_bytes
        self.release(size_bytes)

    def release(self, size_bytes: int) -> None:
        """Give back what was in flight."""
        self.used_bytes -= size_bytes
        assert self.used_bytes >= self.tail_bytes >= 0, "released more than was taken"
        self._wake()

    def stick(self, size_bytes: int, error: AtollError) -> None:
        """Note that bytes in flight can neither be uploaded nor put aside, and why."""
        self.stuck_bytes += size_bytes
        self._error = error
        self._wake()

    def unstick(self, size_bytes: int) -> None:
        """Note that stuck bytes are on their way again."""
        self.stuck_bytes -= size_bytes
        self._wake()

    async def take(self, size_bytes: int) -> None:
        """Charge bytes as in flight, waiting for room. More than the limit is granted when nothing is held but tails."""
        while self.used_bytes + size_bytes > self.limit_bytes and self.used_bytes > self.tail_bytes:
            await self.wait(size_bytes)
        self.used_bytes += size_bytes

    async def wait(self, size_bytes: int) -> None:
        """Wait until something changed; raise where no change can make room for so many bytes, because of stuck ones."""
        if self.stuck_bytes and self.stuck_bytes + self.tail_bytes + size_bytes > self.limit_bytes:
            assert self._error is not None
            raise self._error
        if self.used_bytes == self.tail_bytes:
            raise CacheFull(
                f"written data hold all {self.limit_bytes} bytes of memory and the cache disk takes none of them: "
                "free space under --cache-dir"
            )
        change: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(change)
        try:
            await change
        except asyncio.CancelledError:
            if change in self._waiters:
                self._waiters.remove(change)
            raise

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, deque()
        for change in waiters:
            if not change.done():
                change.set_result(None)
