"""Several volumes share the memory for rows: who may use how much, and who makes room."""

from __future__ import annotations

import gc
import random

import pytest

from chunkstore.geometry import SliceId
from metasvc.engine import Engine, EngineSession
from metasvc.engine.memory import ROW_COST_BYTES, Rows
from metasvc.engine.memory_budget import LOOKS, MemoryBudget
from metasvc.model import ROOT_INO, SetAttr, Slice, SliceKind
from metasvc.store.memory import MemoryStore
from metasvc.store.tables import SLICE
from tests.metasvc.engine.volumes import ROOT, format_volume

LIMIT = 64_000


class Holder:
    """Something that grows, and looks at the budget as rows do."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._next_look_bytes = 0
        self.young_bytes = 0
        self.old_bytes = 0
        self.turns = 0
        budget.join(self)

    @property
    def held_bytes(self) -> int:
        return self.young_bytes + self.old_bytes

    def turn_generation(self) -> None:
        self.old_bytes, self.young_bytes = self.young_bytes, 0
        self._next_look_bytes = self._budget.step_bytes
        self.turns += 1

    def grow(self, size_bytes: int) -> None:
        self.young_bytes += size_bytes
        if self.young_bytes > self._next_look_bytes:
            self._budget.make_room(self)
            self._next_look_bytes = self.young_bytes + self._budget.step_bytes


def test_a_volume_that_is_alone_uses_the_whole_limit() -> None:
    budget = MemoryBudget(LIMIT)
    alone = Holder(budget)
    most = 0
    for _ in range(LIMIT // 10):
        alone.grow(100)
        most = max(most, alone.held_bytes)
    assert LIMIT * 0.95 <= most <= LIMIT * (1 + 2 / LOOKS)


def test_one_that_does_nothing_makes_room_for_another_down_to_its_share() -> None:
    budget = MemoryBudget(LIMIT)
    first = Holder(budget)
    for _ in range(LIMIT // 50):
        first.grow(50)
    assert first.held_bytes > LIMIT // 2
    second = Holder(budget)
    for _ in range(LIMIT // 10):
        second.grow(50)
        assert budget.held_bytes <= LIMIT * (1 + 3 / LOOKS)
    assert second.held_bytes >= LIMIT // 4
    assert budget.allowance_bytes(second) >= LIMIT // 2


def test_one_that_keeps_to_its_share_loses_nothing_however_much_another_wants() -> None:
    budget = MemoryBudget(LIMIT)
    small, greedy = Holder(budget), Holder(budget)
    small.grow(LIMIT // 8)
    for _ in range(LIMIT):
        greedy.grow(100)
    assert small.turns == 0
    assert small.held_bytes == LIMIT // 8
    assert budget.held_bytes <= LIMIT * (1 + 3 / LOOKS)


@pytest.mark.parametrize("seed", range(20))
def test_all_together_keep_to_the_limit_whoever_grows(seed: int) -> None:
    rand = random.Random(seed)
    budget = MemoryBudget(LIMIT)
    holders = [Holder(budget) for _ in range(rand.randint(1, 6))]
    slack_bytes = len(holders) * (LIMIT // LOOKS + 700) * 3
    busy = rand.choice(holders)
    for _ in range(5_000):
        if rand.random() < 0.01:
            busy = rand.choice(holders)
        (busy if rand.random() < 0.8 else rand.choice(holders)).grow(rand.randint(1, 700))
        assert budget.held_bytes <= LIMIT + slack_bytes


def test_many_volumes_keep_to_the_limit_as_well() -> None:
    budget = MemoryBudget(1 << 30)
    holders = [Holder(budget) for _ in range(1_000)]
    for _ in range(300):
        for holder in holders:
            holder.grow(7_000)
    assert budget.held_bytes <= 1.2 * budget.limit_bytes


def test_the_share_of_one_that_is_gone_is_free_again() -> None:
    budget = MemoryBudget(LIMIT)
    stays, goes = Holder(budget), Holder(budget)
    goes.grow(LIMIT // 2)
    stays.grow(1)
    assert budget.allowance_bytes(stays) <= LIMIT // 2 + 1
    del goes
    gc.collect()
    assert budget.allowance_bytes(stays) == LIMIT


NAMES = [b"f%05d" % number for number in range(2_000)]


async def _fill(engine: Engine) -> None:
    async with await EngineSession.begin(engine, host="test", pid=1) as session:
        for name in NAMES:
            made = await session.create(ROOT, ROOT_INO, name, mode=0o644, exclusive=True)
            await session.release(made.inode.ino)


async def test_rows_of_two_volumes_share_one_limit() -> None:
    stores = [await format_volume(MemoryStore()) for _ in range(2)]
    budget = MemoryBudget(2_000_000)
    async with (
        await Engine.open(stores[0], address="test", memory=budget) as first,
        await Engine.open(stores[1], address="test", memory=budget) as second,
    ):
        await _fill(first)
        assert first.rows.held_bytes > budget.limit_bytes // 2
        assert first.rows.allowance_bytes >= budget.limit_bytes * 0.9
        before = first.rows.evicted_generations_total
        await _fill(second)
        assert budget.held_bytes <= budget.limit_bytes * (1 + 4 / LOOKS)
        assert first.rows.evicted_generations_total > before
        for engine in (second, first):
            async with await EngineSession.begin(engine, host="test", pid=1) as session:
                page = await session.readdir(ROOT_INO, after=None, limit=5_000)
            assert [entry.name for entry in page.entries] == NAMES


async def test_a_row_that_is_changed_again_and_again_takes_no_more_memory() -> None:
    store = await format_volume(MemoryStore())
    budget = MemoryBudget(2_000_000)
    async with (
        await Engine.open(store, address="test", memory=budget) as engine,
        await EngineSession.begin(engine, host="test", pid=1) as session,
    ):
        made = await session.create(ROOT, ROOT_INO, b"file", mode=0o644, exclusive=True)
        held = engine.rows.held_bytes
        for mode in range(500):
            await session.setattr(ROOT, made.inode.ino, SetAttr(mode=mode))
        assert engine.rows.held_bytes <= held + 10 * ROW_COST_BYTES


async def test_inline_bytes_count_where_the_slice_was_known_to_be_absent() -> None:
    rows = Rows(await format_volume(MemoryStore()), budget=MemoryBudget(2_000_000))
    rows.install(SLICE, 5, None)
    held = rows.held_bytes
    rows.apply({SLICE: {5: Slice(SliceId(5), 30_000, 1, SliceKind.INLINE, bytes(30_000))}}, 1)
    assert rows.held_bytes >= held + 30_000
