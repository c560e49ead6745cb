"""Bounds on bytes in memory: who waits, who goes on, and what a cancellation leaves."""

from __future__ import annotations

import asyncio

import pytest

from chunkstore.budget import ByteBudget, WriteMemory
from chunkstore.errors import BucketUnavailable, CacheFull


async def turns(count: int = 5) -> None:
    """Let other tasks run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_waiters_are_served_in_order_also_a_small_one_behind_a_big_one() -> None:
    budget = ByteBudget(10)
    await budget.acquire(8)
    order: list[int] = []

    async def want(size: int) -> None:
        await budget.acquire(size)
        order.append(size)

    tasks = [asyncio.create_task(want(size)) for size in (9, 1, 2)]
    await turns()
    assert order == []
    assert not budget.try_acquire(1), "nobody overtakes"
    budget.release(8)
    await turns()
    assert order == [9, 1]
    budget.release(10)
    await asyncio.gather(*tasks)
    assert order == [9, 1, 2]
    assert budget.used_bytes == 2


async def test_more_than_the_limit_is_granted_when_nothing_else_is_out() -> None:
    budget = ByteBudget(10)
    await budget.acquire(50)
    assert not budget.try_acquire(1)
    budget.release(50)
    assert budget.used_bytes == 0


async def test_a_cancelled_waiter_takes_nothing_and_lets_the_next_one_pass() -> None:
    budget = ByteBudget(10)
    await budget.acquire(6)
    big = asyncio.create_task(budget.acquire(10))
    small = asyncio.create_task(budget.acquire(4))
    await turns()
    big.cancel()
    await turns()
    assert small.done()
    assert budget.used_bytes == 10
    # Granted and cancelled in the same tick: what was granted goes back.
    last = asyncio.create_task(budget.acquire(5))
    await turns()
    budget.release(10)
    last.cancel()
    await asyncio.gather(last, big, return_exceptions=True)
    assert budget.used_bytes == 0
    assert not budget.has_waiters


async def test_a_share_of_the_limit_is_left_to_others() -> None:
    budget = ByteBudget(10)
    assert budget.try_acquire(5, of_limit=0.5)
    assert not budget.try_acquire(1, of_limit=0.5)
    assert budget.try_acquire(1)


async def test_tails_get_half_of_the_write_memory_and_become_flight_without_waiting() -> None:
    memory = WriteMemory(100)
    assert memory.try_take_tail(50)
    assert not memory.try_take_tail(1)
    memory.tail_to_flight(50)
    assert memory.try_take_tail(50)
    assert not memory.try_take_tail(1)
    waiting = asyncio.create_task(memory.wait(10))
    await turns()
    assert not waiting.done()
    memory.release(50)
    await waiting
    memory.release_tail(50)
    assert memory.used_bytes == memory.tail_bytes == 0


async def test_waiting_raises_where_no_change_can_make_room() -> None:
    memory = WriteMemory(100)
    assert memory.try_take_tail(50)
    with pytest.raises(CacheFull):
        await memory.wait(60)
    memory.tail_to_flight(50)
    memory.stick(50, BucketUnavailable("away"))
    with pytest.raises(BucketUnavailable, match="away"):
        await memory.wait(60)
    waiting = asyncio.create_task(memory.take(60))
    await turns()
    assert isinstance(waiting.exception(), BucketUnavailable)
    memory.unstick(50)
    memory.release(50)
    await memory.take(60)
    assert memory.used_bytes == 60


async def test_a_cancelled_wait_for_write_memory_leaves_no_trace() -> None:
    memory = WriteMemory(100)
    await memory.take(100)
    waiting = asyncio.create_task(memory.take(10))
    await turns()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    memory.release(100)
    assert memory.used_bytes == 0
