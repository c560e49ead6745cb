"""Retries, bounds and counters in front of any object store.

Owns the one retry policy: what is retryable is said by the error (`AtollError.retryable`), how often and how long by
`Limits` and `RetryPolicy`. Must not know providers.

A call takes a slot (gets and puts have separate ones), makes one attempt with a deadline of its own, and gives the slot back
while it waits before the next; the delay is exponential with full jitter (a random share of the bound), so that clients whom
one outage stopped do not come back together. The waits for slots, the attempts and the delays together stay in the budget.
All state is counters and two semaphores, touched on one event loop only.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Literal, TypeVar

from chunkstore.buckets import Limits, ObjectInfo, ObjectStore, VerbCounters
from chunkstore.buckets.probe import probe_store
from chunkstore.errors import AtollError, BucketUnavailable
from chunkstore.geometry import Buffer

T = TypeVar("T")
Verb = Literal["get", "put", "delete", "list", "head"]
VERBS: Final[tuple[Verb, ...]] = ("get", "put", "delete", "list", "head")

_SILENCE_S: Final = 10.0
_LEAST_S: Final = 0.01
"""With less time left no attempt is made: it would fail for want of time, and hide why those before it did."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Say how long to wait before a repeat: a random share of a bound that doubles from the first to the last."""

    first_delay_s: float = 0.1
    max_delay_s: float = 5.0

    def delay_s(self, failures: int, random: Random) -> float:
        """Return the wait in seconds after `failures` failed attempts, 1 or more."""
        # The exponent is bounded because 2.0 ** 1024 is an error.
        return random.uniform(0, min(self.max_delay_s, self.first_delay_s * 2.0 ** min(failures - 1, 32)))


@dataclass(slots=True)
class _Tally:
    requests: int = 0
    retries: int = 0
    errors: int = 0
    bytes: int = 0
    seconds: float = 0.0


