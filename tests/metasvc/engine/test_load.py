"""Loads: nobody can open a volume that is not whole, and what a load leaves that did not come to its end is replaced."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest

from chunkstore.errors import AtollError, FormatUnsupported
from metasvc.api.dump_stream import DumpDamaged, Header, Packer, PieceKind, RowCount, Trailer
from metasvc.engine import Engine
from metasvc.engine import load as loading
from metasvc.engine.dump import CARRIED
from metasvc.engine.load import load
from metasvc.errors import VolumeExists, VolumeIncomplete
from metasvc.model import ROOT_INO, Counter
from metasvc.store import Store
from metasvc.store.packed import TABLE_CODES, pack_batch
from metasvc.store.tables import COUNTER, INODE, Batch
from tests.metasvc.engine.test_dump import bytes_of, load_into, stream
from tests.metasvc.engine.volumes import ROOT, format_volume, new_store, opened, volume_format
from tests.metasvc.store.faulty import Faults, FaultyStore
from tests.metasvc.store.rows_of import batch_of


async def dumped(count: int = 50) -> bytes:
    """Return a dump of a volume with some directories."""
    async with opened(await format_volume(await new_store())) as volume:
        for number in range(count):
            await volume.meta.mkdir(ROOT, ROOT_INO, b"%d" % number, mode=0o755)
        return b"".join(await bytes_of(volume.admin.dump()))


async def names_of(store: Store) -> set[bytes]:
    async with opened(await store.open_volume("local", "default")) as volume:
        return {entry.name for entry in (await volume.meta.readdir(ROOT_INO, after=None, limit=1000)).entries}


class Slow:
    """The bytes of a dump, of which the last come when the test says so."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.go_on = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._data[:-10]
        await self.go_on.wait()
        yield self._data[-10:]


async def under_way(store: Store) -> None:
    """Wait until a volume is being loaded."""
    async with asyncio.timeout(20):
        while not any(form.loading for form in await store.list_volumes()):
            await asyncio.sleep(0.005)


async def test_nobody_opens_a_volume_before_it_is_whole() -> None:
    data, store = await dumped(), await new_store()
    slow = Slow(data)
    task = asyncio.create_task(load(store, aiter(slow), tenant="local", name="default", address="test"))
    await under_way(store)
    with pytest.raises(VolumeIncomplete, match="not loaded whole"):
        await Engine.open(await store.open_volume("local", "default"), address="too early")
    with pytest.raises(VolumeExists):
        await store.create_volume(volume_format(), Batch({}, {}))
    slow.go_on.set()
    await task
    assert len(await names_of(store)) == 50


@pytest.mark.parametrize("end", [0, 7, 8, 100, -200, -1])
async def test_of_a_dump_that_was_cut_off_nothing_is_left(end: int) -> None:
    data, store = await dumped(), await new_store()
    with pytest.raises(DumpDamaged, match="cut off"):
        await load_into(store, [data[:end]])
    assert list(await store.list_volumes()) == []
    await load_into(store, [data])
    assert len(await names_of(store)) == 50


