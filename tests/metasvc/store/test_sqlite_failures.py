"""What the SQLite store says when the file system, the file or SQLite fails. Every failure is a real one.

The tests that mount a file system of their own need root.
"""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chunkstore.geometry import SliceId
from metasvc.errors import StoreError
from metasvc.model import Counter, Slice
from metasvc.store.sqlite import SqliteStore
from metasvc.store.sqlite.foreign_errors import translate
from metasvc.store.tables import COUNTER, SLICE, Batch
from tests.metasvc.store.contract import acquire
from tests.metasvc.store.rows_of import batch_of
from tests.metasvc.store.sqlite_world import SqliteWorld


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount 1 MiB of memory (needs root)."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def _batch(number: int) -> Batch:
    slices = [Slice(SliceId(number * 10 + n), 10_000, 1, 0, bytes(10_000)) for n in range(10)]
    return batch_of(*slices, Counter(f"{number}", number))


async def test_a_full_disk_refuses_a_batch_whole_and_takes_it_when_there_is_room(small_disk: Path) -> None:
    world = SqliteWorld(small_disk)
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        number = 0

        async def fill() -> None:
            nonlocal number
            while number < 100:
                await volume.commit(owner, number + 1, _batch(number))
                number += 1

        with pytest.raises(StoreError, match=r"meta\.db is full: free some space") as failure:
            await fill()
        assert "\n" not in str(failure.value)
        assert number >= 1
        assert await volume.last_batch(owner) == number
        assert len(await volume.scan(SLICE, after=None, limit=1000)) == number * 10
        with pytest.raises(StoreError, match="is full"):
            await volume.commit(owner, number + 1, _batch(number))
        _remount(small_disk, "size=64m")
        await volume.commit(owner, number + 1, _batch(number))
        assert await volume.last_batch(owner) == number + 1
        assert len(await volume.scan(SLICE, after=None, limit=1000)) == (number + 1) * 10
        await world.end_processes()
        again = await world.volume()
        assert len(await again.scan(COUNTER, after=None, limit=1000)) == number + 1


async def test_a_database_on_a_read_only_disk_says_so(small_disk: Path) -> None:
    world = SqliteWorld(small_disk)
    async with world.running():
        await world.volume()
        await world.end_processes()
        _remount(small_disk, "ro")
        try:
            with pytest.raises(StoreError, match=r"meta\.db cannot be (written|opened).*writable"):
                await acquire(await world.volume())
        finally:
            _remount(small_disk, "rw")


async def test_a_directory_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"could not be used: No such file or directory; check path"):
        await SqliteStore.open(str(tmp_path / "absent" / "meta.db"), create=True)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, timeout=0)


def _fill(directory: Path) -> None:
    with _connect(directory / "x.db") as connection:
        connection.execute("PRAGMA max_page_count = 3")
        connection.execute("CREATE TABLE t (b)")
        connection.execute("INSERT INTO t VALUES (zeroblob(100000))")


def _wait_for_another(directory: Path) -> None:
    first, second = _connect(directory / "x.db"), _connect(directory / "x.db")
    first.execute("BEGIN IMMEDIATE")
    second.execute("BEGIN IMMEDIATE")


def _write_read_only(directory: Path) -> None:
    _connect(directory / "x.db").execute("CREATE TABLE t (b)")
    sqlite3.connect(f"file:{directory}/x.db?mode=ro", uri=True).execute("DROP TABLE t")


def _open_a_text(directory: Path) -> None:
    (directory / "x.db").write_text("This is no database. " * 100)
    _connect(directory / "x.db").execute("SELECT * FROM sqlite_schema")


def _open_nothing(directory: Path) -> None:
    sqlite3.connect(f"file:{directory}/absent.db?mode=rw", uri=True)


def _break_a_constraint(directory: Path) -> None:
    _connect(directory / "x.db").executescript(
        "CREATE TABLE t (a INTEGER NOT NULL) STRICT; INSERT INTO t VALUES (NULL)"
    )


def _insert_what_is_too_big(directory: Path) -> None:
    connection = _connect(directory / "x.db")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100)
    connection.execute("CREATE TABLE t (b)").execute("INSERT INTO t VALUES (?)", (bytes(101),))


def _misspell(directory: Path) -> None:
    _connect(directory / "x.db").execute("SELEKT 1")


def _use_after_close(directory: Path) -> None:
    connection = _connect(directory / "x.db")
    connection.close()
    connection.execute("SELECT 1")


@pytest.mark.parametrize(
    ("fail", "text"),
    [
        (_fill, "DB is full: free some space there, then try again (SQLITE_FULL: "),
        (
            _wait_for_another,
            "DB was locked by another process for 10 s: end that process, then try again (SQLITE_BUSY: ",
        ),
        (_write_read_only, "DB cannot be written: make the file and its directory writable for this user (SQLITE_READ"),
        (_open_a_text, "DB is no AtollFS metadata database: check the address (SQLITE_NOTADB: "),
        (
            _open_nothing,
            "DB cannot be opened: check that its directory exists and is writable for this user (SQLITE_CANT",
        ),
        (
            _break_a_constraint,
            "a row does not fit the schema of DB: this is a bug, please report it (SQLITE_CONSTRAINT",
        ),
        (_insert_what_is_too_big, "a row is too big for DB: this is a bug, please report it (SQLITE_TOOBIG: "),
        (_misspell, "DB could not be used: see the cause, and report it if it is not yours (SQLITE_ERROR: near "),
        (_use_after_close, "DB could not be used: see the cause, and report it if it is not yours (ProgrammingError: "),
    ],
)
def test_each_failure_of_sqlite_becomes_one_line_with_a_remedy(
    tmp_path: Path, fail: Callable[[Path], None], text: str
) -> None:
    with pytest.raises(sqlite3.Error) as failure:
        fail(tmp_path)
    translated = translate(failure.value, "DB")
    assert text in str(translated)
    assert "\n" not in str(translated)
