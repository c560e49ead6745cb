"""A thread that the system does not give is missed, and nothing else; a call on the loop has the connection for itself."""

from __future__ import annotations

import asyncio
import sqlite3
import threading

import pytest

from metasvc.errors import StoreError
from metasvc.store.sqlite.threads import ConnectionThreads


async def test_calls_go_on_when_threads_can_be_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def one(connection: sqlite3.Connection) -> int:
        (number,) = connection.execute("SELECT 1").fetchone()
        return int(number)

    threads = ConnectionThreads(":memory:", lambda: sqlite3.connect(":memory:"), name="test", limit=2)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(3):
        with pytest.raises(StoreError, match="new thread"):
            await threads.call(one)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert await threads.call(one) == 1
    monkeypatch.setattr(threading.Thread, "start", refuse)
    # The one that there is takes what a second one would have taken.
    assert await asyncio.gather(*(threads.call(one) for _ in range(4))) == [1, 1, 1, 1]
    monkeypatch.setattr(threading.Thread, "start", start)
    await threads.close()


def may(threads: ConnectionThreads[sqlite3.Connection]) -> bool:
    return threads.may_call_here


def add(connection: sqlite3.Connection, number: int) -> int:
    connection.execute("CREATE TABLE IF NOT EXISTS numbers (number)")
    connection.execute("INSERT INTO numbers VALUES (?)", (number,))
    return int(connection.execute("SELECT count(*) FROM numbers").fetchone()[0])


async def test_calls_on_the_loop_and_in_the_thread_have_one_connection_and_take_turns() -> None:
    threads = ConnectionThreads(
        ":memory:", lambda: sqlite3.connect(":memory:", check_same_thread=False), name="test", limit=1
    )
    assert not may(threads), "there is no connection yet"
    assert await threads.call(add, 0) == 1
    here = total = 1
    for number in range(2000):
        if number % 3 == 0:
            waiting = [asyncio.ensure_future(threads.call(add, number)) for _ in range(2)]
            await asyncio.sleep(0)
            assert not may(threads), "the thread has it, or is about to take it"
            await asyncio.gather(*waiting)
            total += 2
        elif may(threads):
            total += 1
            here += 1
            assert threads.call_here(add, number) == total
    assert here > 500
    assert await threads.call(add, 0) == total + 1
    await threads.close()
    assert not may(threads)


async def test_a_call_on_the_loop_that_fails_is_told_and_a_broken_connection_is_replaced() -> None:
    made = []

    def connect() -> sqlite3.Connection:
        made.append(sqlite3.connect(":memory:", check_same_thread=False))
        return made[-1]

    def fail(connection: sqlite3.Connection) -> None:
        raise ValueError("mine")

    def corrupt(connection: sqlite3.Connection) -> None:
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        error.sqlite_errorname = "SQLITE_CORRUPT"
        raise error

    threads = ConnectionThreads("numbers.db", connect, name="test", limit=1)
    await threads.call(add, 0)
    while not may(threads):  # the thread is about to lay the connection down
        await asyncio.sleep(0.001)
    with pytest.raises(ValueError, match="mine"):
        threads.call_here(fail)
    assert threads.call_here(add, 1) == 2
    with pytest.raises(StoreError):
        threads.call_here(corrupt)
    assert not may(threads)
    assert len(made) == 1
    assert await threads.call(add, 0) == 1
    assert len(made) == 2
    await threads.close()


async def test_who_asks_for_much_delays_nobody_in_another_lane_by_what_waits() -> None:
    threads = ConnectionThreads(":memory:", lambda: sqlite3.connect(":memory:"), name="test", limit=1)
    go = threading.Event()
    order: list[str] = []

    def hold(_: sqlite3.Connection) -> None:
        go.wait(60)

    def note(_: sqlite3.Connection, what: str) -> None:
        order.append(what)

    asked = [threads.call_in(1, hold)]
    asked += [threads.call_in(1, note, f"much {number}") for number in range(5)]
    asked += [threads.call_in(2, note, f"little {number}") for number in range(2)]
    asked += [threads.call(note, "of no volume")]
    waiting = [asyncio.ensure_future(one) for one in asked]
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(threads.close())
    await asyncio.sleep(0)
    go.set()
    await asyncio.gather(*waiting)
    await closing
    assert sorted(order[:3]) == ["little 0", "much 0", "of no volume"]
    # The lanes take turns, each in its order, and the end comes last.
    assert sorted(order[3:5]) == ["little 1", "much 1"]
    assert order[5:] == ["much 2", "much 3", "much 4"]
