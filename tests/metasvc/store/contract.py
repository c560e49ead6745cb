"""What every store must do: the contract suite.

A store's test module makes a subclass of StoreContract and a fixture ``world`` that returns a World of that store.
"Process" below means a Store of its own on the same database, as another process would open it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import strategies as st

from chunkstore.errors import AtollError
from chunkstore.geometry import SliceId
from metasvc.errors import Fenced, NotOwner, StoreError, VolumeExists, VolumeMissing
from metasvc.model import ROOT_INO, Chunk, Counter, Dentry, Ino, Inode, Link, Session, SessionId, Slice, Xattr
from metasvc.store import Loaded, Ownership, Store, VolumeStore
from metasvc.store.tables import (
    CHUNK,
    COUNTER,
    DENTRY,
    INODE,
    LINK,
    SESSION,
    SLICE,
    TABLES,
    XATTR,
    Batch,
    Key,
    Row,
    Table,
)
from tests.metasvc.store.rows_of import (
    INT64_MAX,
    INT64_MIN,
    Model,
    apply_to,
    batch_of,
    batches,
    column_types,
    example_row,
    volume_format,
)

TTL_S = 30.0
NOTHING = Batch({}, {})


class World(ABC):
    """One database, the processes that have it open, and the power to end an owner's claim."""

    lasting: bool = False
    """Whether rows outlive the last process."""

    def __init__(self) -> None:
        self._stores: list[Store] = []

    @abstractmethod
    async def open_store(self) -> Store:
        """Open the database as one more process would."""

    @abstractmethod
    async def lapse(self) -> None:
        """End the claim of the owner of volume tenant/volume, as if it had died, without its noticing it."""

    async def show(self, volume: VolumeStore) -> None:  # noqa: B027
        """Have other processes see all that was committed through a handle, if that takes the store a moment."""

    async def process(self) -> Store:
        """Return the store of one more process."""
        store = await self.open_store()
        self._stores.append(store)
        return store

    async def volume(self, *, tenant: str = "tenant", name: str = "volume") -> VolumeStore:
        """Open a volume in one more process; the first time create it, without rows."""
        store = await self.process()
        with contextlib.suppress(VolumeExists):
            await store.create_volume(volume_format(tenant=tenant, name=name), NOTHING)
        return await store.open_volume(tenant, name)

    async def end_processes(self) -> None:
        """Close all stores."""
        while self._stores:
            await self._stores.pop().close()

    async def die(self) -> None:
        """End all processes, and wait until nobody takes an owner among them for alive."""
        await self.end_processes()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[World]:
        """Close all stores in the end."""
        try:
            yield self
        finally:
            await self.end_processes()


async def acquire(volume: VolumeStore, *, nonce: str = "first", address: str = "host-1:4711") -> Ownership:
    """Take the ownership."""
    return await volume.acquire(nonce=nonce, address=address, ttl_s=TTL_S)


async def all_rows(volume: VolumeStore, *, page: int = 1000) -> dict[Table, list[Row]]:
    """Return all rows of all tables in order, page by page."""
    found: dict[Table, list[Row]] = {}
    for table in TABLES:
        rows = found[table] = []
        after: Key | None = None
        while True:
            part = await volume.scan(table, after=after, limit=page)
            rows += part
            if len(part) < page:
                break
            after = table.key_of(part[-1])
    return found


def in_order(model: Model) -> dict[Table, list[Row]]:
    """Return what all_rows() should return."""
    return {table: [rows[key] for key in sorted(rows)] for table, rows in model.items()}


def loaded(answer: Loaded, table: Table) -> list[Row]:
    """Return the rows of a table in an answer, sorted."""
    return sorted(answer.rows.get(table, []))


