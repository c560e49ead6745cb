"""Connections to one database: a bounded number, made when they are needed and made again when they break.

Owns the life of connections, the deadlines, and which calls are tried again. Knows no SQL. (Why not the driver's pool: it
sends a query of its own before a connection is used again, which is a second trip; it cancels the statement of a
caller who gives up, and a cancelled COMMIT that waits for a standby counts as done though the standby has not got it.)

Two lanes, so that changes never wait for reads: a renewal that came too late behind a thousand loads would cost the volume.
In each lane the connection that was used last is used first: it has its statements prepared.

Interleavings:

- A call runs as a task of this object, not of its caller. A caller that is cancelled leaves the call under way: it ends by
  itself, within its deadline, and its connection is used again. Nothing is ever cancelled on the server.
- Past its deadline a call's connection is cut. What the server does with what it got is unknown then, as after any lost
  connection: callers must be able to find out (metasvc.store.postgresql.volume).
- A call that is marked ``again`` does the same done twice: when the connection breaks it is done again on another one, after
  a pause that doubles, until its deadline. Others fail at once with Unavailable. To connect is tried again for all of them.
- While a server refuses another connection (its limit), a call takes the first one that another call gives back.
- ``_idle`` and ``_open`` are changed between awaits only. ``_open`` has every connection that was not dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import asyncpg

from chunkstore.errors import AtollError
from metasvc.errors import StoreError
from metasvc.store.postgresql.address import Address
from metasvc.store.postgresql.database import CONNECT_DEADLINE_S, connect
from metasvc.store.postgresql.foreign_errors import FOREIGN, Unavailable, is_usable_after, translate

__all__ = ["CHANGE_DEADLINE_S", "READ_DEADLINE_S", "Lane"]

CHANGE_DEADLINE_S: Final = 8.0
"""Less than an ownership lasts, so that its owner has time to ask what became of a change."""
READ_DEADLINE_S: Final = 30.0
"""A read is idempotent: this includes the repeats, with which a restart of the server is a pause and no error."""
ATTEMPT_DEADLINE_S: Final = 10.0
"""Of one attempt of a call that may be repeated: a connection that swallows what it gets costs no more."""
RETRY_FIRST_S: Final = 0.05
RETRY_MAX_S: Final = 1.0
CLOSE_S: Final = 5.0
"""What is under way when the store is closed may end within this."""

T = TypeVar("T")
Work = Callable[[asyncpg.Connection], Awaitable[T]]


class Lane:
    """Up to ``limit`` connections for calls of one kind."""

    def __init__(self, address: Address, *, limit: int) -> None:
        self._address = address
        self._limit = limit
        self._turns = asyncio.Semaphore(limit)
        self._idle: list[asyncpg.Connection] = []
        self._open: set[asyncpg.Connection] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    @property
    def at(self) -> str:
        """The name of the database, for messages."""
        return self._address.at

    async def call(self, work: Work[T], *, deadline_s: float, again: bool = False) -> T:
        """Run ``await work(connection)`` while nobody else uses the connection; ``work`` sends one statement or transaction.

        StoreError for foreign errors, and where no connection was to be had within ``deadline_s``; Unavailable where it is
        unknown what the server did, and for ``again`` only when that lasted until the deadline. Other errors of ``work`` as
        they are.
        """
        if self._closed:
            raise StoreError(f"{self.at} is closed")
        return await asyncio.shield(self._begin(self._call(work, deadline_s, again=again)))

    def _begin(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(self._ended_by_close(call))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Whoever waited may have been cancelled, and nobody else asks how it ended.
            task.exception()

    async def _call(self, work: Work[T], deadline_s: float, *, again: bool) -> T:
        ends_s = asyncio.get_running_loop().time() + deadline_s
        try:
            async with asyncio.timeout_at(ends_s):
                await self._turns.acquire()
        except TimeoutError as exc:
            raise StoreError(f"all {self._limit} connections to {self.at} were busy for {deadline_s:.0f} s") from exc
        try:
            return await self._attempts(work, ends_s, again=again)
        finally:
            self._turns.release()

    async def _ended_by_close(self, call: Coroutine[Any, Any, T]) -> T:
        """Run a call; nobody but close() cancels it, and who waits for it was not cancelled."""
        try:
            return await call
        except asyncio.CancelledError:
            raise StoreError(f"{self.at} is closed") from None

    async def _attempts(self, work: Work[T], ends_s: float, *, again: bool) -> T:
        loop = asyncio.get_running_loop()
        delay_s = RETRY_FIRST_S
        while True:
            is_sent = False
            try:
                connection = await self._take(ends_s)
                is_sent = True
                attempt_ends_s = min(ends_s, loop.time() + ATTEMPT_DEADLINE_S) if again else ends_s
                return await self._attempt(work, connection, attempt_ends_s)
            except Unavailable:
                if (is_sent and not again) or self._closed or loop.time() + delay_s >= ends_s:
                    raise
            await asyncio.sleep(delay_s)
            delay_s = min(RETRY_MAX_S, delay_s * 2)

    async def _take(self, ends_s: float) -> asyncpg.Connection:
        """Return a connection that nobody uses. StoreError."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
            self._open.discard(connection)
        try:
            left_s = max(0.0, ends_s - asyncio.get_running_loop().time())
            connection = await connect(self._address, deadline_s=min(CONNECT_DEADLINE_S, left_s))
        except FOREIGN as exc:
            raise translate(exc, self.at) from exc
        self._open.add(connection)
        return connection

    async def _attempt(self, work: Work[T], connection: asyncpg.Connection, ends_s: float) -> T:
        is_usable = False
        cut = asyncio.get_running_loop().call_at(ends_s, connection.terminate)
        try:
            result = await work(connection)
            is_usable = True
            return result
        except AtollError:
            is_usable = True
            raise
        except (*FOREIGN, AttributeError) as exc:
            # The driver forgets its protocol with the connection, and looks for it where that ended between two of its steps.
            if isinstance(exc, AttributeError) and not connection.is_closed():
                raise
            is_usable = is_usable_after(exc)
            is_late = connection.is_closed() and asyncio.get_running_loop().time() >= ends_s
            raise translate(TimeoutError() if is_late else exc, self.at) from exc
        finally:
            cut.cancel()
            if is_usable and not self._closed:
                self._idle.append(connection)
            else:
                self._open.discard(connection)
                connection.terminate()

    async def close(self) -> None:
        """Let calls end that are under way, for CLOSE_S, then cut their connections; close the others. May be called twice."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=CLOSE_S)
        for connection in self._open.difference(self._idle):
            connection.terminate()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        idle, self._idle = self._idle, []
        await asyncio.gather(*(_close(connection) for connection in idle))
        self._open.clear()


async def _close(connection: asyncpg.Connection) -> None:
    try:
        await connection.close(timeout=1.0)
    except FOREIGN:
        connection.terminate()
