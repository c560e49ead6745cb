"""The store in memory."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metasvc.errors import NotOwner
from metasvc.store import Store
from metasvc.store.memory import MemoryStore
from tests.metasvc.store.contract import TTL_S, Step, StoreContract, World, acquire, compare_with_model, histories
from tests.metasvc.store.virtual_clock import VirtualClock


class MemoryWorld(World):
    """Processes share one MemoryStore; an owner's claim ends when time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.store = MemoryStore(clock=self.clock.time)

    async def open_store(self) -> Store:
        return self.store

    async def lapse(self) -> None:
        await self.clock.advance(TTL_S)


@pytest.fixture
def world() -> MemoryWorld:
    return MemoryWorld()


class TestMemoryStore(StoreContract):
    """The contract."""


@given(steps=histories, page=st.integers(1, 9))
def test_a_store_is_a_sorted_map_for_each_table(steps: list[Step], page: int) -> None:
    asyncio.run(compare_with_model(MemoryWorld(), steps, page=page))


async def test_the_ownership_ends_when_its_time_is_over_and_not_before(world: MemoryWorld) -> None:
    first, second = await world.volume(), await world.volume()
    owner = await acquire(first)
    await world.clock.advance(TTL_S - 1)
    with pytest.raises(NotOwner) as refusal:
        await acquire(second, nonce="second")
    assert refusal.value.expires_in_s == pytest.approx(1)
    await first.renew(owner, ttl_s=TTL_S)
    await world.clock.advance(TTL_S - 1)
    with pytest.raises(NotOwner):
        await acquire(second, nonce="second")
    await world.clock.advance(1)
    assert (await acquire(second, nonce="second")).epoch == 2
