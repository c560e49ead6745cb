"""Threads are never abandoned, tasks have an owner."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from chunkstore.background import Executors, TaskSet, wait_for_event


async def test_work_on_a_thread_goes_on_when_the_waiting_coroutine_is_cancelled() -> None:
    executors = Executors(disk_threads=1)
    may_end = threading.Event()
    ended: list[bool] = []

    def work() -> None:
        ended.append(may_end.wait(20))

    future = executors.start_disk(work)

    async def wait() -> None:
        await asyncio.shield(future)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not future.done()
    may_end.set()
    await executors.close()
    assert ended == [True]


async def test_close_cancels_again_where_a_cancellation_was_swallowed() -> None:
    tasks = TaskSet()
    swallowed = 0

    async def stubborn() -> None:
        nonlocal swallowed
        while swallowed < 2:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                if swallowed == 2:
                    raise

    tasks.start(stubborn(), name="stubborn")
    await asyncio.sleep(0)
    await tasks.close()
    assert swallowed == 2
    assert len(tasks) == 0


async def test_an_error_that_was_not_announced_is_logged_once_and_one_that_was_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tasks = TaskSet()

    async def fail(error: Exception) -> None:
        raise error

    tasks.start(fail(ValueError("a bug")), name="buggy", raises=(OSError,))
    tasks.start(fail(OSError("expected")), name="fine", raises=(OSError,))
    await tasks.settle(timeout_s=5)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == [
        "background task buggy failed"
    ]


async def test_a_wait_for_an_event_can_be_cancelled_in_the_tick_of_the_event() -> None:
    event = asyncio.Event()
    task = asyncio.create_task(wait_for_event(event, timeout_s=60))
    await asyncio.sleep(0)
    event.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not await wait_for_event(asyncio.Event(), timeout_s=0)
    assert await wait_for_event(event, timeout_s=60)
