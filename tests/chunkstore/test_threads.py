"""Calls go to threads and their results come back, whatever becomes of the caller."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest

from chunkstore.threads import Threads


class Block:
    """Something that a weak reference can watch."""


async def test_results_and_errors_come_back_and_no_more_threads_run_than_allowed() -> None:
    threads = Threads(3, name="test")
    running, most, lock = 0, 0, threading.Lock()

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        # Long enough for the others to begin.
        time.sleep(0.005)
        with lock:
            running -= 1
        if number % 10 == 3:
            raise OSError(number, "three")
        return number

    answers = await asyncio.gather(*(threads.start(work, number) for number in range(40)), return_exceptions=True)
    assert [answer for answer in answers if not isinstance(answer, OSError)] == [n for n in range(40) if n % 10 != 3]
    assert [answer.errno for answer in answers if isinstance(answer, OSError)] == [3, 13, 23, 33]
    assert most == 3
    await threads.close()


async def test_one_call_at_a_time_needs_one_thread() -> None:
    threads = Threads(8, name="test")
    names = {await threads.start(lambda: threading.current_thread().name) for _ in range(20)}
    assert names == {"test_0"}
    await threads.close()


async def test_a_call_whose_future_was_cancelled_before_it_began_never_runs() -> None:
    threads = Threads(1, name="test")
    gate = threading.Event()
    ran: list[str] = []
    first = threads.start(gate.wait, 20)
    dropped = threads.start(ran.append, "dropped")
    kept = threads.start(ran.append, "kept")
    dropped.cancel()
    gate.set()
    await first
    await kept
    assert ran == ["kept"]
    await threads.close()


async def test_close_waits_for_all_that_was_started_and_then_takes_nothing() -> None:
    threads = Threads(2, name="test")
    ran: list[int] = []

    def work(number: int) -> None:
        # Some are still waiting for a thread when close() is called.
        time.sleep(0.01)
        ran.append(number)

    futures = [threads.start(work, number) for number in range(6)]
    await threads.close()
    assert sorted(ran) == list(range(6))
    await asyncio.gather(*futures)
    await threads.close()
    with pytest.raises(RuntimeError, match="closed"):
        threads.start(ran.append, 7)


async def test_an_idle_thread_keeps_nothing_of_its_last_call_alive() -> None:
    threads = Threads(1, name="test")
    block = Block()
    watched = weakref.ref(block)
    assert await threads.start(lambda given: given is not None, block)
    del block
    # Its last statement runs after the answer was sent.
    deadline = time.monotonic() + 20
    while watched() is not None and time.monotonic() < deadline:
        await asyncio.sleep(0.001)
        gc.collect()
    assert watched() is None
    await threads.close()


async def test_a_call_that_stops_an_iteration_fails_its_future() -> None:
    threads = Threads(1, name="test")
    with pytest.raises(RuntimeError, match="StopIteration"):
        await threads.start(next, iter(()))
    await threads.close()


async def test_a_thread_that_cannot_be_started_is_missed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    refused = 0

    def refuse(thread: threading.Thread) -> None:
        nonlocal refused
        refused += 1
        raise RuntimeError("can't start new thread")

    threads = Threads(2, name="test")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="new thread"):
            threads.start(int)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert await threads.start(int) == 0
    monkeypatch.setattr(threading.Thread, "start", refuse)
    # One there is takes what a second one would have taken.
    assert await asyncio.gather(*(threads.start(int, str(n)) for n in range(4))) == [0, 1, 2, 3]
    monkeypatch.setattr(threading.Thread, "start", start)
    gate = threading.Event()
    waiting = threads.start(gate.wait, 20)
    await threads.start(gate.set)
    assert await waiting
    assert refused >= 4
    await threads.close()
