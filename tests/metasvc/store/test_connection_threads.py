"""A thread that the system does not give is missed, and nothing else."""

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
