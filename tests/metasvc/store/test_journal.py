"""The SQLite store with a journal from the first commit on: the contract, and what becomes of journals."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkstore.geometry import SliceId
from metasvc.errors import Fenced, NotOwner, SchemaTooNew, StoreError, StoreRefused
from metasvc.model import Counter, Dentry, Ino, Slice
from metasvc.store import Ownership
from metasvc.store.packed import pack_batch
from metasvc.store.sqlite import SqliteStore
from metasvc.store.sqlite.journal import Appended, Journal, make_draft
from metasvc.store.sqlite.journal_format import BLOCK_BYTES, pack_record
from metasvc.store.sqlite.ownership import begin_journal
from metasvc.store.sqlite.volume import SqliteVolume
from metasvc.store.tables import COUNTER, DENTRY, SLICE, TABLES, Batch
from tests.metasvc.store.contract import (
    NOTHING,
    StoreContract,
    acquire,
    all_rows,
    compare_with_model,
    histories,
    in_order,
)
from tests.metasvc.store.rows_of import Model, apply_to, batch_of, volume_format
from tests.metasvc.store.sqlite_world import SqliteWorld

HALF_BYTES = 8 * BLOCK_BYTES


@pytest.fixture
def world(tmp_path: Path) -> SqliteWorld:
    return SqliteWorld(tmp_path, journal_after=0)


class TestSqliteStoreWithJournal(StoreContract):
    """The contract."""


class TestSqliteStoreWithSmallJournal(StoreContract):
    """The contract where each half is full after eight small batches."""

    @pytest.fixture
    def world(self, tmp_path: Path) -> SqliteWorld:
        return SqliteWorld(tmp_path, journal_after=0, half_bytes=HALF_BYTES)


@settings(max_examples=40)
@given(steps=histories, page=st.integers(1, 9), journal_after=st.sampled_from([0, 1, 3]))
def test_a_store_is_a_sorted_map_for_each_table(steps: list[Any], page: int, journal_after: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        world = SqliteWorld(Path(directory), journal_after=journal_after, half_bytes=HALF_BYTES)
        asyncio.run(compare_with_model(world, steps, page=page))


def counter(number: int) -> Batch:
    return batch_of(Counter(f"batch-{number:05}", number), Counter("last", number))


def batch_past_the_journal(number: int) -> Batch:
    """Return a batch that is too large for a journal, so that it is committed directly."""
    return batch_of(Counter("large", number), Slice(SliceId(1), number, 1, 0, bytes(100_000)))


def row_in_sqlite(path: Path) -> tuple[int, int]:
    """Return epoch and last batch as another process reads them."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        epoch, last_batch = connection.execute("SELECT epoch, last_batch FROM volume").fetchone()
        return epoch, last_batch


def journal_of(volume: Any) -> Journal:
    journal = volume._own_journal()
    assert journal is not None
    assert isinstance(journal, Journal)
    return journal


async def owned(world: SqliteWorld) -> tuple[SqliteVolume, Ownership]:
    volume = await world.volume()
    assert isinstance(volume, SqliteVolume)
    return volume, await acquire(volume)


async def check_counters(world: SqliteWorld, last: int, *, nonce: str = "checker") -> None:
    """Check that a new owner finds all batches of counter() up to one."""
    volume = await world.volume()
    owner = await acquire(volume, nonce=nonce)
    assert owner.last_batch == last
    found = await volume.scan(COUNTER, after=None, limit=100_000)
    assert sorted(found) == sorted(
        [Counter(f"batch-{number:05}", number) for number in range(1, last + 1)]
        + ([Counter("last", last)] if last else [])
    )
    await volume.release(owner)


# -- its life ---------------------------------------------------------------------------------------------------------


async def test_it_is_made_after_some_commits_and_gone_when_the_volume_is_released(tmp_path: Path) -> None:
    world = SqliteWorld(tmp_path, journal_after=3)
    async with world.running():
        volume, owner = await owned(world)
        for number in range(1, 10):
            assert world.journal_path().exists() == (number > 3)
            await volume.commit(owner, number, counter(number))
            assert (row_in_sqlite(world.path)[1] == number) == (number <= 3)
        assert world.journal_path().stat().st_mode & 0o777 == 0o600
        await volume.release(owner)
        assert row_in_sqlite(world.path) == (1, 9)
        assert not [name for name in world.files() if "journal" in name]
        await check_counters(world, 9)


