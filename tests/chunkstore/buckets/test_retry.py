"""The retry policy by itself, in front of a store that fails as it is told; time is played."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from chunkstore.buckets import Limits, ObjectInfo, open_bucket
from chunkstore.buckets.retry import RetryingStore, RetryPolicy
from chunkstore.errors import (
    AtollError,
    BucketDenied,
    BucketFull,
    BucketInvalid,
    BucketUnavailable,
    ObjectExists,
    ObjectMissing,
)
from chunkstore.geometry import Buffer


class Time:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Script:
    """Answer each call with the next of a list of outcomes, the last one for ever; count how many are under way."""

    def __init__(self, *outcomes: AtollError | Callable[[], Awaitable[None]] | None) -> None:
        self._outcomes = list(outcomes)
        self.calls = 0
        self.running = 0
        self.most_running = 0
        self.is_closed = False

    def __str__(self) -> str:
        return "bucket script"

    async def _next(self) -> None:
        self.calls += 1
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if isinstance(outcome, AtollError):
                raise outcome
            if outcome is not None:
                await outcome()
        finally:
            self.running -= 1

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        await self._next()
        return b"content"[start:end]

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        await self._next()

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        await self._next()

    async def head(self, key: str, *, timeout_s: float | None = None) -> ObjectInfo:
        await self._next()
        return ObjectInfo(key, 7, 0, None)

    async def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        for key in ("a", "b", "c", "d"):
            if start_after is None or key > start_after:
                await self._next()
                yield ObjectInfo(key, 7, 0, None)

    async def probe(self) -> None:
        raise AssertionError("the wrapper probes through itself")

    async def close(self) -> None:
        self.is_closed = True


async def _for_ever() -> None:
    await asyncio.Event().wait()


def _store(script: Script, played: Time, *, limits: Limits | None = None, seed: int = 1) -> RetryingStore:
    return RetryingStore(
        script, limits=limits or Limits(), clock=played.clock, sleep=played.sleep, random=random.Random(seed)
    )


def _run(use: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(30):
            await use()

    asyncio.run(run())


UNAVAILABLE = BucketUnavailable("bucket script: HTTP 503 (SlowDown)")


@pytest.mark.parametrize("verb", ["get", "put", "delete", "head"])
def test_a_call_is_repeated_until_the_store_answers(verb: str) -> None:
    played, script = Time(), Script(UNAVAILABLE, UNAVAILABLE, UNAVAILABLE, None)
    store = _store(script, played)
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "get": lambda: store.get("k"),
        "put": lambda: store.put("k", b"12345"),
        "delete": lambda: store.delete(["k"]),
        "head": lambda: store.head("k"),
    }

    async def use() -> None:
        await calls[verb]()

    _run(use)
    assert script.calls == 4
    assert len(played.sleeps) == 3
    counted = store.counters()[verb]
    assert (counted.requests, counted.retries, counted.errors) == (4, 3, 0)
    assert counted.bytes == {"get": 7, "put": 5, "delete": 0, "head": 0}[verb]
    assert counted.seconds == pytest.approx(sum(played.sleeps))
    assert all(other.requests == 0 for name, other in store.counters().items() if name != verb)


@pytest.mark.parametrize(
    "error",
    [ObjectMissing("x"), BucketDenied("x"), BucketInvalid("x"), BucketFull("x"), ObjectExists("x")],
    ids=lambda error: error.code,
)
def test_what_no_repeat_can_mend_is_raised_at_once(error: AtollError) -> None:
    played, script = Time(), Script(error)
    store = _store(script, played)

    async def use() -> None:
        with pytest.raises(type(error)) as caught:
            await store.get("k")
        assert caught.value is error

    _run(use)
    assert (script.calls, played.sleeps) == (1, [])
    assert store.counters()["get"].errors == 1


def test_who_sleeps_beyond_the_budget_makes_no_attempt_that_cannot_succeed() -> None:
    class Overslept(Time):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            self.now += 0.0 if len(self.sleeps) < 3 else 60 - (self.now - 1000) - 1e-4

    played, script = Overslept(), Script(UNAVAILABLE)
    store = _store(script, played, limits=Limits(budget_s=60))

    async def use() -> None:
        with pytest.raises(BucketUnavailable, match=r"SlowDown\) \(gave up after 3 attempts in 60 s\)"):
            await store.get("k")

    _run(use)
    assert script.calls == 3
    assert store.counters()["get"].errors == 1


def test_when_the_budget_is_spent_the_last_error_is_raised_with_what_was_tried() -> None:
    played, script = Time(), Script(UNAVAILABLE)
    store = _store(script, played, limits=Limits(budget_s=60))

    async def use() -> None:
        with pytest.raises(BucketUnavailable, match=r"SlowDown\) \(gave up after \d+ attempts in \d+ s\)") as caught:
            await store.get("k")
        assert caught.value.__cause__ is UNAVAILABLE

    _run(use)
    assert 40 < played.now - 1000 < 60
    assert 10 < script.calls < 200
    assert store.counters()["get"].errors == 1


def test_a_call_may_bring_its_own_budget() -> None:
    played, script = Time(), Script(UNAVAILABLE)
    store = _store(script, played)

    async def use() -> None:
        with pytest.raises(BucketUnavailable):
            await store.put("k", b"", timeout_s=3)

    _run(use)
    assert played.now - 1000 < 3


def test_delays_are_random_below_a_bound_that_doubles_up_to_a_limit(seed: int) -> None:
    policy, chance = RetryPolicy(first_delay_s=0.1, max_delay_s=5), random.Random(seed)
    for failures, bound in [(1, 0.1), (2, 0.2), (3, 0.4), (6, 3.2), (7, 5), (50, 5), (10_000, 5)]:
        delays = [policy.delay_s(failures, chance) for _ in range(400)]
        assert all(0 <= delay <= bound for delay in delays)
        assert min(delays) < bound * 0.2
        assert max(delays) > bound * 0.8


def test_an_attempt_without_an_answer_is_given_up_and_repeated() -> None:
    played, script = Time(), Script(_for_ever, _for_ever, None)
    store = _store(script, played, limits=Limits(attempt_timeout_s=0.02))

    async def use() -> None:
        assert await store.get("k") == b"content"

    _run(use)
    assert store.counters()["get"].retries == 2


def test_gets_and_puts_are_bounded_separately() -> None:
    limits = Limits(max_gets=3, max_puts=2)
    for verb, most in (("get", 3), ("put", 2), ("delete", 2)):
        ticks = [asyncio.sleep]

        async def wait(ticks: Sequence[Callable[[float], Awaitable[None]]] = ticks) -> None:
            for _ in range(5):
                await ticks[0](0)

        script = Script(wait)
        store = _store(script, Time(), limits=limits)

        async def use(verb: str = verb, store: RetryingStore = store) -> None:
            make: dict[str, Callable[[], Awaitable[object]]] = {
                "get": lambda: store.get("k"),
                "put": lambda: store.put("k", b""),
                "delete": lambda: store.delete(["k"]),
            }
            await asyncio.gather(*(make[verb]() for _ in range(20)))

        _run(use)
        assert (script.calls, script.most_running) == (20, most)


def test_gets_go_on_while_all_puts_wait() -> None:
    script = Script(_for_ever, _for_ever, None)
    store = _store(script, Time(), limits=Limits(max_puts=2))

    async def use() -> None:
        puts = [asyncio.ensure_future(store.put("k", b"")) for _ in range(5)]
        while script.running < 2:
            await asyncio.sleep(0)
        assert await store.get("k") == b"content"
        for put in puts:
            put.cancel()
        await asyncio.gather(*puts, return_exceptions=True)
        assert script.running == 0
        # Their slots are free again.
        await store.put("k", b"")

    _run(use)


def test_the_wait_for_a_slot_has_a_deadline() -> None:
    script = Script(_for_ever)
    store = RetryingStore(script, limits=Limits(max_gets=1))

    async def use() -> None:
        first = asyncio.ensure_future(store.get("k"))
        while script.running < 1:
            await asyncio.sleep(0)
        with pytest.raises(BucketUnavailable, match="too many requests at once"):
            await store.get("k", timeout_s=0.05)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)

    _run(use)
    assert script.calls == 1


def test_a_call_that_waits_before_a_repeat_holds_no_slot() -> None:
    script = Script(UNAVAILABLE, None)
    go_on = asyncio.Event()

    async def sleep(_: float) -> None:
        await go_on.wait()

    async def use() -> None:
        store = RetryingStore(script, limits=Limits(max_gets=1), sleep=sleep)
        first = asyncio.ensure_future(store.get("k"))
        while script.calls < 1:
            await asyncio.sleep(0)
        assert await store.get("k") == b"content"
        go_on.set()
        assert await first == b"content"

    _run(use)


def test_a_listing_goes_on_after_the_last_object_it_gave() -> None:
    played, script = Time(), Script(None, None, UNAVAILABLE, UNAVAILABLE, None)
    store = _store(script, played)

    async def use() -> None:
        assert [info.key async for info in store.list()] == ["a", "b", "c", "d"]

    _run(use)
    counted = store.counters()["list"]
    assert (counted.requests, counted.retries, counted.errors) == (3, 2, 0)


def test_a_listing_gives_up_when_the_budget_is_spent_without_an_object() -> None:
    played, script = Time(), Script(None, None, UNAVAILABLE)
    store = _store(script, played, limits=Limits(budget_s=20))

    async def use() -> None:
        listing = store.list()
        assert [(await anext(listing)).key, (await anext(listing)).key] == ["a", "b"]
        with pytest.raises(BucketUnavailable, match="gave up after"):
            await anext(listing)

    _run(use)
    assert 10 < played.now - 1000 < 20
    assert store.counters()["list"].errors == 1


def test_a_listing_that_hangs_is_started_again() -> None:
    script = Script(None, _for_ever, None)
    store = _store(script, Time(), limits=Limits(attempt_timeout_s=0.02))

    async def use() -> None:
        assert [info.key async for info in store.list()] == ["a", "b", "c", "d"]

    _run(use)


def test_an_outage_is_logged_at_its_begin_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    played, script = Time(), Script(*[UNAVAILABLE] * 9, None)
    store = _store(script, played)

    async def use() -> None:
        await asyncio.gather(*(store.get("k") for _ in range(5)))

    with caplog.at_level(logging.INFO, logger="chunkstore.buckets"):
        _run(use)
    assert [record.getMessage() for record in caplog.records] == [
        "bucket script: HTTP 503 (SlowDown); trying again",
        f"bucket script: answers again after {played.now - 1000:.1f} s",
    ]


def test_a_server_with_many_hiccups_is_logged_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    played, script = Time(), Script(*[UNAVAILABLE, None] * 100, None)
    store = _store(script, played)

    async def use() -> None:
        for _ in range(100):
            await store.get("k")
            played.now += 0.3

    with caplog.at_level(logging.INFO, logger="chunkstore.buckets"):
        _run(use)
    assert store.counters()["get"].retries == 100
    warned = [record for record in caplog.records if record.getMessage().endswith("trying again")]
    assert len(warned) == 1 + (played.now - 1000) // 10


def test_closing_closes_the_store_behind() -> None:
    script = Script(None)

    async def use() -> None:
        await _store(script, Time()).close()

    _run(use)
    assert script.is_closed


def test_every_repeat_of_a_put_into_a_directory_is_harmless(tmp_path: Path) -> None:
    async def use() -> None:
        store = open_bucket(f"file://{tmp_path}", env={})
        for _ in range(3):
            await store.put("a/b", b"1", if_absent=True)
        assert store.counters()["put"] == (3, 0, 0, 3, store.counters()["put"].seconds)
        await store.close()

    _run(use)
