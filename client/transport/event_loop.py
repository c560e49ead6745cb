"""The event loop as pyfuse3 wants to see it: waiting for requests with few system calls, and an end that cannot fail.

pyfuse3 is written for trio and takes whatever stands in its module attribute `trio`; its own `pyfuse3.asyncio.enable()` puts a
shim for asyncio there. That shim registers and removes the FUSE descriptor with epoll around every single request (13 system
calls for one request, 6 of them epoll_ctl; seen with strace), hands a lock from task to task for each, and its
`notify_closing` raises InvalidStateError when a request became ready in the same tick. `EventLoop` is what we put there.

How waiting goes. pyfuse3 keeps some tasks; each takes `Lock`, calls `wait_readable`, gives the lock back, receives one request
and answers it. Here a task that answered without waiting finds the lock free again and asks the kernel directly (poll(2), 1 us)
whether the next request is there already, so that a busy mount costs a poll, a read and a write per request. Only when
nothing is there it sleeps, on a reader that stays registered. After some requests in a row it lets the loop turn once.

Going to sleep and being woken costs both sides about 60 of the 110 us of a request that is answered from memory (2 virtual
CPUs; getxattr in a loop), and a program that opens, reads and closes sends its next request 10 to 40 us after an answer. So
before it sleeps, the task asks the kernel again and again for `_SPIN_NS`, if no request is being worked on (else the CPU is
needed for that) and as long as this pays: after `_SPINS_IN_VAIN` in a row that brought nothing, only one in `_SPIN_RARELY` is
tried. docs/adr/0024 has the figures.

Must not know requests. Everything is called on one event loop.
"""

from __future__ import annotations

import asyncio
import select
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from time import perf_counter_ns
from types import ModuleType, TracebackType
from typing import Any, Final, Self

# Requests answered in a row before the loop turns: other tasks (uploads, commits) wait at most for these.
_STREAK: Final = 16
_SPIN_NS: Final = 60_000
_SPINS_IN_VAIN: Final = 4
_SPIN_RARELY: Final = 16


@contextmanager
def without_trio() -> Iterator[None]:
    """Let pyfuse3 be imported without trio, which it imports and which `EventLoop` replaces: 0.12 s and 10 MiB saved."""
    if "trio" in sys.modules:
        yield
        return
    sys.modules["trio"] = ModuleType("trio")
    try:
        yield
    finally:
        del sys.modules["trio"]


class Closed(Exception):
    """Tell a task of pyfuse3 that there will be no more requests. (pyfuse3 knows it as trio.ClosedResourceError.)"""


class _Lock:
    """Let one task wait for the descriptor. Who gives it back may take it again before others are woken."""

    def __init__(self) -> None:
        self._is_held = False
        self._waiting: list[asyncio.Future[None]] = []
        self._wake: asyncio.Handle | None = None

    async def __aenter__(self) -> None:
        while self._is_held:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
        self._is_held = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_held = False
        if self._waiting and self._wake is None:
            # Not at once: the task that gives back usually answers without waiting and is here again before this runs.
            self._wake = asyncio.get_running_loop().call_soon(self._wake_next)

    def _wake_next(self) -> None:
        self._wake = None
        while self._waiting and not self._is_held:
            # The last to come: its buffer is the warmest, and idle tasks stay idle.
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)
                return


class _Nursery:
    """Start tasks; leaving waits for all of them."""

    def __init__(self) -> None:
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._tasks.__aexit__(kind, error, traceback)

    def start_soon(self, function: Callable[..., Coroutine[Any, Any, None]], *args: object, name: str) -> None:
        """Run a coroutine function as a task."""
        self._tasks.create_task(function(*args), name=name)


class EventLoop:
    """Stand in for the module trio, as far as pyfuse3 uses it. One mount."""

    ClosedResourceError = Closed
    name: Final = "pyfuse3"
    """What pyfuse3 logs as the name of the current task."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._poll = select.poll()
        self._is_reader = False
        self._sleeper: asyncio.Future[None] | None = None
        self._is_closed = False
        self._streak = 0
        self._in_vain = 0
        self.requests_in_work = 0
        """Requests received and not answered; kept by the handlers."""

    # -- what pyfuse3 calls, under the names that it uses --------------------------------------------------------------

    @property
    def lowlevel(self) -> Self:
        """Return trio.lowlevel."""
        return self

    @property
    def from_thread(self) -> Self:
        """Return trio.from_thread."""
        return self

    def Lock(self) -> _Lock:  # noqa: N802
        """Make the lock that guards waiting."""
        return _Lock()

    def open_nursery(self) -> _Nursery:
        """Make what runs the tasks."""
        return _Nursery()

    def current_trio_token(self) -> str:
        """Return something that is not None."""
        return self.name

    def current_task(self) -> Self:
        """Return something with a name."""
        return self

    async def wait_readable(self, descriptor: int) -> None:
        """Return when a request can be received. Called by one task at a time."""
        if self._descriptor != descriptor:
            self._descriptor = descriptor
            self._poll.register(descriptor, select.POLLIN)
        if self._streak < _STREAK:
            self._streak += 1
        else:
            self._streak = 0
            await asyncio.sleep(0)
        if self._is_closed:
            raise Closed
        if self._poll.poll(0) or (self.requests_in_work == 0 and self._spin()):
            return
        self._streak = 0
        loop = asyncio.get_running_loop()
        if not self._is_reader:
            loop.add_reader(descriptor, self._readable)
            self._is_reader = True
        self._sleeper = loop.create_future()
        try:
            await self._sleeper
        finally:
            self._sleeper = None

    def _spin(self) -> bool:
        """Ask the kernel for a moment whether the next request has come."""
        self._in_vain += 1
        if self._in_vain > _SPINS_IN_VAIN and self._in_vain % _SPIN_RARELY:
            return False
        poll = self._poll.poll
        until_ns = perf_counter_ns() + _SPIN_NS
        while perf_counter_ns() < until_ns:
            if poll(0):
                self._in_vain = 0
                return True
        return False

    def notify_closing(self, descriptor: int) -> None:
        """Wake whoever waits; there will be no more requests. May be called at any moment, and again."""
        self._is_closed = True
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_exception(Closed())

    # -- ours ----------------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        if self._sleeper is not None:
            if not self._sleeper.done():
                self._sleeper.set_result(None)
        else:
            # A request is there and all tasks are busy: not to be told of it again and again until one waits.
            self.stop_reading()

    def stop_reading(self) -> None:
        """Take the descriptor out of the loop: before it is closed."""
        if self._is_reader:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            self._is_reader = False
