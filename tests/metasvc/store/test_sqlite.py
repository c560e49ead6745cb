"""The store in SQLite: the contract, and what only a database file can show."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkstore.geometry import SliceId
from metasvc.errors import Fenced, NotOwner, StoreError, VolumeMissing
from metasvc.model import ROOT_INO, Counter, Dentry, Ino, Slice
from metasvc.store.open import open_store
from metasvc.store.sqlite import SqliteStore
from metasvc.store.sqlite.volume import SqliteVolume
from metasvc.store.tables import COUNTER, DENTRY, INODE, SLICE, TABLES, Batch
from tests.metasvc.store.contract import (
    NOTHING,
    Step,
    StoreContract,
    acquire,
    all_rows,
    compare_with_model,
    histories,
)
from tests.metasvc.store.rows_of import INT64_MAX, batch_of, example_row, volume_format
from tests.metasvc.store.sqlite_world import Program, SqliteWorld


@pytest.fixture
def world(tmp_path: Path) -> SqliteWorld:
    return SqliteWorld(tmp_path)


class TestSqliteStore(StoreContract):
    """The contract."""


@settings(max_examples=40)
@given(steps=histories, page=st.integers(1, 9))
def test_a_store_is_a_sorted_map_for_each_table(steps: list[Step], page: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(compare_with_model(SqliteWorld(Path(directory)), steps, page=page))


# -- what lasts -------------------------------------------------------------------------------------------------------


async def test_everything_is_there_after_reopening(world: SqliteWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        batch = Batch({table: [example_row(table, number) for number in range(100)] for table in TABLES}, {})
        await volume.commit(owner, 1, batch)
        await volume.put_format(owner, volume_format(capacity_bytes=77))
        await world.end_processes()
        again = await world.volume()
        assert again.format == volume_format(capacity_bytes=77)
        assert await all_rows(again) == batch.puts
        assert (await acquire(again)).last_batch == 1


# With and without room in the log; with a journal, whose halves are full soon; with batches that are too large for one.
@pytest.mark.parametrize(
    ("data_bytes", "journal_after"), [(80, 1 << 30), (4000, 1 << 30), (80, 0), (80, 5), (1200, 0), (4000, 0)]
)
async def test_after_kill_9_acknowledged_batches_are_there_and_none_is_half_there(
    world: SqliteWorld, seed: int, data_bytes: int, journal_after: int
) -> None:
    chosen = random.Random(seed)
    async with world.running():
        await (await world.volume()).close()
        await world.end_processes()
        acknowledged = 0
        for life in range(1, 9):
            async with Program("commit_forever.py", str(world.path), str(data_bytes), str(journal_after)) as program:
                for _ in range(chosen.randint(1, 60)):
                    acknowledged = int(await program.line())
                acknowledged = int(([str(acknowledged)] + await program.kill())[-1])
            volume = await world.volume()
            # The dead owner asked for an hour; its successor need not wait for that.
            owner = await acquire(volume)
            assert owner.epoch == 2 * life
            assert owner.last_batch in (acknowledged, acknowledged + 1)
            slices: list[Any] = await volume.scan(SLICE, after=None, limit=1000)
            assert len(slices) == 50
            assert {row.length for row in slices} == {owner.last_batch}
            assert {row.data for row in slices} == {owner.last_batch.to_bytes(8, "little") * (data_bytes // 8)}
            counters = await volume.scan(COUNTER, after=None, limit=100_000)
            assert sorted(row[1] for row in counters) == list(range(1, owner.last_batch + 1))
            await volume.release(owner)
            await world.end_processes()


# -- several processes ------------------------------------------------------------------------------------------------


async def test_others_read_a_volume_that_a_process_owns(world: SqliteWorld) -> None:
    async with world.running():
        await world.volume()
        async with Program("commit_forever.py", str(world.path), "4000") as program:
            reader = await world.volume()
            for _ in range(20):
                acknowledged = int(await program.line())
                slices: list[Any] = (await reader.load({SLICE: [(n,) for n in range(50)]}, {})).rows[SLICE]
                assert len(slices) == 50
                assert len({row.length for row in slices}) == 1  # a load sees no batch by halves
                assert slices[0].length >= acknowledged
            with pytest.raises(NotOwner, match=rf"program \(process {program.pid}\)") as refusal:
                await acquire(reader)
            assert refusal.value.pid == program.pid
            assert 3500 < refusal.value.expires_in_s <= 3600


async def test_a_stopped_owner_keeps_its_volume_though_its_time_is_over(tmp_path: Path) -> None:
    world = SqliteWorld(tmp_path, clock=lambda: time.time() + 7200)
    async with world.running():
        volume = await world.volume()
        async with Program("own_volume.py", str(world.path), "host-9:1 /mnt") as program:
            assert await program.line() == "1"
            os.kill(program.pid, signal.SIGSTOP)
            with pytest.raises(NotOwner, match=f"host-9:1 /mnt .*{program.pid}") as refusal:
                await acquire(volume)
            assert refusal.value.owner == "host-9:1 /mnt"
            assert refusal.value.expires_in_s == 0
            assert await program.kill() == []
            assert (await acquire(volume)).epoch == 2


async def test_commits_wait_for_the_transaction_of_another_process(world: SqliteWorld) -> None:
    async with world.running():
        volume, reader = await world.volume(), await world.volume()
        owner = await acquire(volume)
        other = sqlite3.connect(world.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        committing = asyncio.create_task(volume.commit(owner, 1, batch_of(Counter("a", 1))))
        for _ in range(5):
            assert (await reader.load({COUNTER: [("a",)]}, {})).rows[COUNTER] == []
        assert not committing.done()
        other.execute("COMMIT")
        other.close()
        await committing
        assert (await reader.load({COUNTER: [("a",)]}, {})).rows[COUNTER] == [Counter("a", 1)]


async def test_the_owner_that_died_is_followed_at_once_and_fenced(world: SqliteWorld) -> None:
    async with world.running():
        first, second = await world.volume(), await world.volume()
        owner = await acquire(first)
        await first.close()  # as a process that ends without release
        assert (await acquire(second, nonce="second")).epoch == owner.epoch + 1


async def test_an_owner_whose_lock_file_was_removed_cannot_take_the_volume_back_from_its_successor(
    tmp_path: Path,
) -> None:
    now = [1_000_000.0]
    world = SqliteWorld(tmp_path, clock=lambda: now[0])
    async with world.running():
        first, second = await world.volume(), await world.volume()
        await acquire(first, nonce="first")
        await world.lapse()
        owner = await acquire(second, nonce="second")
        now[0] += 3600  # the successor's row expired, but it lives
        with pytest.raises(NotOwner):
            await acquire(first, nonce="first")
        await second.commit(owner, 1, NOTHING)


async def test_the_lock_file_is_empty_after_release_and_gone_with_the_volume(world: SqliteWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume, address="host-1:4711")
        assert world.lock_path.read_text() == f"{os.getpid()} host-1:4711\n"
        assert world.lock_path.stat().st_mode & 0o777 == 0o600
        await volume.release(owner)
        assert world.lock_path.read_text() == ""
        await (await world.process()).delete_volume("tenant", "volume")
        assert not world.lock_path.exists()


# -- the file ---------------------------------------------------------------------------------------------------------


async def test_addresses_of_stores_are_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    awkward = "100% of #1? é \udcff.db"
    for url, path in (
        ("sqlite:///rel.db", tmp_path / "rel.db"),
        ("sqlite:///sub/rel.db", tmp_path / "sub/rel.db"),
        (f"sqlite:///{tmp_path}/abs.db", tmp_path / "abs.db"),
        (f"sqlite:///{awkward}", tmp_path / awkward),
    ):
        with pytest.raises(VolumeMissing, match="atoll format"):
            await open_store(url)
        assert not path.exists()
        store = await open_store(url, create=True)
        await store.create_volume(volume_format(), NOTHING)
        await store.close()
        assert path.is_file()
        store = await open_store(url)
        assert [found.name for found in await store.list_volumes()] == ["volume"]
        await store.close()


@pytest.mark.parametrize(
    "url", ["", "x", "memory:", "memory://x", "sqlite:", "sqlite://", "sqlite:///", "sqlite://meta.db", "mysql://h/db"]
)
async def test_what_is_no_url_of_a_store_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="sqlite:///relative/path"):
        await open_store(url, create=True)


async def test_a_memory_store_is_new_each_time() -> None:
    first, second = await open_store("memory://"), await open_store("memory://")
    await first.create_volume(volume_format(), NOTHING)
    assert list(await second.list_volumes()) == []


async def test_the_database_is_readable_by_its_owner_only(world: SqliteWorld) -> None:
    async with world.running():
        volume = await world.volume()
        await acquire(volume)
        assert set(world.files()) == {"meta.db", "meta.db-wal", "meta.db-shm", "meta.db.1.owner"}
        assert {stat.S_IMODE(mode) for mode in world.files().values()} == {0o600}


async def test_two_processes_that_create_the_database_at_once_both_get_it(world: SqliteWorld) -> None:
    async with world.running():
        stores = await asyncio.gather(*(world.process() for _ in range(8)))
        await stores[0].create_volume(volume_format(), NOTHING)
        for store in stores:
            assert len(await store.list_volumes()) == 1


async def test_a_closed_store_answers_nothing(world: SqliteWorld) -> None:
    async with world.running():
        volume, store = await world.volume(), await world.process()
        await world.end_processes()
        with pytest.raises(StoreError, match="closed"):
            await volume.load({INODE: [(1,)]}, {})
        with pytest.raises(StoreError, match="closed"):
            await store.list_volumes()
        await store.close()


async def test_a_database_that_was_removed_does_not_come_back_empty(world: SqliteWorld) -> None:
    async with world.running():
        store = await world.process()
        world.path.unlink()
        with pytest.raises(StoreError, match=r"meta\.db cannot be opened"):
            await store.list_volumes()
        assert not world.path.exists()


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        Slice(SliceId(INT64_MAX + 1), 0, 1, 0, b""),
        Slice(SliceId(5), 0, 1, 0, "text"),  # type: ignore[arg-type]
        Slice(SliceId(5), 0, 1, 0, None),  # type: ignore[arg-type]
        Slice(SliceId(5), "x", 1, 0, b""),  # type: ignore[arg-type]
        Slice(SliceId(5), 1.5, 1, 0, b""),  # type: ignore[arg-type]
        Counter("\udcff", 1),
        Counter(b"bytes", 1),  # type: ignore[arg-type]
    ],
    ids=repr,
)
async def test_a_batch_with_a_row_that_does_not_fit_is_not_applied_at_all(world: SqliteWorld, row: Any) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(Counter("kept", 1)))
        with pytest.raises(StoreError, match="does not fit"):
            await volume.commit(owner, 2, batch_of(Counter("lost", 1), Dentry(ROOT_INO, b"n", Ino(2), 0), row))
        assert await volume.last_batch(owner) == 1
        assert {table: rows for table, rows in (await all_rows(volume)).items() if rows} == {
            COUNTER: [Counter("kept", 1)]
        }
        await volume.commit(owner, 2, batch_of(Counter("next", 2)))


async def test_a_volume_whose_first_rows_do_not_fit_is_not_created(world: SqliteWorld) -> None:
    async with world.running():
        store = await world.process()
        with pytest.raises(StoreError, match="does not fit"):
            await store.create_volume(volume_format(), batch_of(Counter("fits", 1), Counter("\udcff", 1)))
        assert list(await store.list_volumes()) == []
        await store.create_volume(volume_format(), NOTHING)
        assert not any((await all_rows(await store.open_volume("tenant", "volume"))).values())


async def test_an_acquisition_that_fails_leaves_the_volume_to_others(world: SqliteWorld) -> None:
    async with world.running():
        first, second = await world.volume(), await world.volume()
        with pytest.raises(StoreError, match="does not fit"):
            await acquire(first, nonce="\udcff")
        await acquire(second)


async def test_a_deleted_volume_cannot_be_acquired_and_gets_no_lock_file_again(world: SqliteWorld) -> None:
    async with world.running():
        volume, store = await world.volume(), await world.process()
        await store.delete_volume("tenant", "volume")
        with pytest.raises(Fenced, match="deleted"):
            await acquire(volume)
        assert not world.lock_path.exists()


async def test_a_commit_that_was_cancelled_before_its_turn_is_not_applied(world: SqliteWorld) -> None:
    async with world.running():
        store = await world.process()
        volumes = []
        for name in ("first", "second"):
            await store.create_volume(volume_format(name=name), NOTHING)
            volumes.append(await store.open_volume("tenant", name))
        owners = [await acquire(volume) for volume in volumes]
        other = sqlite3.connect(world.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        committing = [asyncio.create_task(volumes[n].commit(owners[n], 1, NOTHING)) for n in range(2)]
        await asyncio.sleep(0)  # both are in the queue of the one writer, which waits for the other process
        committing[1].cancel()
        await asyncio.gather(committing[1], return_exceptions=True)
        other.execute("COMMIT")
        other.close()
        await committing[0]
        assert await volumes[0].last_batch(owners[0]) == 1
        assert await volumes[1].last_batch(owners[1]) == 0


async def test_a_commit_that_is_cancelled_is_applied_wholly_or_not_at_all(world: SqliteWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        number = 1
        for turns in range(12):
            slices = [Slice(SliceId(n), number, 1, 0, bytes(1000)) for n in range(100)]
            committing = asyncio.create_task(volume.commit(owner, number, batch_of(*slices)))
            for _ in range(turns):
                await asyncio.sleep(0)
            committing.cancel()
            await asyncio.gather(committing, return_exceptions=True)
            applied = await volume.last_batch(owner)  # behind the commit, if that is still under way
            assert applied in (number - 1, number)
            lengths = {row[1] for row in await volume.scan(SLICE, after=None, limit=1000)}
            assert lengths == ({applied} if applied else set())
            number = applied + 1


async def test_a_damaged_database_is_an_error_with_its_name_and_never_rows(world: SqliteWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        dentries = [Dentry(Ino(n % 7), b"%06d" % n, Ino(n), 0) for n in range(5000)]
        await volume.commit(owner, 1, batch_of(*dentries))
        await world.end_processes()
        with world.path.open("r+b") as file:
            file.seek(-10 * 4096, os.SEEK_END)  # leaves of the tree of dentries
            file.write(b"\xa5" * 4096 * 10)
        volume = await world.volume()
        with pytest.raises(StoreError, match=r"meta\.db is damaged.*backup"):
            await volume.scan(DENTRY, after=None, limit=10_000)
        with pytest.raises(StoreError, match="is damaged"):
            await volume.load({}, {DENTRY: list(range(7))})


async def test_an_unexpected_exception_on_the_thread_reaches_the_caller(world: SqliteWorld) -> None:
    async with world.running():
        volume = await world.volume()
        with pytest.raises(AttributeError):
            await volume.load({"inode": [(1,)]}, {})  # type: ignore[dict-item]
        assert (await volume.load({INODE: [(1,)]}, {})).rows[INODE] == []


async def test_deleting_a_volume_lets_others_commit_meanwhile(world: SqliteWorld) -> None:
    async with world.running():
        store = await world.process()
        for name in ("volume", "other"):
            await store.create_volume(volume_format(name=name), NOTHING)
        volume, other = await store.open_volume("tenant", "volume"), await store.open_volume("tenant", "other")
        owner, other_owner = await acquire(volume), await acquire(other)
        await volume.commit(owner, 1, batch_of(*(Dentry(Ino(1), b"%d" % n, Ino(n), 0) for n in range(30_000))))
        await volume.release(owner)
        deleting = asyncio.create_task(store.delete_volume("tenant", "volume"))
        commits = 0
        while not deleting.done():
            commits += 1
            await other.commit(other_owner, commits, NOTHING)
        await deleting
        assert commits >= 3
        with sqlite3.connect(world.path) as connection:
            assert connection.execute("SELECT count(*) FROM dentry").fetchone() == (0,)
            assert connection.execute("SELECT name FROM volume").fetchall() == [("other",)]
        connection.close()


async def test_rows_left_of_a_deletion_that_was_cut_short_go_with_the_next_one(world: SqliteWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(*(Dentry(Ino(1), b"%d" % n, Ino(n), 0) for n in range(100))))
        connection = sqlite3.connect(world.path, isolation_level=None)
        connection.execute("UPDATE volume SET tenant = NULL, name = NULL, owner_nonce = NULL, epoch = epoch + 1")
        with pytest.raises(Fenced):
            await volume.commit(owner, 2, NOTHING)
        store = await world.process()
        assert list(await store.list_volumes()) == []
        await store.create_volume(volume_format(name="other"), batch_of(Counter("a", 1)))
        assert connection.execute("SELECT count(*) FROM dentry").fetchone() == (100,)
        await store.delete_volume("tenant", "other")
        for table in ("dentry", "counter", "volume"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
        connection.close()


async def test_a_store_can_be_opened_again_and_again(world: SqliteWorld) -> None:
    for _ in range(20):
        store = await SqliteStore.open(str(world.path), create=True)
        await store.list_volumes()
        await store.close()
    assert list(world.files()) == ["meta.db"]


async def test_a_commit_on_the_loop_does_not_wait_there_for_the_lock_of_another_process(world: SqliteWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        await volume.commit(owner, 1, batch_of(Counter("a", 1)))
        with contextlib.closing(sqlite3.connect(world.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert isinstance(volume, SqliteVolume)
            while not volume._writer.may_call_here:  # the thread is about to lay the connection down
                await asyncio.sleep(0.001)
            began_s = time.monotonic()
            waiting = asyncio.create_task(volume.commit(owner, 2, batch_of(Counter("a", 2)), here=True))
            await asyncio.sleep(0.2)
            assert time.monotonic() - began_s < 5.0, "the loop stood still"
            assert not waiting.done()
            assert await volume.scan(COUNTER, after=None, limit=10) == [Counter("a", 1)]
            other.execute("ROLLBACK")
            await waiting
        # The thread waits for the lock as before.
        await volume.commit(owner, 3, batch_of(Counter("a", 3)), here=True)
        assert await volume.scan(COUNTER, after=None, limit=10) == [Counter("a", 3)]
