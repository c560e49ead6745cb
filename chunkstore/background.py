"""Work beside the caller: bounded threads for disks and codecs, and tasks that somebody owns.

Owns the rule that work on a thread is never abandoned: a coroutine that is cancelled stops waiting, but the thread goes on
with the descriptor and the buffer that it was given, so both must live until the *future* is done, not the coroutine.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

from chunkstore.threads import Threads

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

_MAX_CODEC_THREADS: Final = 4


class Executors:
    """Run disk work and codec work on two bounded pools. A hop costs 25 to 100 us, so small things do not take one."""

    def __init__(self, *, disk_threads: int, codec_threads: int | None = None) -> None:
        """Start no thread yet; both pools grow on demand."""
        self._disk = Threads(disk_threads, name="image-disk")
        self._codec = Threads(codec_threads or min(_MAX_CODEC_THREADS, os.cpu_count() or 1), name="codec")

    def start_disk(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Start disk work. Await the future through `asyncio.shield`; it is done when the thread is."""
        return self._disk.start(partial(call, *args, **kwargs))

    def start_codec(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Start compression or hashing, like `start_disk`."""
        return self._codec.start(partial(call, *args, **kwargs))

    async def disk(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run disk work and wait for it; a cancellation leaves it running to its end."""
        return await asyncio.shield(self.start_disk(call, *args, **kwargs))

    async def codec(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run codec work, like `disk`."""
        return await asyncio.shield(self.start_codec(call, *args, **kwargs))

    async def close(self) -> None:
        """Wait for all work that was started and end the threads."""
        for pool in (self._disk, self._codec):
            await pool.close()


class TaskSet:
    """Own tasks that outlive the call that started them, until they end or their owner ends them.

    What a task raises beyond what was announced is a bug, and logged here; what was announced is for those who await it.
    """

    def __init__(self) -> None:
        """Own nothing yet."""
        self._tasks: dict[asyncio.Task[Any], tuple[type[Exception], ...]] = {}
        self._is_closing = False

    def __len__(self) -> int:
        """Return how many tasks are running."""
        return len(self._tasks)

    def start(
        self, coroutine: Coroutine[Any, Any, T], *, name: str, raises: tuple[type[Exception], ...] = ()
    ) -> asyncio.Task[T]:
        """Start a task that may raise what is announced. After `close` began it is cancelled before its first step."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks[task] = raises
        task.add_done_callback(self._ended)
        if self._is_closing:
            task.cancel()
        return task

    async def settle(self, *, timeout_s: float) -> None:
        """Wait until no task is left, or for so long."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._tasks and (left_s := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(list(self._tasks), timeout=left_s)

    async def close(self) -> None:
        """Cancel all tasks and wait for their ends; again and again, as code of others may swallow a cancellation."""
        self._is_closing = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(list(self._tasks), timeout=1.0)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        raises = self._tasks.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, raises):
            log.error("background task %s failed", task.get_name(), exc_info=error)


async def wait_for_event(event: asyncio.Event, *, timeout_s: float) -> bool:
    """Wait until an event is set, or for so long; return whether it is.

    In place of asyncio.wait_for, which in Python 3.11 swallows a cancellation that comes in the tick of the event.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
