"""The faulty store: without faults it keeps the contract, with them it does what it says."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metasvc.errors import Fenced, StoreError
from metasvc.model import Counter
from metasvc.store import Store
from metasvc.store.memory import MemoryStore
from metasvc.store.tables import COUNTER
from tests.metasvc.store.contract import (
    NOTHING,
    TTL_S,
    Step,
    StoreContract,
    World,
    acquire,
    compare_with_model,
    histories,
)
from tests.metasvc.store.faulty import Faults, FaultyStore
from tests.metasvc.store.rows_of import batch_of
from tests.metasvc.store.virtual_clock import VirtualClock


class FaultyWorld(World):
    """Processes share one faulty store around one MemoryStore."""

    def __init__(self, faults: Faults) -> None:
        super().__init__()
        self.clock = VirtualClock()
        self.faults = faults
        self.store = FaultyStore(MemoryStore(clock=self.clock.time), faults)

    async def open_store(self) -> Store:
        return self.store

    async def lapse(self) -> None:
        await self.clock.advance(TTL_S)


@pytest.fixture
def world() -> FaultyWorld:
    return FaultyWorld(Faults())


class TestWithoutFaults(StoreContract):
    """The contract."""


class TestWithDelays(StoreContract):
    """The contract, every call taking its time."""

    @pytest.fixture
    def world(self, seed: int) -> FaultyWorld:
        return FaultyWorld(Faults(seed=seed, max_yields=5))


@given(steps=histories, page=st.integers(1, 9))
def test_a_store_is_a_sorted_map_for_each_table(steps: list[Step], page: int) -> None:
    asyncio.run(compare_with_model(FaultyWorld(Faults(seed=page, max_yields=3)), steps, page=page))


async def test_a_commit_that_fails_before_can_be_repeated(world: FaultyWorld) -> None:
    volume = await world.volume()
    owner = await acquire(volume)
    world.faults.fail("commit")
    with pytest.raises(StoreError):
        await volume.commit(owner, 1, batch_of(Counter("a", 1)))
    assert await volume.last_batch(owner) == 0
    await volume.commit(owner, 1, batch_of(Counter("a", 1)))
    assert await volume.last_batch(owner) == 1


async def test_a_commit_that_fails_after_is_there(world: FaultyWorld) -> None:
    volume = await world.volume()
    owner = await acquire(volume)
    world.faults.fail("commit", nth=2, when="after")
    await volume.commit(owner, 1, NOTHING)
    with pytest.raises(StoreError):
        await volume.commit(owner, 2, batch_of(Counter("a", 1)))
    assert await volume.last_batch(owner) == 2
    with pytest.raises(Fenced):
        await volume.commit(owner, 2, batch_of(Counter("a", 1)))
    assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("a", 1)]


async def test_a_given_error_is_raised(world: FaultyWorld) -> None:
    volume = await world.volume()
    owner = await acquire(volume)
    world.faults.fail("renew", error=Fenced("injected"))
    with pytest.raises(Fenced, match="injected"):
        await volume.renew(owner, ttl_s=1)
    await volume.renew(owner, ttl_s=1)


async def test_a_held_call_waits_where_the_test_says(world: FaultyWorld) -> None:
    volume = await world.volume()
    owner = await acquire(volume)
    await volume.commit(owner, 1, batch_of(Counter("a", 1)))
    held = world.faults.hold("load", when="after")
    loading = asyncio.create_task(volume.load({COUNTER: [("a",)]}, {}))
    await held.reached()
    await volume.commit(owner, 2, batch_of(Counter("a", 2)))
    assert not loading.done()
    held.release()
    assert (await loading).rows[COUNTER] == [Counter("a", 1)]  # read before the commit, answered after it
    held = world.faults.hold("load", when="before")
    loading = asyncio.create_task(volume.load({COUNTER: [("a",)]}, {}))
    await held.reached()
    await volume.commit(owner, 3, batch_of(Counter("a", 3)))
    held.release()
    assert (await loading).rows[COUNTER] == [Counter("a", 3)]


async def test_a_dead_store_answers_nothing_more(world: FaultyWorld) -> None:
    volume = await world.volume()
    owner = await acquire(volume)
    held = world.faults.hold("scan", when="before")
    scanning = asyncio.create_task(volume.scan(COUNTER, after=None, limit=1))
    await held.reached()
    world.faults.die(nth=2, when="after")
    await volume.commit(owner, 1, NOTHING)
    with pytest.raises(StoreError):
        await volume.commit(owner, 2, batch_of(Counter("a", 1)))
    held.release()
    for call in (scanning, volume.load({}, {}), volume.last_batch(owner), volume.release(owner)):
        with pytest.raises(StoreError, match="dead"):
            await call
    world.faults.dead = False
    assert await volume.last_batch(owner) == 2


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.0), (0.0, 1.0)])
async def test_chances_strike_commits_only(world: FaultyWorld, before: float, after: float) -> None:
    volume = await world.volume()
    owner = await acquire(volume)
    world.faults.chances(before=before, after=after)
    with pytest.raises(StoreError):
        await volume.commit(owner, 1, NOTHING)
    assert await volume.last_batch(owner) == int(after)
    world.faults.chances()
    await volume.commit(owner, 1 + int(after), NOTHING)


async def test_one_seed_gives_one_course_of_events(seed: int) -> None:
    async def course() -> list[str]:
        world = FaultyWorld(Faults(seed=seed, max_yields=20))
        volume = await world.volume()
        finished: list[str] = []

        async def load(name: str) -> None:
            for _ in range(10):
                await volume.load({COUNTER: [(name,)]}, {})
                finished.append(name)

        async with asyncio.TaskGroup() as tasks:
            for name in "abc":
                tasks.create_task(load(name))
        return finished

    first = await course()
    assert first == await course()
    assert first != sorted(first)
    assert first != list("abc") * 10


async def test_delays_pass_on_a_virtual_clock() -> None:
    clock = VirtualClock(start=50.0)
    faults = Faults(seed=1, sleep=clock.sleep, max_delay_s=10.0)
    world = FaultyWorld(faults)
    volume = await world.volume()
    loading = asyncio.create_task(volume.load({COUNTER: [("a",)]}, {}))
    await clock.until_sleepers(1)
    await clock.advance(0.000001)
    assert not loading.done()
    await clock.advance(20.0)
    await loading
    assert clock.time() == pytest.approx(70.000001)
    assert faults.calls == {"load": 1}


async def test_a_virtual_clock_wakes_sleepers_in_order_of_their_times() -> None:
    clock = VirtualClock(start=0.0)
    woken: list[tuple[float, float]] = []

    async def sleeper(delay_s: float) -> None:
        await clock.sleep(delay_s)
        woken.append((delay_s, clock.time()))

    async with asyncio.TaskGroup() as tasks:
        for delay_s in (3.0, 1.0, 2.0, 5.0):
            tasks.create_task(sleeper(delay_s))
        await clock.until_sleepers(4)
        await clock.advance(4.0)
        assert woken == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
        await clock.advance(1.0)
    assert woken[-1] == (5.0, 5.0)