async def test_of_a_damaged_dump_nothing_is_left() -> None:
    data, store = await dumped(), await new_store()
    for place in range(60, len(data), len(data) // 7):
        changed = bytearray(data)
        changed[place] ^= 4
        with pytest.raises((DumpDamaged, FormatUnsupported)):
            await load_into(store, [bytes(changed)])
        assert list(await store.list_volumes()) == []


async def test_a_load_that_is_cancelled_leaves_nothing() -> None:
    data, store = await dumped(), await new_store()
    task = asyncio.create_task(load(store, aiter(Slow(data)), tenant="local", name="default", address="test"))
    await under_way(store)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(await store.list_volumes()) == []


async def test_what_a_load_left_that_died_is_replaced_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "OWNER_TTL_S", 1.0)
    data, store = await dumped(), await new_store()
    faults = Faults()
    task = asyncio.create_task(
        load(FaultyStore(store, faults), aiter(Slow(data)), tenant="local", name="default", address="the dead")
    )
    await under_way(store)
    async with asyncio.timeout(20):
        while not faults.calls["acquire"]:
            await asyncio.sleep(0.005)
    # From now on the store answers it nothing, as if its process were dead: it cannot clean up.
    faults.dead = True
    monkeypatch.setattr(loading, "REMOVE_S", 0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    (left,) = await store.list_volumes()
    assert left.loading
    await load_into(store, [data])  # waits for its lease to end, where only the lease tells that it is dead
    assert len(await names_of(store)) == 50


async def test_a_volume_that_is_there_is_not_touched() -> None:
    data, store = await dumped(), await new_store()
    async with opened(await format_volume(store, uuid="99999999-2222-3333-4444-555555555555")) as volume:
        await volume.meta.mkdir(ROOT, ROOT_INO, b"mine", mode=0o755)
    with pytest.raises(VolumeExists):
        await load_into(store, [data])
    assert await names_of(store) == {b"mine"}


async def test_two_volumes_of_one_uuid_are_refused_in_one_store() -> None:
    data, store = await dumped(), await new_store()
    await load_into(store, [data])
    with pytest.raises(VolumeExists, match="delete each other's"):
        await load_into(store, [data], name="second")
    assert [form.name for form in await store.list_volumes()] == ["default"]


async def test_commits_that_fail_for_a_moment_are_made_again() -> None:
    data, faults = await dumped(), Faults(seed=3)
    store = FaultyStore(await new_store(), faults)
    faults.fail("commit")
    faults.fail("commit", nth=2, when="after")
    await load_into(store, [data])
    assert len(await names_of(store)) == 50


async def test_a_store_that_stays_away_ends_the_load() -> None:
    data, faults = await dumped(), Faults(seed=3)
    inner = await new_store()
    faults.die(nth=3)
    with pytest.raises(AtollError):
        await load_into(FaultyStore(inner, faults), [data])
    assert all(form.loading for form in await inner.list_volumes())


def crafted(*batches: Batch, tables: dict[str, tuple[int, tuple[str, ...]]] | None = None, **trailer: object) -> bytes:
    """Return a dump of what no volume is."""
    packer = Packer()
    named = {table.name: (TABLE_CODES[table], table.columns) for table in CARRIED} if tables is None else tables
    counts: dict[str, RowCount] = {}
    for batch in batches:
        for table, rows in batch.puts.items():
            counts.setdefault(table.name, RowCount()).puts += len(rows)
    end = dataclasses.replace(Trailer(volume_format(), 5, counts), **trailer)  # type: ignore[arg-type]
    return b"".join(
        [
            packer.piece(PieceKind.HEADER, Header(volume_format(), 1, named).packed()),
            *(packer.piece(PieceKind.ROWS, pack_batch(batch)) for batch in batches),
            packer.piece(PieceKind.TRAILER, end.packed()),
        ]
    )


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (crafted(), DumpDamaged, "no root"),
        (crafted(batch_of(Counter("next_ino", 20))), DumpDamaged, "no root"),
        (crafted(batch_of(Counter("n", 1)), rows={}), DumpDamaged, "other rows"),
        (crafted(batch_of(Counter("n", 1)), tables={}), DumpDamaged, "does not name"),
        (crafted(tables={"color": (99, ("red",))}), FormatUnsupported, "'color'"),
        (crafted(tables={"inode": (1, (*INODE.columns, "color"))}), FormatUnsupported, "'inode'"),
        (crafted(tables={"inode": (2, INODE.columns)}), FormatUnsupported, "'inode'"),
        (crafted(format=volume_format(uuid="another")), DumpDamaged, "ends with another"),
    ],
    ids=["empty", "counters only", "wrong counts", "unnamed table", "new table", "new column", "moved table", "uuid"],
)
async def test_what_no_dump_of_ours_says_is_refused(data: bytes, error: type[AtollError], match: str) -> None:
    store = await new_store()
    with pytest.raises(error, match=match):
        await load_into(store, [data])
    assert list(await store.list_volumes()) == []


async def test_rows_that_are_none_are_damage_though_the_digest_is_right() -> None:
    for raw in (b"x", pack_batch(batch_of(Counter("n", 1)))[:-1], b"\x0c\0\2\0\xff\xff\xff\xff"):
        packer = Packer()
        tables = {COUNTER.name: (TABLE_CODES[COUNTER], COUNTER.columns)}
        data = [
            packer.piece(PieceKind.HEADER, Header(volume_format(), 1, tables).packed()),
            packer.piece(PieceKind.ROWS, raw),
        ]
        with pytest.raises(DumpDamaged, match="take another dump"):
            await load_into(await new_store(), data)


async def test_the_bytes_come_in_any_pieces() -> None:
    data, store = await dumped(), await new_store()
    loaded = await load_into(store, [data[index : index + 1] for index in range(len(data))])
    assert loaded.format.name == "default"
    assert len(await names_of(store)) == 50


async def test_many_commits_and_what_is_told_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "COMMIT_ROWS", 1)
    data, store = await dumped(), await new_store()
    told: list[tuple[int, int]] = []
    loaded = await load(
        store, stream([data]), tenant="local", name="default", address="test", told=lambda *state: told.append(state)
    )
    assert told == sorted(told)
    assert told[-1] == (loaded.rows, len(data))
    assert len(told) > 3
    assert len(await names_of(store)) == 50
