"""A clock that moves only when a test says so, with a sleep() that waits for it."""

from __future__ import annotations

import asyncio
import heapq
import itertools


class VirtualClock:
    """Seconds that start at ``start``. Pass ``clock.time`` where a clock is injected, ``clock.sleep`` where a sleep is."""

    def __init__(self, *, start: float = 1_000_000.0) -> None:
        self._now = start
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._arrival = asyncio.Event()

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    @property
    def sleepers(self) -> int:
        """How many calls of sleep() are waiting."""
        return sum(not future.done() for _, _, future in self._sleepers)

    async def sleep(self, delay_s: float) -> None:
        """Wait until the clock was advanced by ``delay_s``; zero or less only yields to the loop."""
        if delay_s <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + delay_s, next(self._order), future))
        self._arrival.set()
        await future

    async def until_sleepers(self, count: int) -> None:
        """Wait until this many calls of sleep() are waiting. Raises TimeoutError after 10 s."""
        async with asyncio.timeout(10):
            while self.sleepers < count:
                self._arrival.clear()
                await self._arrival.wait()

    async def advance(self, by_s: float) -> None:
        """Move on, waking sleepers one after the other at their times; each runs before the next is woken."""
        end = self._now + by_s
        while self._sleepers and self._sleepers[0][0] <= end:
            due, _, future = heapq.heappop(self._sleepers)
            self._now = due
            if not future.done():
                future.set_result(None)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        self._now = end