@pytest.mark.parametrize("end", ["close", "delete"])
async def test_it_goes_with_the_process_and_with_the_volume(world: SqliteWorld, end: str) -> None:
    async with world.running():
        volume, owner = await owned(world)
        await volume.commit(owner, 1, counter(1))
        assert world.journal_path().exists()
        if end == "close":
            await world.end_processes()
            assert set(world.files()) == {"meta.db", "meta.db.1.owner"}
            await check_counters(world, 1)
        else:
            await world.lapse()  # its owner lives and does not know
            await (await world.process()).delete_volume("tenant", "volume")
            assert not [name for name in world.files() if name.startswith("meta.db.")]
            with pytest.raises(Fenced):
                await volume.commit(owner, 2, counter(2))
            assert await volume.scan(COUNTER, after=None, limit=10) == []


async def test_what_it_has_is_shown_to_other_processes_a_moment_later(world: SqliteWorld) -> None:
    async with world.running():
        volume, owner = await owned(world)
        reader = await world.volume()
        for number in range(1, 4):
            await volume.commit(owner, number, counter(number))
        assert (await reader.load({COUNTER: [("last",)]}, {})).rows[COUNTER] == []
        while (await reader.load({COUNTER: [("last",)]}, {})).rows[COUNTER] != [Counter("last", 3)]:
            await asyncio.sleep(0.01)


