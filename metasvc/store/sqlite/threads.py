"""Threads that each hold one SQLite connection and take calls from one queue.

Owns the hand-over between the event loop and the threads, and the life of the connections. Knows no SQL. (What
chunkstore.threads is for calls without a connection and without a deadline; metasvc may not import it.)

Why not an executor: a commit of one create takes about 280 us in the thread, most of it the fsync; the hand-over there
and back adds 50 to 60 us with SimpleQueue and call_soon_threadsafe, 80 to 120 us with run_in_executor (uvloop, 2 cores).

Interleavings: a call is put into the queue by the event loop, run whole by one thread, and answered by a callback on
the loop. ``_waiting`` and ``_threads`` are touched by the loop only. A caller that is cancelled, or gives up at the
deadline, leaves its call in the queue; it is skipped if it has not begun, else it runs to its end and the answer is
dropped. The queue is bounded by the callers: each waits for its one entry, and they are bounded by the requests that
sessions may have outstanding. All calls come from one event loop. Connections do not
survive fork(): open the store after the process became a daemon.

Calls come in lanes, one for each volume and one for what belongs to none. In a lane they run in their order; the lanes take
turns, so a volume that is asked for hundreds of long scans delays what others ask by those that run, not by those that wait.

The connection of an only thread is lent: before the thread waits for a call it lays it down (``_lent``), and with a call it
takes it up again. Only the loop puts calls into the queue, so while the loop runs a call itself (`call_here`) the thread
cannot wake.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Hashable
from queue import SimpleQueue
from typing import Any, Final, Generic, Protocol, TypeVar, TypeVarTuple, cast

from chunkstore.errors import AtollError
from metasvc.errors import StoreError
from metasvc.store.sqlite.foreign_errors import FOREIGN, translate

__all__ = ["CALL_DEADLINE_S", "ConnectionThreads"]

CALL_DEADLINE_S: Final = 60.0
"""How long any call may take, the wait in the queue included; only a disk that hangs takes longer."""

# After these the connection may be in any state: the next call gets a new one.
_BROKEN: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}


class Closeable(Protocol):
    """What a thread holds: a connection, as a rule."""

    def close(self) -> None:
        """Let go of it."""


C = TypeVar("C", bound=Closeable)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class _Lanes:
    """A queue of several lanes that take turns. Put in by one thread, taken out by several."""

    def __init__(self) -> None:
        self._lanes: dict[Hashable, deque[Any]] = {}
        """Those that are not empty, in the order of their turns."""
        self._last: deque[Any] = deque()
        self._lock = threading.Lock()
        self._ready: SimpleQueue[None] = SimpleQueue()
        """One for each entry."""

    def put(self, lane: Hashable, entry: Any) -> None:
        """Put an entry at the end of a lane."""
        with self._lock:
            self._lanes.setdefault(lane, deque()).append(entry)
        self._ready.put(None)

    def put_last(self, entry: Any) -> None:
        """Put an entry behind all lanes, where more may come before it."""
        with self._lock:
            self._last.append(entry)
        self._ready.put(None)

    def get(self) -> Any:
        """Wait for an entry and take it: the first of the lane whose turn it is."""
        self._ready.get()
        with self._lock:
            if not self._lanes:
                return self._last.popleft()
            lane, entries = next(iter(self._lanes.items()))
            del self._lanes[lane]
            entry = entries.popleft()
            if entries:
                self._lanes[lane] = entries
        return entry

    def empty(self) -> bool:
        """Say whether nothing waits."""
        return self._ready.empty()


class ConnectionThreads(Generic[C]):
    """A bounded number of threads with a connection each, started as they are needed."""

    def __init__(self, path: str, connect: Callable[[], C], *, name: str, limit: int) -> None:
        """``connect`` is called on the threads; ``path`` names the database in errors."""
        self._path = path
        self._connect = connect
        self._name = name
        self._limit = limit
        self._queue = _Lanes()
        self._threads: list[threading.Thread] = []
        self._waiting = 0
        self._closed = False
        self._lent: C | None = None

    @property
    def may_call_here(self) -> bool:
        """Return whether `call_here` can run something now: there is one thread at most, it is connected, and nothing waits."""
        # The queue may hold calls that nobody waits for any more.
        return self._lent is not None and not self._waiting and self._queue.empty() and not self._closed

    def call_here(self, function: Callable[[C, *Ts], T], *args: *Ts) -> T:
        """Run ``function(connection, *args)`` on the caller's thread, without deadline. Requires `may_call_here`. StoreError.

        Saves the hand-over to the thread and back: 110 of 560 us of a commit. The event loop stands meanwhile.
        """
        connection, self._lent = self._lent, None
        try:
            connection, result, error = self._attempt(connection, function, args)
        finally:
            self._lent = connection
        if error is not None:
            raise error
        return cast("T", result)

    async def call(self, function: Callable[[C, *Ts], T], *args: *Ts) -> T:
        """Run ``function(connection, *args)`` on a thread, in the lane of what belongs to no volume. See `call_in`."""
        return await self.call_in(None, function, *args)

    async def call_in(self, lane: Hashable, function: Callable[[C, *Ts], T], *args: *Ts) -> T:
        """Run ``function(connection, *args)`` on a thread when it is the turn of the lane. Foreign errors become StoreError.

        Raises StoreError where there is not even one thread, and after CALL_DEADLINE_S; the function may run then, or go on
        running, afterwards.
        """
        if self._closed:
            raise StoreError(f"{self._path} is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if self._waiting >= len(self._threads) and len(self._threads) < self._limit:
            self._start_thread()
        self._waiting += 1
        self._queue.put(lane, (loop, future, function, args))
        deadline = loop.call_later(CALL_DEADLINE_S, self._give_up, future)
        try:
            return await future
        finally:
            deadline.cancel()
            self._waiting -= 1

    def post(self, function: Callable[[C, *Ts], object], *args: *Ts) -> None:
        """Have ``function(connection, *args)`` run on a thread some time; nobody waits, and its error is dropped.

        Does nothing after close(), and where there is no thread.
        """
        if self._closed:
            return
        loop = asyncio.get_running_loop()
        future: asyncio.Future[object] = loop.create_future()
        if not self._threads:
            try:
                self._start_thread()
            except StoreError:
                return
        # Counted like a call that is waited for: until it has run the connection is not the loop's.
        self._waiting += 1
        future.add_done_callback(self._posted_has_run)
        self._queue.put(None, (loop, future, function, args))

    def _posted_has_run(self, future: asyncio.Future[object]) -> None:
        self._waiting -= 1
        future.exception()

    async def close(self) -> None:
        """Let the threads finish what is queued, close their connections and end. Raises StoreError at the deadline."""
        if self._closed:
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        ended: list[asyncio.Future[None]] = []
        for _ in self._threads:
            future: asyncio.Future[None] = loop.create_future()
            self._queue.put_last((loop, future, None, ()))
            ended.append(future)
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                await asyncio.gather(*ended)
        except TimeoutError as exc:
            raise self._too_slow() from exc

    def _start_thread(self) -> None:
        # Daemon: an interpreter that ends without close() must not wait for a thread that waits for it.
        thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            # No more threads for this process now. Those that there are take the call; the next call tries again.
            if not self._threads:
                raise StoreError(f"{self._path}: {exc}: raise the limit of threads") from exc
            return
        self._threads.append(thread)

    def _give_up(self, future: asyncio.Future[Any]) -> None:
        if not future.done():
            future.set_exception(self._too_slow())

    def _too_slow(self) -> StoreError:
        return StoreError(
            f"{self._path} did not answer within {CALL_DEADLINE_S:.0f} s: check the disk and the kernel's log"
        )

    def _run(self) -> None:
        connection: C | None = None
        while True:
            if self._limit == 1 and connection is not None:
                self._lent = connection
            loop, future, function, args = self._queue.get()
            if self._limit == 1:
                connection, self._lent = self._lent, None
            result: Any = None
            error: BaseException | None = None
            if function is None:
                if connection is not None:
                    connection.close()
                _answer(loop, future, result, error)
                return
            if future.done():
                continue
            connection, result, error = self._attempt(connection, function, args)
            _answer(loop, future, result, error)
            # A thread that waits must not keep alive what the last call held, the rows of a big batch for instance.
            del future, function, args, result, error

    def _attempt(
        self, connection: C | None, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[C | None, Any, BaseException | None]:
        """Run a call; the connection as it is afterwards (None: the next call needs a new one), the result, the error."""
        try:
            if connection is None:
                connection = self._connect()
            return connection, function(connection, *args), None
        except AtollError as exc:
            return connection, None, exc
        except FOREIGN as exc:
            error = translate(exc, self._path)
            error.__cause__ = exc
            code = getattr(exc, "sqlite_errorcode", None)
            if code is not None and code & 0xFF in _BROKEN and connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()
                connection = None
            return connection, None, error
        except Exception as exc:  # noqa: BLE001  the edge of the thread: whatever it is, the caller gets it
            return connection, None, exc


def _answer(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: Any, error: BaseException | None
) -> None:
    try:
        loop.call_soon_threadsafe(_settle, future, result, error)
    except RuntimeError:
        # The loop was closed meanwhile: nobody waits for this answer.
        return


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
