"""Dumps while the volume changes: what is loaded is the volume as it was after one batch, exactly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

import pytest

from chunkstore.errors import AtollError
from metasvc.api.dump_stream import Header, PieceKind, Trailer, Unpacker
from metasvc.engine import Engine
from metasvc.engine.dump import CARRIED, DUMPS_MAX, DumpTooSlow, dump
from metasvc.engine.load import Loaded, load
from metasvc.errors import Fenced
from metasvc.model import ROOT_INO, DumpPart, SliceKind
from metasvc.store import Store, VolumeStore
from metasvc.store.packed import unpack_batch
from metasvc.store.tables import COUNTER, INODE, REPLIES, SESSION, SLICE_RANGE, SUSTAINED, TABLES, Key, Row, Table
from tests.metasvc.engine.reference import Reference
from tests.metasvc.engine.test_random_operations import Walker, compare
from tests.metasvc.engine.volumes import ROOT, Opened, format_volume, new_store, opened
from tests.metasvc.store.faulty import Faults, FaultyStore
from tests.metasvc.store.rows_of import Model, apply_to

PAGES = [1, 2, 5, 100]


async def bytes_of(parts: AsyncGenerator[DumpPart, None], rand: random.Random | None = None) -> list[bytes]:
    """Read a dump to its end; with ``rand`` slowly, by turns of the loop."""
    found = []
    async with aclosing(parts):
        async for part in parts:
            found.append(part.data)
            for _ in range(rand.choice((0, 0, 1, 30)) if rand is not None else 0):
                await asyncio.sleep(0)
    return found


async def stream(parts: list[bytes]) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def load_into(store: Store, parts: list[bytes], **options: Any) -> Loaded:
    values = {"tenant": "local", "name": "default", "address": "test", **options}
    return await load(store, stream(parts), **values)


def applied(parts: list[bytes]) -> tuple[Header, Model, Trailer]:
    """Do what a loader does, with the simplest thing that can."""
    unpacker = Unpacker()
    pieces = [piece for part in parts for piece in unpacker.feed(part)]
    unpacker.end()
    model: Model = {table: {} for table in TABLES}
    for kind, raw in pieces:
        if kind is PieceKind.ROWS:
            apply_to(model, unpack_batch(raw))
    return Header.parse(pieces[0][1]), model, Trailer.parse(pieces[-1][1])


async def all_rows(volume: VolumeStore) -> dict[Table, list[Row]]:
    """Return all rows of all tables."""
    return {table: await volume.scan(table, after=None, limit=1_000_000) for table in TABLES}


class History:
    """The rows of a volume after each batch, by what the committer tells."""

    def __init__(self, engine: Engine, rows: dict[Table, list[Row]]) -> None:
        self._engine = engine
        self._now: Model = {table: {table.key_of(row): row for row in rows[table]} for table in TABLES}
        self.after: dict[int, Model] = {}
        self._note()
        engine.committer.taps.append(self._hear)

    @classmethod
    async def begin(cls, engine: Engine) -> History:
        await engine.settled()
        return cls(engine, await all_rows(engine.store))

    def _note(self) -> None:
        self.after[self._engine.rows.durable_batch] = {table: dict(rows) for table, rows in self._now.items()}

    def _hear(self, changes: Mapping[Table, Mapping[Any, Row | None]]) -> None:
        for table, rows in changes.items():
            for key, row in rows.items():
                whole: Key = key if table.grouped else (key,)
                if row is None:
                    self._now[table].pop(whole, None)
                else:
                    self._now[table][whole] = row
        self._note()


async def sustained_and_linked(volume: Opened) -> None:
    """Make what random operations make rarely: xattrs, a quota, a nameless file that is open."""
    made = await volume.meta.create(ROOT, ROOT_INO, b"nameless", mode=0o600, exclusive=True)
    await volume.write(made.inode.ino, 0, b"still open")
    await volume.meta.setxattr(ROOT, made.inode.ino, b"user.x", b"y" * 3000, flags=0)
    await volume.meta.unlink(ROOT, ROOT_INO, b"nameless")


@pytest.mark.parametrize("seed", range(8))
async def test_a_dump_beside_random_operations_is_the_volume_after_its_last_batch(seed: int) -> None:
    rand = random.Random(seed)
    faults = Faults(seed=seed, max_yields=6)
    source = FaultyStore(await new_store(), faults)
    reference = Reference()
    volume_store = await format_volume(source, trash_days=rand.choice([0.0, 1.0]))
    async with opened(volume_store, memory_bytes=rand.choice([20_000, 50_000_000])) as volume:
        tops = [b"task-%d" % number for number in range(4)]
        for top in tops:
            await volume.meta.mkdir(ROOT, ROOT_INO, top, mode=0o755)
            reference.make((top,), directory=True)
        walkers = [
            Walker(volume, reference, random.Random(seed * 10 + number), (top,)) for number, top in enumerate(tops)
        ]
        for walker in walkers:
            for _ in range(rand.choice([0, 40])):
                await walker.step()
        await sustained_and_linked(volume)
        history = await History.begin(volume.engine)
        faults.chances(after=0.02)
        dumped = asyncio.Event()

        async def work(walker: Walker) -> None:
            while not dumped.is_set():
                await walker.step()

        async def take() -> list[list[bytes]]:
            found = []
            for _ in range(3):
                parts = dump(volume.engine, page_rows=rand.choice(PAGES), wide_page_rows=rand.choice(PAGES))
                found.append(await bytes_of(parts, rand))
            dumped.set()
            return found

        async with asyncio.TaskGroup() as tasks:
            taking = tasks.create_task(take())
            for walker in walkers:
                tasks.create_task(work(walker))
        faults.chances()
        batches = [applied(parts)[2].last_batch for parts in taking.result()]
        for parts, batch in zip(taking.result(), batches, strict=True):
            _, model, _ = applied(parts)
            expected = history.after[batch]
            for table in TABLES:
                assert model[table] == (expected[table] if table in CARRIED else {}), table
        assert batches == sorted(batches)
        assert batches[-1] > min(history.after), "nothing changed under the dumps: the test tests nothing"
    await _loaded_is(taking.result()[-1], history.after[batches[-1]])


async def _loaded_is(parts: list[bytes], expected: Model) -> None:
    """Load a dump into a new store: the rows must be there, and a volume that is consistent."""
    target = await new_store()
    loaded = await load_into(target, parts)
    assert loaded.format.loading is False
    rows = await all_rows(volume := await target.open_volume("local", "default"))
    for table in TABLES:
        found = {table.key_of(row): row for row in rows[table]}
        if table is COUNTER:
            fixed = {key: row for key, row in found.items() if not key[0].startswith("next_")}
            assert fixed == {key: row for key, row in expected[table].items() if not key[0].startswith("next_")}
            assert all(found[key][1] > row[1] for key, row in expected[table].items() if key not in fixed)
        else:
            assert found == (expected[table] if table in CARRIED else {}), table
    async with opened(volume) as again:
        assert (await all_rows(volume))[SUSTAINED] == [], "nobody has anything open in a loaded volume"
        assert await again.problems() == []


async def test_a_loaded_volume_has_the_tree_and_goes_on(seed: int) -> None:
    reference = Reference()
    store = await new_store()
    async with opened(await format_volume(store)) as volume:
        walker = Walker(volume, reference, random.Random(seed))
        for _ in range(200):
            await walker.step()
        parts = await bytes_of(volume.admin.dump())
    target = await new_store()
    await load_into(target, parts)
    async with opened(await target.open_volume("local", "default")) as volume:
        await compare(volume, reference.root, ROOT_INO)
        walker = Walker(volume, reference, random.Random(seed + 1))
        for _ in range(100):
            await walker.step()
        await compare(volume, reference.root, ROOT_INO)
        again = await bytes_of(volume.admin.dump())
    assert applied(again)[0].format.uuid == applied(parts)[0].format.uuid


async def test_a_nameless_file_that_was_open_is_gone_from_a_loaded_volume_with_its_space() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        before = (await volume.admin.status()).statfs.used_inodes
        await sustained_and_linked(volume)
        parts = await bytes_of(volume.admin.dump())
    _, model, _ = applied(parts)
    assert len(model[SUSTAINED]) == 1
    assert not model[SESSION]
    assert not model[SLICE_RANGE]
    assert not model[REPLIES]
    target = await new_store()
    await load_into(target, parts)
    async with opened(await target.open_volume("local", "default")) as volume:
        assert (await volume.admin.status()).statfs.used_inodes == before


async def test_no_slice_id_of_the_original_or_of_an_earlier_load_is_given_out_again() -> None:
    given: list[set[int]] = []

    async def give_out(volume: Opened) -> None:
        given.append({number for _ in range(30) for number in await volume.meta.allocate_slices(5000)})

    async with opened(await format_volume(await new_store())) as volume:
        parts = await bytes_of(volume.admin.dump())
        await give_out(volume)  # after the dump
    # Twice from the same dump, and from a dump of a loaded volume; one with a clock that stands at 1970.
    now_ns = [1_700_000_000_000_000_000, 1_700_000_001_000_000_000, 0]
    dumps = []
    for number in range(3):
        target = await new_store()
        await load_into(target, parts, clock_ns=lambda number=number: now_ns[number])
        async with opened(await target.open_volume("local", "default")) as volume:
            await give_out(volume)
            dumps.append(await bytes_of(volume.admin.dump()))
    target = await new_store()
    await load_into(target, dumps[0], clock_ns=lambda: now_ns[0])
    async with opened(await target.open_volume("local", "default")) as volume:
        await give_out(volume)
    assert sum(map(len, given)) == len(set.union(*given))
    assert max(set.union(*given)) < 1 << 53


async def test_changes_that_pile_up_end_the_dump_and_not_the_volume() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        parts = dump(volume.engine, tapped_bytes=20_000)
        async with aclosing(parts):
            await anext(parts)
            for number in range(100):
                await volume.meta.mkdir(ROOT, ROOT_INO, b"%d" % number, mode=0o755)
            with pytest.raises(DumpTooSlow, match="faster place"):
                await bytes_of(parts)
        assert volume.engine.committer.taps == []
        # One that is read as fast as things change is not concerned, however much changes.
        quick = dump(volume.engine, tapped_bytes=20_000, page_rows=10)
        async with aclosing(quick):
            number = 100
            async for _ in quick:
                if number < 200:
                    await volume.meta.mkdir(ROOT, ROOT_INO, b"%d" % number, mode=0o755)
                    number += 1


async def test_dumps_are_few_and_one_that_is_given_up_leaves_nothing() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        begun = [dump(volume.engine) for _ in range(DUMPS_MAX)]
        for parts in begun:
            await anext(parts)
        with pytest.raises(AtollError, match="are under way"):
            await bytes_of(dump(volume.engine))
        for parts in begun:
            await parts.aclose()
        assert volume.engine.committer.taps == []
        assert applied(await bytes_of(dump(volume.engine)))[2].row_count > 0


async def test_a_dump_of_an_owner_that_lost_the_volume_has_no_end() -> None:
    faults = Faults()
    store = FaultyStore(await new_store(), faults)
    engine = await Engine.open(await format_volume(store), address="first")
    parts = dump(engine)
    seen = [(await anext(parts)).data]
    # By the store's word, while this owner's clock says nothing.
    faults.fail("renew", error=Fenced("injected: another took over"))
    with pytest.raises(Fenced):
        seen += await bytes_of(parts)
    unpacker = Unpacker()
    assert [kind for part in seen for kind, _ in unpacker.feed(part)][-1] is not PieceKind.TRAILER
    await engine.close()


async def test_rows_of_every_size_go_through() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        made = await volume.meta.create(ROOT, ROOT_INO, b"\xff\x01", mode=0o600, exclusive=True)
        for number in range(40):
            await volume.write(made.inode.ino, number * 40_000, random.randbytes(32_768))
        for number in range(30):
            await volume.meta.setxattr(ROOT, made.inode.ino, b"user.%d" % number, bytes(60_000), flags=0)
        content = await volume.read(made.inode.ino)
        parts = await bytes_of(volume.admin.dump())
        await volume.meta.release(made.inode.ino)
    target = await new_store()
    loaded = await load_into(target, parts)
    assert loaded.rows == sum(count.puts + count.deletes for count in loaded.trailer.rows.values())
    async with opened(await target.open_volume("local", "default")) as volume:
        inode = await volume.meta.lookup(ROOT_INO, b"\xff\x01")
        assert await volume.read(inode.ino) == content
        assert await volume.meta.getxattr(inode.ino, b"user.29") == bytes(60_000)
        slices = await volume.admin.live_slices(after=None, limit=100)
        assert {row.kind for row in slices} == {SliceKind.INLINE}


async def test_the_format_of_the_end_counts() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        parts = volume.admin.dump()
        first = await anext(parts)
        await volume.admin.configure(capacity_bytes=1 << 40, max_inodes=None, trash_days=None)
        rest = await bytes_of(parts)
    loaded = await load_into(await new_store(), [first.data, *rest], name="other", bucket_url="file:///elsewhere")
    assert (loaded.format.capacity_bytes, loaded.format.name) == (1 << 40, "other")
    assert loaded.format.bucket_url == "file:///elsewhere"
    assert loaded.header.format.capacity_bytes == 0


def _inodes(model: Model) -> int:
    return len(model[INODE])


async def test_pages_that_end_where_the_table_does_are_no_matter() -> None:
    volume_store: VolumeStore = await format_volume(await new_store())
    async with opened(volume_store) as volume:
        for number in range(9):
            await volume.meta.mkdir(ROOT, ROOT_INO, b"%d" % number, mode=0o755)
        for page_rows in (1, 2, 5, 10, 11):
            assert _inodes(applied(await bytes_of(dump(volume.engine, page_rows=page_rows)))[1]) == 10