async def test_a_load_of_other_rows_does_not_wait_for_sqlite_and_a_load_of_changed_ones_sees_them(
    world: SqliteWorld,
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        batch = batch_of(Counter("a", 1), Dentry(Ino(1), b"n", Ino(2), 0))
        await volume.commit(owner, 1, batch)
        await volume.load({COUNTER: [("b",)], DENTRY: [(1, b"m")]}, {DENTRY: [2]})
        assert row_in_sqlite(world.path)[1] == 0
        assert (await volume.load({COUNTER: [("a",)]}, {})).rows[COUNTER] == [Counter("a", 1)]
        assert row_in_sqlite(world.path)[1] == 1
        await volume.commit(owner, 2, Batch({}, {DENTRY: [(1, b"n")]}))
        assert (await volume.load({}, {DENTRY: [1]})).rows[DENTRY] == []
        await volume.commit(owner, 3, batch)
        store_of_it = volume._journals  # another handle of the same process
        assert list(store_of_it) == [1]
        assert len(await volume.scan_dir(1, after=None, limit=5)) == 1


async def test_the_record_is_written_then_synced_then_acknowledged(
    world: SqliteWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        journal = journal_of(volume)
        synced: list[bytes] = []
        sync = os.fdatasync

        def watched(descriptor: int) -> None:
            synced.append(os.pread(journal._descriptor, BLOCK_BYTES, BLOCK_BYTES * (1 + len(synced))))
            assert descriptor == journal._descriptor
            assert journal.last == len(synced) - 1
            sync(descriptor)

        monkeypatch.setattr(os, "fdatasync", watched)
        for number in range(1, 5):
            await volume.commit(owner, number, counter(number), here=number > 2)
            assert journal.last == number
            assert synced[number - 1 :] == [journal.packed(number, counter(number))]


async def test_many_turns_with_batches_of_all_sizes_and_reads_beside_them(tmp_path: Path, seed: int) -> None:
    rand = random.Random(seed)
    world = SqliteWorld(tmp_path, journal_after=0, half_bytes=HALF_BYTES)
    async with world.running():
        volume, owner = await owned(world)
        model: Model = {table: {} for table in TABLES}
        done = 0

        async def read() -> None:
            while done < 600:
                known = done
                found: list[Any] = (await volume.load({COUNTER: [("last",)]}, {})).rows[COUNTER]
                assert not known or found[0].value >= known
                if rand.random() < 0.05:
                    rows: list[Any] = await volume.scan(COUNTER, after=None, limit=1)
                    assert not known or rows[0].value >= known
                await asyncio.sleep(rand.choice([0, 0, 0.001]))

        reading = asyncio.create_task(read())
        for number in range(1, 601):
            size = rand.choice([0, 10, 100, 3000, 6000, 9000, 40_000])
            data = Slice(SliceId(rand.randrange(30)), number, 1, 0, rand.randbytes(size))
            gone = (rand.randrange(30, 60),)
            batch = batch_of(Counter("last", number), data, deletes={SLICE: [gone]})
            await volume.commit(owner, number, batch, here=rand.random() < 0.5)
            apply_to(model, batch)
            done = number
        await reading
        assert await all_rows(volume) == in_order(model)
        await world.end_processes()
        volume = await world.volume()  # type: ignore[assignment]
        assert await all_rows(volume) == in_order(model)


# -- loss of power ----------------------------------------------------------------------------------------------------


def copy_database(path: Path, to: Path) -> None:
    """Copy what other processes see of a database."""
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(to)) as target:
        source.backup(target)


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 32))
def test_after_a_loss_of_power_each_acknowledged_batch_is_there_once(seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(lose_power(Path(directory), random.Random(seed), monkeypatch))


class Synced:
    """Watches what a connection does: up to which batch SQLite is on disk. What the journal believes is not asked."""

    def __init__(self) -> None:
        self.last = 0
        self._open = 0

    def watch(self, connection: sqlite3.Connection) -> None:
        """Have the connection tell."""
        connection.set_trace_callback(self._note)

    def _note(self, statement: str) -> None:
        assert "synchronous" not in statement, "FULL, always"
        number = re.match(r"UPDATE volume SET last_batch = (\d+) ", statement)
        if number:
            self._open = int(number[1])
        elif statement == "COMMIT":
            self.last = max(self.last, self._open)


async def lose_power(directory: Path, rand: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit at random; then take for SQLite any state that it may fall back to, for the journal what was synced, and more."""
    loop = asyncio.get_running_loop()
    (directory / "before").mkdir()
    world = SqliteWorld(directory / "before", journal_after=rand.choice([0, 2]), half_bytes=HALF_BYTES)
    async with world.running():
        volume, owner = await owned(world)
        watched = Synced()
        await volume._writer.call(watched.watch)
        if rand.random() < 0.5:
            # The thread has no time for what is not waited for.
            monkeypatch.setattr(volume._writer, "post", lambda *_: None)
        model: Model = {table: {} for table in TABLES}
        states: list[tuple[int, Path]] = []
        last = rand.randrange(1, 60)
        is_large = False
        for number in range(1, last + 1):
            # Those that are too large for a journal come in runs.
            is_large = rand.random() < (0.6 if is_large else 0.05)
            size = 20_000 if is_large else rand.choice([0, 10, 3000, 6000])
            batch = batch_of(
                Counter("last", number),
                Slice(SliceId(rand.randrange(9)), number, 1, 0, rand.randbytes(size)),
                deletes={SLICE: [(rand.randrange(9, 12),)]},
            )
            if rand.random() < 0.1:
                # SQLite takes nothing for a while, in which both halves may become full.
                other = sqlite3.connect(world.path, isolation_level=None, timeout=0)
                with contextlib.suppress(sqlite3.OperationalError):
                    other.execute("BEGIN IMMEDIATE")
                loop.call_later(rand.choice([0.001, 0.01]), other.close)
            await volume.commit(owner, number, batch)
            apply_to(model, batch)
            if rand.random() < 0.15:
                await world.show(volume)
            if rand.random() < 0.5:
                states.append((0, directory / f"state-{number}"))
                copy_database(world.path, states[-1][1])
                states[-1] = (row_in_sqlite(states[-1][1])[1], states[-1][1])
        journal = volume._own_journal()
        await volume._writer.call(watched.watch)  # behind what is queued
        synced = watched.last
        states.append((0, directory / "state"))
        copy_database(world.path, states[-1][1])
        states[-1] = (row_in_sqlite(states[-1][1])[1], states[-1][1])
        _, chosen = rand.choice([state for state in states if state[0] >= synced])
        after = SqliteWorld(directory, journal_after=0)
        shutil.copy(chosen, after.path)
        may_be_there, under_way = False, NOTHING
        if journal is not None:
            image = bytearray(world.journal_path().read_bytes())
            # A batch that was under way: all, some or none of its sectors.
            under_way = batch_of(Counter("last", last + 1), Slice(SliceId(1), last + 1, 1, 0, rand.randbytes(5000)))
            record = pack_record(journal._key, last + 1, pack_batch(under_way))
            half, tail = journal.half, journal._tail
            if tail + len(record) > HALF_BYTES and journal._last_of_half[1 - half] <= synced:
                half, tail = 1 - half, 0
            if tail + len(record) <= HALF_BYTES:
                share = rand.choice([0.0, 0.5, 1.0])
                for start in range(0, len(record), 512):
                    if rand.random() < share:
                        offset = BLOCK_BYTES + half * HALF_BYTES + tail + start
                        image[offset : offset + 512] = record[start : start + 512]
                may_be_there = share > 0
            after.journal_path().write_bytes(image)
    async with after.running():
        survivor = await after.volume()
        new = await acquire(survivor, nonce="survivor")
        if may_be_there and new.last_batch == last + 1:
            apply_to(model, under_way)
        else:
            assert new.last_batch == last
        assert await all_rows(survivor) == in_order(model)
        assert not after.journal_path().exists()
        await survivor.commit(new, new.last_batch + 1, NOTHING)


async def test_a_journal_is_applied_by_a_process_that_dies_while_it_takes_over_and_then_by_the_next(
    world: SqliteWorld, tmp_path: Path
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        for number in range(1, 4):
            await volume.commit(owner, number, counter(number))
        taken = f"{world.journal_path()}.taken"
        for place, name in (("renamed", taken), ("both", str(world.journal_path()))):
            other = SqliteWorld(tmp_path / place, journal_after=0)
            other.path.parent.mkdir()
            copy_database(world.path, other.path)
            shutil.copy(world.journal_path(), other.path.parent / Path(name).name)
            if place == "both":
                # Its owner lived on after somebody took it and died of that; what was taken is spent.
                (other.path.parent / Path(taken).name).write_bytes(b"spent")
            async with other.running():
                await check_counters(other, 3)
            assert set(other.files()) == {"meta.db", "meta.db.1.owner"}


@pytest.mark.parametrize("larges", [1, 2, 3])
async def test_a_torn_record_behind_batches_that_were_too_large_is_no_damage(
    world: SqliteWorld, tmp_path: Path, larges: int
) -> None:
    last = 3 + larges
    async with world.running():
        volume, owner = await owned(world)
        for number in range(1, 4):
            await volume.commit(owner, number, counter(number))
        for number in range(4, last + 1):
            await volume.commit(owner, number, batch_of(Slice(SliceId(1), number, 1, 0, bytes(100_000))))
        journal = journal_of(volume)
        record = pack_record(journal._key, last + 1, pack_batch(batch_of(Slice(SliceId(2), 1, 1, 0, bytes(5000)))))
        image = bytearray(world.journal_path().read_bytes())
        second = BLOCK_BYTES + journal.half * HALF_BYTES + journal._tail + BLOCK_BYTES
        image[second : second + BLOCK_BYTES] = record[BLOCK_BYTES:]
        after = SqliteWorld(tmp_path / "after", journal_after=0)
        after.path.parent.mkdir()
        copy_database(world.path, after.path)
        after.journal_path().write_bytes(image)
    async with after.running():
        assert (await acquire(await after.volume(), nonce="survivor")).last_batch == last


async def test_who_takes_over_after_a_crash_writes_the_log_anew_before_it_commits(
    world: SqliteWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a sync that failed has left behind is not on disk though the kernel says so: only writing it again helps.
    log = Path(f"{world.path}-wal")
    written: list[bytes] = []
    real = os.pwrite

    def watched(descriptor: int, data: bytes, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(log):
            written.append(bytes(data))
        return real(descriptor, data, offset)

    async with world.running():
        volume, owner = await owned(world)
        reader = sqlite3.connect(world.path)
        reader.execute("SELECT * FROM volume").fetchall()  # the log outlives its writer
        await volume.commit(owner, 1, counter(1))
        await world.show(volume)
        await world.end_processes()
        before = log.read_bytes()
        monkeypatch.setattr(os, "pwrite", watched)
        survivor = await world.volume()
        assert (await acquire(survivor, nonce="survivor")).last_batch == 1
        assert b"".join(written) == before
        reader.close()


async def test_a_database_behind_a_symbolic_link_has_one_journal(world: SqliteWorld, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "linked.db"
    link.parent.mkdir()
    async with world.running():
        volume, owner = await owned(world)
        await volume.release(owner)
        link.symlink_to(world.path)
        store = await SqliteStore.open(str(link), journal_after=0)
        linked = await store.open_volume("tenant", "volume")
        owner = await acquire(linked, nonce="linked")
        with pytest.raises(NotOwner):
            await acquire(await world.volume(), nonce="other")
        await linked.commit(owner, 1, counter(1))
        assert os.listdir(link.parent) == ["linked.db"]
        assert world.journal_path(owner.epoch).exists()
        await store.close()


# -- owners that are over ---------------------------------------------------------------------------------------------


async def test_what_an_owner_writes_after_its_journal_was_taken_is_neither_acknowledged_nor_applied(
    world: SqliteWorld,
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        await volume.commit(owner, 1, counter(1))
        zombie = journal_of(volume)
        image_path = world.journal_path()
        await world.lapse()
        successor = await world.volume()
        new = await acquire(successor, nonce="second")
        assert new.last_batch == 1
        assert zombie.append(2, zombie.packed(2, counter(2)) or b"", counter(2)) is Appended.REFUSED
        record = zombie.packed(2, batch_of(Counter("lost", 1))) or b""
        os.pwrite(zombie._descriptor, record, 2 * BLOCK_BYTES)
        image = os.pread(zombie._descriptor, 1 << 30, 0)
        with pytest.raises(Fenced):
            await volume.commit(owner, 2, batch_of(Counter("lost", 1)))
        await world.end_processes()
        # The file comes back, as names do after a loss of power, with a batch that its owner wrote too late.
        image_path.write_bytes(image)
        await check_counters(world, 1)
        assert not image_path.exists()


@pytest.mark.parametrize("moment", ["before the sync", "after the sync"])
async def test_a_takeover_amid_a_commit_leaves_it_unacknowledged(
    world: SqliteWorld, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        for number in (1, 2):
            await volume.commit(owner, number, counter(number))
        await world.lapse()
        paths = volume._paths
        sync = os.fdatasync

        def interrupted(descriptor: int) -> None:
            if moment == "after the sync":
                sync(descriptor)
            paths.take()

        monkeypatch.setattr(os, "fdatasync", interrupted)
        with pytest.raises(StoreError, match="taken away"):
            await volume.commit(owner, 3, counter(3))
        monkeypatch.undo()
        successor = await world.volume()
        new = await acquire(successor, nonce="second")
        assert new.last_batch == 3  # it may be there: nobody was told that it is not
        with pytest.raises(Fenced):
            await volume.last_batch(owner)
        with pytest.raises(Fenced):
            await volume.commit(owner, 3, counter(3))


async def test_an_owner_that_is_over_puts_no_journal_in_the_way_of_its_successor(world: SqliteWorld) -> None:
    async with world.running():
        volume, owner = await owned(world)
        await world.lapse()
        successor = await world.volume()
        new = await acquire(successor, nonce="second")
        await successor.commit(new, 1, counter(1))
        path = volume._paths.draft()
        draft = make_draft(path, volume_id=1, epoch=owner.epoch, uuid="uuid", half_bytes=HALF_BYTES)
        with pytest.raises(Fenced):
            await volume._writer.call(begin_journal, 1, owner, volume._paths, draft, volume._journals)
        assert not world.journal_path(owner.epoch).exists()
        assert not os.path.exists(path)
        await world.end_processes()
        await check_counters(world, 1)


async def test_an_owner_whose_journal_was_removed_goes_on(world: SqliteWorld) -> None:
    async with world.running():
        volume, owner = await owned(world)
        for number in range(1, 20):
            if number % 5 == 0:
                world.journal_path().unlink(missing_ok=True)
            await volume.commit(owner, number, counter(number))
        await world.end_processes()
        await check_counters(world, 19)


async def test_of_two_handles_of_a_process_the_successor_has_all_and_the_other_is_fenced(world: SqliteWorld) -> None:
    async with world.running():
        store = await world.process()
        await store.create_volume(volume_format(), NOTHING)
        first, second = [await store.open_volume("tenant", "volume") for _ in range(2)]
        owner = await acquire(first)
        await first.commit(owner, 1, counter(1))
        assert (await second.load({COUNTER: [("last",)]}, {})).rows[COUNTER] == [Counter("last", 1)]
        await first.commit(owner, 2, counter(2))
        await world.lapse()
        new = await acquire(second, nonce="second")
        assert new.last_batch == 2
        await second.commit(new, 3, counter(3))
        for call in (first.commit(owner, 3, counter(9)), first.last_batch(owner), first.commit(owner, 4, NOTHING)):
            with pytest.raises(Fenced):
                await call
        await first.release(owner)
        await first.close()
        assert len(await second.scan(COUNTER, after=None, limit=10)) == 4
        await second.commit(new, 4, counter(4))
        await world.end_processes()
        await check_counters(world, 4)


# -- journals that are not what they should be --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda image: image.__setitem__(4, 2), SchemaTooNew, r"journal-1\.taken has version 2, .*upgrade"),
        (lambda image: image.__setitem__(50, 255), StoreRefused, r"damaged journal.*backup.*move the file away"),
        (lambda image: image.__setitem__(BLOCK_BYTES + 40, 255), StoreRefused, r"damaged journal.*batch 2 behind 0"),
        (lambda image: image.__delitem__(slice(9000, None)), StoreRefused, r"damaged journal.*9000 bytes instead"),
    ],
)
async def test_a_journal_that_cannot_be_read_is_not_passed_over(
    world: SqliteWorld, tmp_path: Path, change: Callable[[bytearray], None], error: type[Exception], text: str
) -> None:
    other = SqliteWorld(tmp_path / "other", journal_after=0)
    other.path.parent.mkdir()
    async with world.running(), other.running():
        volume, owner = await owned(world)
        for number in (1, 2):
            await volume.commit(owner, number, counter(number))
        copy_database(world.path, other.path)
        image = bytearray(world.journal_path().read_bytes())
        change(image)
        other.journal_path().write_bytes(image)
        survivor = await other.volume()
        for _ in range(2):
            with pytest.raises(error, match=text):
                await acquire(survivor)
        assert row_in_sqlite(other.path) == (1, 0)
        os.unlink(f"{other.journal_path()}.taken")
        assert (await acquire(survivor)).last_batch == 0


async def test_a_database_that_is_older_than_its_journal_is_not_opened_without_a_word(
    world: SqliteWorld, tmp_path: Path
) -> None:
    backup = tmp_path / "backup"
    async with world.running():
        volume, owner = await owned(world)
        copy_database(world.path, backup)
        for number in (1, 2):
            await volume.commit(owner, number, counter(number))
        await volume.commit(owner, 3, batch_of(Slice(SliceId(1), 1, 1, 0, bytes(100_000))))
        await volume.commit(owner, 4, counter(4))
        for name, epoch, text in (
            ("gap", 1, "begins with batch 4, the database ends with batch 0"),
            ("epoch", 0, "epoch 1"),
        ):
            other = SqliteWorld(tmp_path / name, journal_after=0)
            other.path.parent.mkdir()
            shutil.copy(backup, other.path)
            with contextlib.closing(sqlite3.connect(other.path, isolation_level=None)) as connection:
                connection.execute("UPDATE volume SET epoch = ?", (epoch,))
            shutil.copy(world.journal_path(), other.journal_path())
            async with other.running():
                with pytest.raises(StoreRefused, match=rf"{text}.*Put back"):
                    await acquire(await other.volume())


# -- failures -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
async def test_after_a_journal_that_failed_the_batch_is_not_applied_and_the_others_are_in_sqlite(
    world: SqliteWorld, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        for number in (1, 2):
            await volume.commit(owner, number, counter(number))
        real = getattr(os, call)

        def failing(*args: Any) -> None:
            if call == "fdatasync":
                real(*args)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, call, failing)
        with pytest.raises(StoreError, match=r"journal-1 failed: check the disk"):
            await volume.commit(owner, 3, batch_of(Counter("other", 3)))
        assert row_in_sqlite(world.path)[1] == 0
        monkeypatch.undo()
        assert await volume.last_batch(owner) == 2
        assert row_in_sqlite(world.path)[1] == 2
        assert not world.journal_path().exists()
        await volume.commit(owner, 3, counter(3))
        await volume.commit(owner, 4, counter(4))
        await world.end_processes()
        await check_counters(world, 4)


async def test_after_a_sync_of_sqlite_that_failed_the_volume_stops_and_the_next_owner_applies_all_again(
    world: SqliteWorld,
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        for number in (1, 2, 3):
            await volume.commit(owner, number, counter(number))
            await world.show(volume)
        await volume.commit(owner, 4, counter(4))
        journal_of(volume).distrust()
        for call in (volume.commit(owner, 5, counter(5)), volume.last_batch(owner), volume.release(owner)):
            with pytest.raises(StoreRefused, match="sync of the database failed"):
                await call
        # What the sync should have made durable is lost, as only a crash would show.
        with contextlib.closing(sqlite3.connect(world.path, isolation_level=None)) as connection:
            connection.execute("DELETE FROM counter WHERE name = 'batch-00002'")
        await world.end_processes()
        assert world.journal_path().exists()
        await check_counters(world, 4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount 4 MiB of memory (needs root)."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


async def test_on_a_full_disk_commits_go_on_until_the_journal_is_full_and_reads_see_all_of_them(
    small_disk: Path,
) -> None:
    world = SqliteWorld(small_disk, journal_after=0, half_bytes=64 * BLOCK_BYTES)
    async with world.running():
        volume, owner = await owned(world)
        await volume.commit(owner, 1, counter(1))
        await world.show(volume)
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        number = 1
        with pytest.raises(StoreError, match=r"meta\.db is full: free some space"):
            while number < 1000:
                await volume.commit(owner, number + 1, counter(number + 1))
                number += 1
        assert number > 100
        for _ in range(2):
            assert await volume.last_batch(owner) == number
            assert len(await volume.scan(COUNTER, after=None, limit=1000)) == number + 1
            key = (f"batch-{number:05}",)
            loaded = await volume.load({COUNTER: [key, ("last",)], DENTRY: [(1, b"")]}, {DENTRY: [1]})
            assert len(loaded.rows[COUNTER]) == 2
            with pytest.raises(StoreError, match="is full"):
                await volume.commit(owner, number + 1, counter(number + 1))
        assert row_in_sqlite(world.path)[1] < number
        filler.unlink()
        for number in range(number + 1, number + 200):  # noqa: B020
            await volume.commit(owner, number, counter(number))
        await world.end_processes()
        await check_counters(world, number)


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow beyond a size: writes behind it fail, as over a quota."""
    former_action = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    signal.signal(signal.SIGXFSZ, former_action)


async def test_over_a_quota_reads_see_what_the_journal_has(
    world: SqliteWorld, file_size_limit: Callable[[int], None]
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        for number in range(1, 4):
            await volume.commit(owner, number, counter(number))
        await world.show(volume)
        file_size_limit(Path(f"{world.path}-wal").stat().st_size)
        for number in range(4, 6):
            await volume.commit(owner, number, counter(number))
        for _ in range(2):
            assert len(await volume.scan(COUNTER, after=None, limit=100)) == 6
            assert (await volume.load({COUNTER: [("last",)]}, {})).rows[COUNTER] == [Counter("last", 5)]
        assert row_in_sqlite(world.path)[1] == 3
        file_size_limit(1 << 40)
        await volume.commit(owner, 6, counter(6))
        await world.end_processes()
        await check_counters(world, 6)


async def test_where_there_is_no_room_for_a_journal_commits_go_on_without(small_disk: Path) -> None:
    world = SqliteWorld(small_disk, journal_after=3)
    async with world.running():
        volume, owner = await owned(world)
        for number in range(1, 10):
            await volume.commit(owner, number, counter(number))
        assert not [name for name in world.files() if "journal" in name]
        await world.end_processes()
        await check_counters(world, 9)


async def test_an_owner_that_closes_on_a_full_disk_leaves_its_journal_to_the_next(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = SqliteWorld(small_disk, journal_after=0, half_bytes=64 * BLOCK_BYTES)
    async with world.running():
        volume, owner = await owned(world)
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        for number in range(1, 40):
            await volume.commit(owner, number, counter(number))
        await world.end_processes()
        assert "waits in the journal for the next owner" in caplog.text
        filler.unlink()
        assert world.journal_path().exists()
        await check_counters(world, 39)


# -- commits that nobody waits for any more -----------------------------------------------------------------------------


async def test_a_commit_that_is_cancelled_is_applied_wholly_or_not_at_all(world: SqliteWorld) -> None:
    async with world.running():
        volume, owner = await owned(world)
        number = 1
        for turns in range(40):
            slices = [Slice(SliceId(n), number, 1, 0, bytes(100)) for n in range(50)]
            committing = asyncio.create_task(volume.commit(owner, number, batch_of(*slices)))
            for _ in range(turns % 12):
                await asyncio.sleep(0)
            committing.cancel()
            await asyncio.gather(committing, return_exceptions=True)
            applied = await volume.last_batch(owner)
            assert applied in (number - 1, number)
            lengths = {row[1] for row in await volume.scan(SLICE, after=None, limit=1000)}
            assert lengths == ({applied} if applied else set())
            number = applied + 1


async def test_the_answer_about_a_cancelled_commit_is_final(
    world: SqliteWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        sync = os.fdatasync

        def slow(descriptor: int) -> None:
            time.sleep(0.05)
            sync(descriptor)

        monkeypatch.setattr(os, "fdatasync", slow)
        committing = asyncio.create_task(volume.commit(owner, 1, counter(1)))
        await asyncio.sleep(0.02)  # it is being written
        committing.cancel()
        await asyncio.gather(committing, return_exceptions=True)
        assert await volume.last_batch(owner) == 1
        assert len(await volume.scan(COUNTER, after=None, limit=9)) == 2


async def test_a_batch_that_is_sent_again_while_a_cancelled_commit_of_it_is_under_way_is_not_applied_twice(
    world: SqliteWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world.running():
        volume, owner = await owned(world)
        sync = os.fdatasync

        def slow(descriptor: int) -> None:
            time.sleep(0.05)
            sync(descriptor)

        monkeypatch.setattr(os, "fdatasync", slow)
        committing = asyncio.create_task(volume.commit(owner, 1, batch_of(Counter("first", 1))))
        await asyncio.sleep(0.02)
        committing.cancel()
        with pytest.raises(Fenced, match="batch 1 does not follow the stored batch 1"):
            await volume.commit(owner, 1, batch_of(Counter("second", 1)))
        assert await volume.scan(COUNTER, after=None, limit=9) == [Counter("first", 1)]


async def test_a_small_batch_does_not_overtake_a_large_one_that_nobody_waits_for(world: SqliteWorld) -> None:
    async with world.running():
        volume, owner = await owned(world)
        await volume.commit(owner, 1, counter(1))
        large = batch_past_the_journal(2)
        with contextlib.closing(sqlite3.connect(world.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            committing = asyncio.create_task(volume.commit(owner, 2, large))
            await asyncio.sleep(0.05)  # the thread waits for the lock
            committing.cancel()
            again = asyncio.create_task(volume.commit(owner, 2, batch_of(Counter("small", 2))))
            await asyncio.sleep(0.05)
            assert not again.done()
            other.execute("ROLLBACK")
        with pytest.raises(Fenced, match="batch 2 does not follow the stored batch 2"):
            await again
        assert await volume.last_batch(owner) == 2
        await volume.commit(owner, 3, counter(3))
        assert journal_of(volume).applied == 2  # the journal is in use again
        names = [row[0] for row in await volume.scan(COUNTER, after=None, limit=9)]
        assert names == ["batch-00001", "batch-00003", "large", "last"]


async def test_nor_two_of_which_the_first_fails_while_the_second_waits(world: SqliteWorld) -> None:
    async with world.running():
        volume, owner = await owned(world)
        await volume.commit(owner, 1, counter(1))
        await volume._writer.call(lambda connection: connection.execute("PRAGMA busy_timeout = 300"))
        with contextlib.closing(sqlite3.connect(world.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for pause_s in (0.05, 0.4):
                committing = asyncio.create_task(volume.commit(owner, 2, batch_past_the_journal(2)))
                await asyncio.sleep(pause_s)
                committing.cancel()
            small = asyncio.create_task(volume.commit(owner, 2, batch_of(Counter("small", 2))))
            await asyncio.sleep(0.05)
            assert not small.done()
            other.execute("ROLLBACK")
        with pytest.raises(Fenced, match="batch 2 does not follow the stored batch 2"):
            await small
        await volume.commit(owner, 3, counter(3))
        assert journal_of(volume).applied == 2, "the journal is in use again"
        await world.end_processes()
        assert row_in_sqlite(world.path)[1] == 3


async def test_a_journal_that_is_made_late_goes_on_where_the_commits_are(tmp_path: Path) -> None:
    world = SqliteWorld(tmp_path, journal_after=1)
    async with world.running():
        volume, owner = await owned(world)
        with contextlib.closing(sqlite3.connect(world.path, isolation_level=None)) as other:
            committing = asyncio.create_task(volume.commit(owner, 1, counter(1)))
            while row_in_sqlite(world.path)[1] == 0:
                await asyncio.sleep(0)
            other.execute("BEGIN IMMEDIATE")
            await asyncio.sleep(0.2)  # the journal's draft is there, its place waits for the lock
            committing.cancel()
            second = asyncio.create_task(volume.commit(owner, 2, counter(2)))
            await asyncio.sleep(0.05)
            other.execute("ROLLBACK")
        await second
        for number in range(3, 9):
            await volume.commit(owner, number, counter(number))
        await world.end_processes()
        await check_counters(world, 8)


async def test_a_store_is_closed_amid_a_commit(world: SqliteWorld) -> None:
    for life in range(1, 10):
        async with world.running():
            volume = await world.volume()
            owner = await acquire(volume, nonce=f"{life}")
            number = owner.last_batch
            committing = asyncio.create_task(volume.commit(owner, number + 1, counter(number + 1)))
            for _ in range(life):
                await asyncio.sleep(0)
            await world.end_processes()
            with contextlib.suppress(StoreError):
                await committing
                number += 1
            again = await world.volume()
            assert (await acquire(again)).last_batch in (number, number + 1)
            await world.end_processes()


async def test_other_processes_may_hold_the_write_lock_while_batches_are_committed(world: SqliteWorld) -> None:
    async with world.running():
        volume, owner = await owned(world)
        with contextlib.closing(sqlite3.connect(world.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(1, 5):
                await volume.commit(owner, number, counter(number), here=number % 2 == 0)
            other.execute("ROLLBACK")
        await world.end_processes()
        await check_counters(world, 4)


async def test_a_store_can_be_opened_by_default(tmp_path: Path) -> None:
    store = await SqliteStore.open(str(tmp_path / "meta.db"), create=True)
    await store.create_volume(volume_format(), NOTHING)
    volume = await store.open_volume("tenant", "volume")
    owner = await acquire(volume)
    for number in range(1, 40):
        await volume.commit(owner, number, counter(number))
    assert volume._own_journal() is not None
    await store.close()
    assert {path.name for path in tmp_path.iterdir()} == {"meta.db", "meta.db.1.owner"}