class RetryingStore:
    """Be the store behind it without its outages, as far as the budget goes."""

    def __init__(
        self,
        inner: ObjectStore,
        *,
        limits: Limits,
        policy: RetryPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Random | None = None,
    ) -> None:
        """Take over a store: closing this one closes it."""
        self._inner = inner
        self._limits = limits
        self._policy = policy or RetryPolicy()
        self._clock = clock
        self._sleep = sleep
        self._random = random or Random()
        self._get_slots = asyncio.Semaphore(limits.max_gets)
        self._put_slots = asyncio.Semaphore(limits.max_puts)
        self._tallies: dict[Verb, _Tally] = {verb: _Tally() for verb in VERBS}
        # When the outage began that was logged last, if it has not ended; and until when no other is logged.
        self._failing_since: float | None = None
        self._silent_until = -math.inf

    def __str__(self) -> str:
        """Name the bucket for messages."""
        return str(self._inner)

    def counters(self) -> Mapping[str, VerbCounters]:
        """Return what was counted since the store was opened, by verb: get, put, delete, list, head."""
        return {
            verb: VerbCounters(
                requests=tally.requests,
                retries=tally.retries,
                errors=tally.errors,
                bytes=tally.bytes,
                seconds=tally.seconds,
            )
            for verb, tally in self._tallies.items()
        }

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        """Return the bytes `[start, end)` of an object; BucketUnavailable when the budget is spent."""
        data = await self._call(
            "get", lambda: self._inner.get(key, start=start, end=end), slots=self._get_slots, timeout_s=timeout_s
        )
        self._tallies["get"].bytes += len(data)
        return data

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        """Store an object; BucketUnavailable when the budget is spent, and then it may or may not be stored."""
        await self._call(
            "put", lambda: self._inner.put(key, data, if_absent=if_absent), slots=self._put_slots, timeout_s=timeout_s
        )
        self._tallies["put"].bytes += memoryview(data).nbytes

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        """Delete up to 1,000 objects; absent ones are fine."""
        await self._call("delete", lambda: self._inner.delete(keys), slots=self._put_slots, timeout_s=timeout_s)

    async def head(self, key: str, *, timeout_s: float | None = None) -> ObjectInfo:
        """Describe an object."""
        return await self._call("head", lambda: self._inner.head(key), slots=self._get_slots, timeout_s=timeout_s)

    async def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects under a prefix; goes on after the last one when the store fails. Every object renews the budget.

        Takes no slot, as the consumer may be slow; a request is counted per start of the listing.
        """
        tally = self._tallies["list"]
        failures = 0
        began = self._clock()
        infos = self._inner.list(prefix, start_after=start_after)
        tally.requests += 1
        while True:
            try:
                async with asyncio.timeout(self._limits.attempt_timeout_s):
                    info = await anext(infos, None)
            except (AtollError, TimeoutError) as error:
                failures += 1
                await self._before_repeat(
                    _as_ours(error, f"{self}: {prefix}"),
                    tally,
                    failures=failures,
                    began=began,
                    deadline=began + self._limits.budget_s,
                )
                infos = self._inner.list(prefix, start_after=start_after)
                tally.requests += 1
                continue
            tally.seconds += self._clock() - began
            if info is None:
                return
            start_after, failures = info.key, 0
            self._answered()
            yield info
            began = self._clock()

    async def probe(self) -> None:
        """Prove that this bucket works for us, each step within about 5 s, retries included."""
        await probe_store(self)

    async def close(self) -> None:
        """Close the store behind."""
        await self._inner.close()

    async def _call(
        self, verb: Verb, attempt: Callable[[], Awaitable[T]], *, slots: asyncio.Semaphore, timeout_s: float | None
    ) -> T:
        """Make a call with all its attempts."""
        tally = self._tallies[verb]
        began = self._clock()
        deadline = began + (self._limits.budget_s if timeout_s is None else timeout_s)
        failures = 0
        try:
            while True:
                try:
                    return await self._attempt(attempt, slots, tally, deadline=deadline)
                except AtollError as error:
                    failures += 1
                    await self._before_repeat(error, tally, failures=failures, began=began, deadline=deadline)
        finally:
            tally.seconds += self._clock() - began

    async def _attempt(
        self, attempt: Callable[[], Awaitable[T]], slots: asyncio.Semaphore, tally: _Tally, *, deadline: float
    ) -> T:
        """Wait for a slot and make one attempt, both before the deadline."""
        if slots.locked():
            try:
                async with asyncio.timeout(deadline - self._clock()):
                    await slots.acquire()
            except TimeoutError as error:
                raise BucketUnavailable(f"{self}: too many requests at once, none ended in time") from error
        else:
            # Free: this does not suspend, and a timer less is 10 us less of the 100 that a small get takes.
            await slots.acquire()
        try:
            tally.requests += 1
            timeout_s = max(0.0, min(self._limits.attempt_timeout_s, deadline - self._clock()))
            try:
                async with asyncio.timeout(timeout_s):
                    result = await attempt()
            except TimeoutError as error:
                raise BucketUnavailable(f"{self}: no answer within {timeout_s:.3g} s") from error
        finally:
            slots.release()
        self._answered()
        return result

    async def _before_repeat(
        self, error: AtollError, tally: _Tally, *, failures: int, began: float, deadline: float
    ) -> None:
        """Wait before the next attempt; raise the error where there shall be none."""
        if not error.retryable:
            tally.errors += 1
            raise error
        delay_s = self._policy.delay_s(failures, self._random)
        now = self._clock()
        if now + delay_s + _LEAST_S >= deadline:
            raise self._given_up(error, tally, failures=failures, began=began)
        # Once per outage, not for each attempt of all who wait for its end; nor for each hiccup of a server that has many.
        if self._failing_since is None and now >= self._silent_until:
            self._failing_since = now
            self._silent_until = now + _SILENCE_S
            log.warning("%s; trying again", error)
        await self._sleep(delay_s)
        if self._clock() + _LEAST_S >= deadline:
            # Slept for longer than was asked for.
            raise self._given_up(error, tally, failures=failures, began=began)
        tally.retries += 1

    def _given_up(self, error: AtollError, tally: _Tally, *, failures: int, began: float) -> AtollError:
        """Return the error of the last attempt, with how many there were."""
        tally.errors += 1
        if failures == 1:
            return error
        told = BucketUnavailable(
            f"{error.message} (gave up after {failures} attempts in {self._clock() - began:.0f} s)"
        )
        told.__cause__ = error
        return told

    def _answered(self) -> None:
        """Note that the store answered, which ends an outage if one was logged."""
        if self._failing_since is not None:
            log.warning("%s: answers again after %.1f s", self, self._clock() - self._failing_since)
            self._failing_since = None


def _as_ours(error: AtollError | TimeoutError, where: str) -> AtollError:
    return error if isinstance(error, AtollError) else BucketUnavailable(f"{where}: no answer in time")