class StoreContract:
    """The suite. Each test has a world of its own."""

    # -- volumes --------------------------------------------------------------------------------------------------

    async def test_a_new_volume_has_its_format_and_first_rows(self, world: World) -> None:
        async with world.running():
            store = await world.process()
            first = batch_of(example_row(INODE, 1), Counter("next_ino", 2))
            await store.create_volume(volume_format(capacity_bytes=1 << 50, trash_days=1.25), first)
            volume = await (await world.process()).open_volume("tenant", "volume")
            assert volume.format == volume_format(capacity_bytes=1 << 50, trash_days=1.25)
            rows = await all_rows(volume)
            assert rows[INODE] == [example_row(INODE, 1)]
            assert rows[COUNTER] == [Counter("next_ino", 2)]
            assert sum(map(len, rows.values())) == 2

    async def test_a_volume_is_created_once(self, world: World) -> None:
        async with world.running():
            store = await world.process()
            await store.create_volume(volume_format(), batch_of(Counter("a", 1)))
            with pytest.raises(VolumeExists, match="tenant/volume"):
                await store.create_volume(volume_format(uuid="another"), batch_of(Counter("b", 2)))
            volume = await store.open_volume("tenant", "volume")
            assert volume.format.uuid == "uuid-of-tenant-volume"
            assert (await all_rows(volume))[COUNTER] == [Counter("a", 1)]

    async def test_a_volume_that_is_not_there_is_missing(self, world: World) -> None:
        async with world.running():
            store = await world.process()
            await store.create_volume(volume_format(), NOTHING)
            for tenant, name in (("tenant", "other"), ("other", "volume"), ("volume", "tenant"), ("", "")):
                with pytest.raises(VolumeMissing):
                    await store.open_volume(tenant, name)
                with pytest.raises(VolumeMissing):
                    await store.delete_volume(tenant, name)

    async def test_volumes_are_listed_by_tenant_and_name(self, world: World) -> None:
        async with world.running():
            store = await world.process()
            assert list(await store.list_volumes()) == []
            addresses = [("b", "x"), ("a", "z"), ("a", "b"), ("\u00e9", "a"), ("ab", "a"), ("Z", "a")]
            for tenant, name in addresses:
                await store.create_volume(volume_format(tenant=tenant, name=name), NOTHING)
            listed = [(found.tenant, found.name) for found in await (await world.process()).list_volumes()]
            assert listed == sorted(addresses)

    async def test_volumes_of_one_database_do_not_see_each_other(self, world: World) -> None:
        async with world.running():
            volumes = [await world.volume(), await world.volume(name="other"), await world.volume(tenant="other")]
            models: list[Model] = []
            for number, volume in enumerate(volumes):
                owner = await acquire(volume, nonce=f"nonce-{number}")
                assert owner.epoch == 1
                puts: dict[Table, list[Row]] = {}
                for table in TABLES:
                    # Keys 20 to 24 in all of them with different values, and five keys more that only one has.
                    values = [table.key_of(example_row(table, key)) for key in range(20, 25)]
                    others = [example_row(table, 1000 * number + key)[table.key_size :] for key in range(20, 25)]
                    puts[table] = [table.row._make(key + rest) for key, rest in zip(values, others, strict=True)]
                    puts[table] += [example_row(table, 10 * (number + 5) + key) for key in range(5)]
                # Names that stand for inodes of which the volumes have different ones, and some have none.
                puts[DENTRY] = [Dentry(ROOT_INO, b"%d" % key, Ino(key), number) for key in range(20, 80)]
                await volume.commit(owner, 1, Batch(puts, {}))
                models.append({table: {table.key_of(row): row for row in puts[table]} for table in TABLES})
            deletes = {table: [table.key_of(example_row(table, 20))] for table in TABLES}
            owner = await acquire(volumes[1], nonce="nonce-1")
            await volumes[1].commit(owner, 2, Batch({}, deletes))
            apply_to(models[1], Batch({}, deletes))
            for volume, model in zip(volumes, models, strict=True):
                assert await all_rows(volume) == in_order(model)
                await compare_loads(volume, model)

    async def test_a_deleted_volume_is_gone_and_its_name_free(self, world: World) -> None:
        async with world.running():
            volume, other = await world.volume(), await world.volume(name="other")
            owner, other_owner = await acquire(volume), await acquire(other)
            everything = Batch({table: [example_row(table, number) for number in range(30)] for table in TABLES}, {})
            await volume.commit(owner, 1, everything)
            await other.commit(other_owner, 1, everything)
            await volume.release(owner)
            store = await world.process()
            await store.delete_volume("tenant", "volume")
            assert [found.name for found in await store.list_volumes()] == ["other"]
            with pytest.raises(VolumeMissing):
                await store.open_volume("tenant", "volume")
            with pytest.raises(AtollError):
                await acquire(volume)
            await store.create_volume(volume_format(), NOTHING)
            again = await store.open_volume("tenant", "volume")
            assert not any((await all_rows(again)).values())
            assert (await acquire(again)).last_batch == 0
            assert all(len(rows) == 30 for rows in (await all_rows(other)).values())
            await other.commit(other_owner, 2, NOTHING)

    async def test_a_volume_with_an_owner_is_not_deleted(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume, address="host-1:4711")
            store = await world.process()
            with pytest.raises(NotOwner, match="host-1:4711"):
                await store.delete_volume("tenant", "volume")
            await volume.commit(owner, 1, batch_of(Counter("a", 1)))
            await world.show(volume)
            assert await (await store.open_volume("tenant", "volume")).scan(COUNTER, after=None, limit=9) == [
                Counter("a", 1)
            ]

    async def test_the_owner_replaces_the_format(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            changed = volume_format(capacity_bytes=12345, trash_days=0.0)
            await volume.put_format(owner, changed)
            assert volume.format == changed
            assert (await (await world.process()).open_volume("tenant", "volume")).format == changed
            for change in ({"tenant": "x"}, {"name": "x"}, {"uuid": "x"}):
                with pytest.raises(ValueError, match=next(iter(change))):
                    await volume.put_format(owner, volume_format(**change))
            assert volume.format == changed

    async def test_a_closed_handle_answers_nothing(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            await volume.close()
            await volume.close()
            with pytest.raises(StoreError):
                await volume.load({COUNTER: [("a",)]}, {})
            with pytest.raises(StoreError):
                await volume.commit(owner, 1, NOTHING)

    # -- rows -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("table", TABLES, ids=repr)
    async def test_rows_are_put_replaced_and_deleted(self, world: World, table: Table) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            rows = [example_row(table, number) for number in range(40)]
            keys = [table.key_of(row) for row in rows]
            await volume.commit(owner, 1, Batch({table: rows}, {}))
            assert loaded(await volume.load({table: keys}, {}), table) == rows
            if table.key_size < len(table.columns):
                key_size = table.key_size
                changed = [
                    table.row._make(keys[n] + tuple(example_row(table, n + 500)[key_size:])) for n in range(0, 40, 2)
                ]
                await volume.commit(owner, 2, Batch({table: changed}, {table: keys[1::2]}))
                assert loaded(await volume.load({table: keys}, {}), table) == changed
            else:
                await volume.commit(owner, 2, Batch({table: rows[::2]}, {table: keys[1::2]}))
                assert loaded(await volume.load({table: keys}, {}), table) == rows[::2]
            await volume.commit(owner, 3, Batch({}, {table: keys}))
            assert await volume.scan(table, after=None, limit=100) == []
            await volume.commit(owner, 4, Batch({}, {table: keys}))  # deleting what is absent is no error

    async def test_one_batch_changes_all_tables(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            await volume.commit(
                owner, 1, Batch({table: [example_row(table, n) for n in range(20)] for table in TABLES}, {})
            )
            await volume.commit(
                owner,
                2,
                Batch(
                    {table: [example_row(table, n) for n in range(20, 30)] for table in TABLES},
                    {table: [table.key_of(example_row(table, n)) for n in range(10)] for table in TABLES},
                ),
            )
            rows = await all_rows(volume, page=7)
            for table in TABLES:
                assert rows[table] == [example_row(table, n) for n in range(10, 30)]

    @pytest.mark.parametrize("table", TABLES, ids=repr)
    async def test_rows_come_back_as_they_were_at_the_extremes(self, world: World, table: Table) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            extremes: dict[type, list[Any]] = {
                int: [INT64_MIN, INT64_MAX, 0, -1],
                bytes: [b"", bytes(range(256)), b"\0", b"\xff" * 65536],
                str: ["", "\U0010ffff\u00e9 'quoted' \"twice\" ?1", "x" * 4096, " "],
            }
            rows = [table.row._make(extremes[kind][n] for kind in column_types(table)) for n in range(4)]
            await volume.commit(owner, 1, Batch({table: rows}, {}))
            answer = (await volume.load({table: [table.key_of(row) for row in rows]}, {})).rows[table]
            assert sorted(answer) == sorted(rows)
            for row in answer:
                assert type(row) is table.row
                assert [type(value) for value in row] == column_types(table)

    @pytest.mark.parametrize("table", TABLES, ids=repr)
    async def test_many_rows_of_any_bytes_come_back_by_every_way(self, world: World, table: Table, seed: int) -> None:
        rand = random.Random(seed)
        odd = [
            b"",
            b"\0",
            b"\xff\xfe",
            b"\0" * 300,
            "\u00e9\U0001f3dd".encode(),
            b"'\"\\,[]",
            b"\xc3",
            bytes(range(256)),
        ]

        def value(kind: type, number: int, *, is_key: bool) -> Any:
            if kind is int:
                return number if is_key else rand.choice([INT64_MIN, INT64_MAX, 0, rand.randrange(1 << 53, 1 << 60)])
            if kind is str:
                return f"{number:03d} \u00e9 \"'\\"
            # Keys differ; bytes begin or end with anything.
            return rand.choice(odd) + (number.to_bytes(2) if is_key else b"") + rand.randbytes(rand.choice([0, 1, 200]))

        rows = sorted(
            (
                table.row._make(
                    1 if table.grouped and index == 0 else value(kind, number, is_key=index < table.key_size)
                    for index, kind in enumerate(column_types(table))
                )
                for number in range(70)
            ),
            key=table.key_of,
        )
        async with world.running():
            volume = await world.volume()
            await volume.commit(await acquire(volume), 1, Batch({table: list(rows)}, {}))
            keys = [table.key_of(row) for row in rows]
            assert sorted((await volume.load({table: keys}, {})).rows[table]) == sorted(rows)
            assert sorted((await volume.load({table: keys[:9]}, {})).rows[table]) == sorted(rows[:9])
            assert await volume.scan(table, after=None, limit=100) == rows
            assert await volume.scan(table, after=keys[10], limit=20) == rows[11:31]
            if table.grouped:
                assert sorted((await volume.load({}, {table: [1]})).rows[table]) == sorted(rows)
            if table is DENTRY:
                assert await volume.scan_dir(1, after=None, limit=100) == [(row, None) for row in rows]
                assert await volume.scan_dir(1, after=keys[10][1], limit=20) == [(row, None) for row in rows[11:31]]

    async def test_a_load_finds_keys_and_groups_and_omits_what_is_absent(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            dentries = [Dentry(Ino(parent), b"n%d" % n, Ino(n), 0) for parent in (1, 2, 3) for n in range(parent * 2)]
            inode, root = example_row(INODE, 5), example_row(INODE, 1)
            chunks = [Chunk(Ino(5), index, b"refs") for index in range(3)]
            await volume.commit(owner, 1, batch_of(*dentries, inode, root, *chunks))
            answer = await volume.load(
                {INODE: [(5,), (6,)], DENTRY: [(1, b"n0"), (1, b"absent"), (9, b"n0")], XATTR: [(5, b"user.x")]},
                {DENTRY: [2, 3, 8], CHUNK: [5], LINK: [5]},
            )
            assert loaded(answer, INODE) == [inode]
            assert loaded(answer, DENTRY) == [Dentry(Ino(1), b"n0", Ino(0), 0), *dentries[2:]]
            assert loaded(answer, CHUNK) == chunks
            assert loaded(answer, XATTR) == loaded(answer, LINK) == []
            assert set(answer.rows) <= {INODE, DENTRY, XATTR, CHUNK, LINK}
            assert not any((await volume.load({}, {})).rows.values())
            assert not any((await volume.load({INODE: []}, {DENTRY: []})).rows.values())

    @pytest.mark.parametrize("count", [1, 2, 3, 255, 256, 257, 1000])
    async def test_any_number_of_keys_is_loaded_at_once(self, world: World, count: int) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            inodes = [example_row(INODE, number) for number in range(1100)]
            xattrs = [Xattr(Ino(number % 7), b"user.%d" % number, b"v") for number in range(1100)]
            await volume.commit(owner, 1, batch_of(*inodes, *xattrs))
            wanted = [(number * 773 + 5) % 1100 for number in range(count)]  # 773 and 1100 have no common factor
            answer = await volume.load(
                {INODE: [(number,) for number in wanted], XATTR: [XATTR.key_of(xattrs[number]) for number in wanted]},
                {},
            )
            assert loaded(answer, INODE) == sorted(inodes[number] for number in wanted)
            assert loaded(answer, XATTR) == sorted(xattrs[number] for number in wanted)

    async def test_names_of_all_bytes_are_kept_apart_and_in_order_of_memcmp(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            names = [bytes([byte]) for byte in range(256)]
            names += [bytes([byte, 0]) for byte in range(256)]
            names += [b"a" * length for length in range(2, 256)]
            names += [b"\xff" * 255, b"\xc3\xa9", b"e\xcc\x81", b"\xe9", b"A", b"caf\xc3\xa9"]
            names = sorted(set(names), reverse=True)
            dentries = [Dentry(ROOT_INO, name, Ino(number), 0o100000) for number, name in enumerate(names)]
            await volume.commit(owner, 1, batch_of(*dentries))
            scanned = await volume.scan_dir(ROOT_INO, after=None, limit=10_000)
            assert [dentry.name for dentry, _ in scanned] == sorted(names)
            for dentry in dentries[::17]:
                assert (await volume.load({DENTRY: [(1, dentry.name)]}, {})).rows[DENTRY] == [dentry]

    async def test_a_directory_is_scanned_from_a_name_with_inodes(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            names = [b"n%03d" % number for number in range(50)]
            dentries = [Dentry(Ino(7), name, Ino(100 + number), 0) for number, name in enumerate(names)]
            inodes = [example_row(INODE, 100 + number) for number in range(50) if number != 20]
            others = [Dentry(Ino(6), b"zzz", Ino(100), 0), Dentry(Ino(8), b"\0", Ino(100), 0)]
            await volume.commit(owner, 1, batch_of(*dentries, *inodes, *others))
            whole = await volume.scan_dir(7, after=None, limit=1000)
            assert [dentry for dentry, _ in whole] == dentries
            assert [inode for _, inode in whole] == [*inodes[:20], None, *inodes[20:]]
            assert all(type(dentry) is Dentry for dentry, _ in whole)
            assert all(type(inode) is Inode for _, inode in whole if inode is not None)
            assert await volume.scan_dir(7, after=None, limit=3) == whole[:3]
            assert await volume.scan_dir(7, after=b"n009", limit=2) == whole[10:12]
            assert await volume.scan_dir(7, after=b"n009\0", limit=2) == whole[10:12]
            assert await volume.scan_dir(7, after=b"", limit=2) == whole[:2]
            assert await volume.scan_dir(7, after=b"n049", limit=9) == []
            assert await volume.scan_dir(9, after=None, limit=9) == []
            assert await volume.scan_dir(7, after=None, limit=0) == []

    @pytest.mark.parametrize("table", TABLES, ids=repr)
    async def test_a_table_is_scanned_in_order_of_its_key(self, world: World, table: Table) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            rows = [example_row(table, number) for number in range(35)]
            await volume.commit(owner, 1, Batch({table: rows[::-1]}, {}))
            for position in (0, 8, 9, 10, 33):  # at the end of a group of 10 too
                after = table.key_of(rows[position])
                assert await volume.scan(table, after=after, limit=5) == rows[position + 1 : position + 6]
            assert await volume.scan(table, after=table.key_of(rows[34]), limit=5) == []
            assert await volume.scan(table, after=None, limit=0) == []
            for page in (1, 4, 35, 36):
                assert (await all_rows(volume, page=page))[table] == rows
            await volume.commit(owner, 2, Batch({}, {table: [table.key_of(rows[10])]}))
            assert await volume.scan(table, after=table.key_of(rows[10]), limit=2) == rows[11:13]

    async def test_integers_are_ordered_by_value_and_text_by_code_point(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            numbers = [INT64_MIN, -256, -2, -1, 0, 1, 2, 10, 255, 256, 1 << 32, INT64_MAX]
            names = sorted(["", "A", "a", "a ", "ab", "\u00e9", "\u20ac", "\uffff", "\U0001f3dd"])
            puts = batch_of(
                *(Link(Ino(1), Ino(number), 1) for number in numbers), *(Counter(name, 0) for name in names)
            )
            await volume.commit(owner, 1, puts)
            rows = await all_rows(volume, page=2)
            assert [row[1] for row in rows[LINK]] == numbers
            assert [row[0] for row in rows[COUNTER]] == names

    async def test_a_blob_of_a_mebibyte_comes_back(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            data = bytes(range(256)) * 4096
            big = [Slice(SliceId(number), len(data), 1, 0, bytes([number]) + data) for number in range(4)]
            await volume.commit(owner, 1, batch_of(*big))
            assert (await volume.load({SLICE: [(2,)]}, {})).rows[SLICE] == [big[2]]
            await volume.commit(owner, 2, batch_of(big[2]._replace(data=b""), deletes={SLICE: [(3,)]}))
            assert await volume.scan(SLICE, after=(0,), limit=9) == [big[1], big[2]._replace(data=b"")]

    async def test_text_is_kept(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            session = Session(SessionId(1), "h\u00f4te", 42, "/mnt/donn\u00e9es \U0001f3dd", 5)
            await volume.commit(owner, 1, batch_of(session))
            assert (await volume.load({SESSION: [(1,)]}, {})).rows[SESSION] == [session]

    # -- beside the volumes ------------------------------------------------------------------------------------------

    async def test_a_setting_is_made_once_and_seen_by_all_processes(self, world: World) -> None:
        async with world.running():
            one, other = await world.process(), await world.process()
            assert await one.setting("token-key") is None
            assert await one.create_setting("token-key", b"\0first")
            assert not await other.create_setting("token-key", b"second")
            assert await other.setting("token-key") == await one.setting("token-key") == b"\0first"
            assert await one.setting("another") is None
            made = await asyncio.gather(
                *(store.create_setting("race", b"%d" % n) for n, store in enumerate((one, other)))
            )
            assert sorted(made) == [False, True]

    async def test_settings_are_replaced_only_from_what_is_expected(self, world: World) -> None:
        async with world.running():
            one, other = await world.process(), await world.process()
            assert not await one.replace_setting("token/a", b"new", expected=b"")
            assert await one.create_setting("token/a", b"\0old")
            assert not await other.replace_setting("token/a", b"new", expected=b"\0old\0")
            assert await other.replace_setting("token/a", b"\xffnew", expected=b"\0old")
            assert await one.setting("token/a") == b"\xffnew"
            done = await asyncio.gather(
                *(
                    store.replace_setting("token/a", b"%d" % n, expected=b"\xffnew")
                    for n, store in enumerate((one, other))
                )
            )
            assert sorted(done) == [False, True]
            assert await one.setting("token/a") == b"%d" % done.index(True)

    async def test_settings_are_listed_by_what_their_names_begin_with(self, world: World) -> None:
        async with world.running():
            one, other = await world.process(), await world.process()
            names = [
                "token/b",
                "token/\u00e9",
                "token/a",
                "token",
                "tokens",
                "token/%",
                "token0",
                "token/\U0001f3dd",
                "tokem/z",
            ]
            for name in names:
                assert await one.create_setting(name, name.encode())
            found = await other.settings("token/")
            assert list(found.items()) == [
                (name, name.encode()) for name in ("token/%", "token/a", "token/b", "token/\u00e9", "token/\U0001f3dd")
            ]
            assert sorted(await one.settings("")) == sorted(names)
            assert await one.settings("token/%%") == {}

    async def test_a_setting_is_forgotten(self, world: World) -> None:
        async with world.running():
            one, other = await world.process(), await world.process()
            assert not await one.delete_setting("gone")
            assert await one.create_setting("gone", b"1")
            assert await other.delete_setting("gone")
            assert await one.setting("gone") is None
            assert not await one.replace_setting("gone", b"2", expected=b"1")
            assert await one.create_setting("gone", b"3")

    async def test_a_tenant_is_forgotten(self, world: World) -> None:
        async with world.running():
            one, other = await world.process(), await world.process()
            assert await one.add_tenant("a", created_ns=1)
            assert await one.add_tenant("ab", created_ns=1)
            assert await other.remove_tenant("a")
            assert not await one.remove_tenant("a")
            assert list(await one.tenants()) == ["ab"]
            assert await one.add_tenant("a", created_ns=2)

    async def test_tenants_are_made_once_and_listed_in_order(self, world: World) -> None:
        async with world.running():
            one, other = await world.process(), await world.process()
            assert await one.tenants() == []
            assert await one.add_tenant("b", created_ns=1)
            assert await other.add_tenant("a", created_ns=2)
            assert not await other.add_tenant("b", created_ns=3)
            assert list(await one.tenants()) == ["a", "b"]

    # -- commits --------------------------------------------------------------------------------------------------

    async def test_batches_are_numbered_without_a_gap(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            assert owner.last_batch == await volume.last_batch(owner) == 0
            for number in range(1, 6):
                await volume.commit(owner, number, batch_of(Counter("n", number)))
                assert await volume.last_batch(owner) == number
            for wrong in (0, 1, 4, 5, 7, 100, -1):
                with pytest.raises(Fenced):
                    await volume.commit(owner, wrong, batch_of(Counter("n", 99), Counter("m", 99)))
            assert await volume.last_batch(owner) == 5
            assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("n", 5)]
            await volume.commit(owner, 6, NOTHING)
            assert await volume.last_batch(owner) == 6

    async def test_the_next_owner_goes_on_where_the_last_one_stopped(self, world: World) -> None:
        async with world.running():
            first, second = await world.volume(), await world.volume()
            owner = await acquire(first)
            for number in range(1, 4):
                await first.commit(owner, number, NOTHING)
            await first.release(owner)
            successor = await acquire(second, nonce="second")
            assert (successor.nonce, successor.epoch, successor.last_batch) == ("second", 2, 3)
            await second.commit(successor, 4, batch_of(Counter("n", 4)))

    async def test_what_was_committed_is_seen_by_loads_that_begin_afterwards(self, world: World) -> None:
        async with world.running():
            volume, reader = await world.volume(), await world.volume()
            owner = await acquire(volume)
            for number in range(1, 30):
                inode = example_row(INODE, 5)._replace(mtime_ns=number)  # type: ignore[attr-defined]
                await volume.commit(owner, number, batch_of(inode, Dentry(ROOT_INO, b"n%d" % number, Ino(5), 0)))
                for handle in (volume, reader):
                    if handle is reader:
                        await world.show(volume)
                    assert (await handle.load({INODE: [(5,)]}, {})).rows[INODE] == [inode]
                    assert len((await handle.load({}, {DENTRY: [1]})).rows[DENTRY]) == number
                    assert (await handle.scan_dir(1, after=None, limit=1))[0][1] == inode

    async def test_loads_beside_commits_see_rows_before_or_after_and_never_go_back(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            rows = [Slice(SliceId(number), 0, 1, 0, b"") for number in range(40)]
            await volume.commit(owner, 1, batch_of(*rows))
            done = 1

            async def write() -> None:
                nonlocal done
                for number in range(2, 60):
                    values = (row._replace(length=number, data=b"%d" % number * 500) for row in rows)
                    await volume.commit(owner, number, batch_of(*values))
                    done = number
                    await asyncio.sleep(0)

            async def read(step: int) -> None:
                while done < 59:
                    before = done
                    keys: list[Key] = [(number,) for number in range(0, 40, step)]
                    found: list[Any] = (await volume.load({SLICE: keys}, {})).rows[SLICE]
                    found += await volume.scan(SLICE, after=None, limit=10)
                    for row in found:
                        assert row.data == (b"%d" % row.length * 500 if row.length else b"")
                        assert (row.length or 1) >= before
                    await asyncio.sleep(0)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(write())
                for step in (1, 3, 13):
                    tasks.create_task(read(step))

    async def test_volumes_of_one_process_commit_side_by_side(self, world: World) -> None:
        async with world.running():
            store = await world.process()
            names = ["a", "b", "c", "d"]

            async def work(name: str) -> None:
                await store.create_volume(volume_format(name=name), NOTHING)
                volume = await store.open_volume("tenant", name)
                owner = await acquire(volume, nonce=name)
                for number in range(1, 20):
                    await volume.commit(owner, number, batch_of(Counter(name, number), Counter(f"{number}", 1)))
                assert len(await volume.scan(COUNTER, after=None, limit=99)) == 20
                assert (await volume.load({COUNTER: [(name,)]}, {})).rows[COUNTER] == [Counter(name, 19)]

            async with asyncio.TaskGroup() as tasks:
                for name in names:
                    tasks.create_task(work(name))

    # -- ownership ------------------------------------------------------------------------------------------------

    async def test_one_owner_at_a_time(self, world: World) -> None:
        async with world.running():
            first, second = await world.volume(), await world.volume()
            owner = await acquire(first, nonce="first", address="host-1:4711")
            assert (owner.nonce, owner.epoch, owner.last_batch) == ("first", 1, 0)
            for _ in range(2):
                with pytest.raises(NotOwner, match="host-1:4711") as refusal:
                    await acquire(second, nonce="second")
                assert refusal.value.owner == "host-1:4711"
                assert 0 < refusal.value.expires_in_s <= TTL_S
                assert refusal.value.retryable
            await first.commit(owner, 1, NOTHING)

    async def test_two_owners_cannot_share_a_handle(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume, nonce="first")
            with pytest.raises(NotOwner):
                await acquire(volume, nonce="second")
            await volume.commit(owner, 1, NOTHING)

    async def test_of_many_that_want_a_volume_one_gets_it(self, world: World) -> None:
        async with world.running():
            volumes = [await world.volume() for _ in range(6)]
            answers = await asyncio.gather(
                *(acquire(volume, nonce=f"nonce-{n}", address=f"host-{n}") for n, volume in enumerate(volumes)),
                return_exceptions=True,
            )
            assert sum(isinstance(answer, Ownership) for answer in answers) == 1
            assert sum(isinstance(answer, NotOwner) for answer in answers) == 5

    async def test_a_released_volume_is_taken_at_once(self, world: World) -> None:
        async with world.running():
            first, second = await world.volume(), await world.volume()
            owner = await acquire(first)
            await first.release(owner)
            for call in (first.commit(owner, 1, NOTHING), first.renew(owner, ttl_s=1), first.last_batch(owner)):
                with pytest.raises(Fenced):
                    await call
            successor = await acquire(second, nonce="second")
            assert successor.epoch == 2
            await first.release(owner)  # of what is no longer owned: nothing happens
            await second.commit(successor, 1, NOTHING)
            with pytest.raises(NotOwner):
                await acquire(first)
            await second.release(successor)
            assert (await acquire(first)).epoch == 3

    async def test_acquiring_again_is_a_new_epoch(self, world: World) -> None:
        async with world.running():
            volume, other = await world.volume(), await world.volume()
            old = await acquire(volume)
            await volume.commit(old, 1, NOTHING)
            new = await acquire(volume)
            assert (new.nonce, new.epoch, new.last_batch) == ("first", 2, 1)
            with pytest.raises(Fenced):
                await volume.commit(old, 2, NOTHING)
            await volume.release(old)
            await volume.commit(new, 2, NOTHING)
            with pytest.raises(NotOwner):
                await acquire(other, nonce="second")

    async def test_a_successor_fences_everything_that_the_old_owner_sends(self, world: World) -> None:
        async with world.running():
            first, second = await world.volume(), await world.volume()
            old = await acquire(first, nonce="old")
            await first.commit(old, 1, batch_of(Counter("kept", 1)))
            await world.lapse()
            new = await acquire(second, nonce="new", address="host-2:1")
            assert (new.epoch, new.last_batch) == (2, 1)
            changed = volume_format(capacity_bytes=1)
            for call in (
                first.commit(old, 2, batch_of(Counter("lost", 1), deletes={COUNTER: [("kept",)]})),
                first.renew(old, ttl_s=TTL_S),
                first.last_batch(old),
                first.put_format(old, changed),
            ):
                with pytest.raises(Fenced):
                    await call
            await first.release(old)
            assert await second.last_batch(new) == 1
            assert await second.scan(COUNTER, after=None, limit=9) == [Counter("kept", 1)]
            assert (await (await world.process()).open_volume("tenant", "volume")).format == volume_format()
            await second.commit(new, 2, batch_of(Counter("new", 2)))
            with pytest.raises(Fenced):
                await first.commit(old, 3, batch_of(Counter("lost", 1)))
            with pytest.raises(NotOwner, match="host-2:1"):
                await acquire(first, nonce="old")
            await world.show(second)
            assert (await first.load({COUNTER: [("new",)]}, {})).rows[COUNTER] == [Counter("new", 2)]  # reads go on

    async def test_renewal_counts_from_now(self, world: World) -> None:
        async with world.running():
            first, second = await world.volume(), await world.volume()
            owner = await first.acquire(nonce="first", address="a", ttl_s=5)
            await first.renew(owner, ttl_s=500)
            with pytest.raises(NotOwner) as refusal:
                await acquire(second, nonce="second")
            assert 400 < refusal.value.expires_in_s <= 500
            await first.renew(owner, ttl_s=50)
            with pytest.raises(NotOwner) as refusal:
                await acquire(second, nonce="second")
            assert 0 < refusal.value.expires_in_s <= 50

    async def test_an_owner_that_nobody_followed_may_go_on(self, world: World) -> None:
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume)
            await world.lapse()
            await volume.renew(owner, ttl_s=TTL_S)
            await volume.commit(owner, 1, NOTHING)
            assert await volume.last_batch(owner) == 1


# -- everything at random ---------------------------------------------------------------------------------------------

Step = Batch | str
"""A batch to commit, or "reopen" (by a new process) or "take over" (by another owner)."""

histories: st.SearchStrategy[list[Step]] = st.lists(
    st.one_of(batches(), st.sampled_from(["reopen", "take over"])), max_size=12
)


async def compare_with_model(world: World, steps: list[Step], *, page: int) -> None:
    """Check that a store is a sorted map for each table. A store's module calls it with what @given draws."""
    model: Model = {table: {} for table in TABLES}
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        number = 0
        for step in steps:
            if isinstance(step, Batch):
                number += 1
                await volume.commit(owner, number, step)
                apply_to(model, step)
            else:
                if step == "take over":
                    await world.lapse()
                elif world.lasting:
                    await world.die()
                else:
                    continue
                volume = await world.volume()
                owner = await acquire(volume, nonce=f"{number}")
                assert owner.last_batch == number
            assert await volume.last_batch(owner) == number
            assert await all_rows(volume, page=page) == in_order(model)
        await compare_loads(volume, model)


async def compare_loads(volume: VolumeStore, model: Model) -> None:
    """Check what load() and scan_dir() find against a model, all keys at once and one by one."""
    answer = await volume.load({table: list(rows) for table, rows in model.items()}, {})
    for table, rows in model.items():
        for key, row in list(rows.items())[:2]:
            assert loaded(await volume.load({table: [key]}, {}), table) == [row]
    for table, rows in model.items():
        assert loaded(answer, table) == sorted(rows.values())
    groups = {table: sorted({key[0] for key in rows}) for table, rows in model.items() if table.grouped}
    answer = await volume.load({}, groups)
    for table in groups:
        assert loaded(answer, table) == sorted(model[table].values())
    for parent in groups[DENTRY]:
        wanted = sorted(row for row in model[DENTRY].values() if row[0] == parent)
        scanned = await volume.scan_dir(parent, after=None, limit=1000)
        assert scanned == [(dentry, model[INODE].get((dentry[2],))) for dentry in wanted]
