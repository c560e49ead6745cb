"""Threads that take calls from one event loop and hand the results back.

Owns the hand-over and the life of the threads. Must not know what the calls do.

Why not ThreadPoolExecutor: there each call costs a concurrent future with a condition, an asyncio future and the chain
between them, a quarter of the CPU of a random read (py-spy). Here it costs a queue entry and a callback.

Interleavings. A call is put into the queue by the loop, run whole by one thread, and answered by a callback on the loop;
`_outstanding` and `_threads` are touched by the loop only. A future that was cancelled before its call began takes the call
with it; later the call runs to its end and its result is dropped, so whoever lent it a buffer or a descriptor awaits the
future through `asyncio.shield`: then it is done when the thread is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Threads:
    """A bounded number of threads, started as they are needed."""

    def __init__(self, limit: int, *, name: str) -> None:
        """Start nothing yet. Used from one event loop, which need not run yet."""
        self._limit: Final = limit
        self._name: Final = name
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._outstanding = 0
        self._is_closed = False

    def start(self, call: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Start a call when a thread is free; the future has its result or what it raised.

        RuntimeError after close(), and where the system gives not even one thread.
        """
        if self._is_closed:
            raise RuntimeError(f"the threads {self._name} are closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if self._outstanding >= len(self._threads) and len(self._threads) < self._limit:
            self._start_thread()
        self._outstanding += 1
        self._queue.put((loop, future, call, args))
        return future

    def _start_thread(self) -> None:
        # Daemons: an interpreter that ends without close() must not wait for a thread that waits for it.
        thread = threading.Thread(target=self._run, name=f"{self._name}_{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # No more threads for this process now. Those that there are take the call; the next call tries again.
            if not self._threads:
                raise
            return
        self._threads.append(thread)

    async def close(self) -> None:
        """Let the threads finish what was started, and end them. May be called again."""
        if not self._is_closed:
            self._is_closed = True
            for _ in self._threads:
                self._queue.put(None)
        await asyncio.get_running_loop().run_in_executor(None, self._join)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            loop, future, call, args = entry
            result: Any = None
            error: BaseException | None = None
            if not future.cancelled():
                try:
                    result = call(*args)
                except BaseException as exc:  # noqa: BLE001 - the edge of the thread: whatever it is, the caller gets it
                    error = exc
            try:
                loop.call_soon_threadsafe(self._settle, future, result, error)
            except RuntimeError:
                # The loop was closed meanwhile: nobody waits for this answer.
                return
            # A thread that waits must not keep alive what the last call held, a block for instance.
            del entry, future, call, args, result, error

    def _settle(self, future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
        self._outstanding -= 1
        if future.done():
            return
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration):
            future.set_exception(RuntimeError(f"a call on a thread of {self._name} raised StopIteration"))
        else:
            future.set_exception(error)
