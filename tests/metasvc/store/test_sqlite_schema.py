"""The database file: whose it is, its version, and its schema against the row types."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from metasvc.errors import SchemaTooNew, StoreError
from metasvc.store.sqlite import SqliteStore
from metasvc.store.sqlite.database import APPLICATION_ID
from metasvc.store.tables import TABLES
from migrations import load_migrations
from tests.metasvc.store.contract import NOTHING, acquire, all_rows
from tests.metasvc.store.rows_of import batch_of, column_types, example_row, volume_format
from tests.metasvc.store.sqlite_world import SqliteWorld

NEWEST = len(load_migrations("sqlite"))


@pytest.fixture
def world(tmp_path: Path) -> SqliteWorld:
    return SqliteWorld(tmp_path)


async def test_the_header_says_what_the_file_is(world: SqliteWorld) -> None:
    async with world.running():
        await world.process()
    header = world.path.read_bytes()[:100]
    assert header[:16] == b"SQLite format 3\0"
    assert header[68:72] == b"Atol" == APPLICATION_ID.to_bytes(4, "big")
    assert int.from_bytes(header[60:64], "big") == NEWEST  # user_version
    assert int.from_bytes(header[16:18], "big") == 4096  # page size
    assert header[18:20] == b"\2\2"  # write-ahead log


async def test_a_newer_schema_is_refused_naming_both_versions(world: SqliteWorld) -> None:
    async with world.running():
        await world.process()
    with sqlite3.connect(world.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = world.path.read_bytes()
    for create in (False, True):
        with pytest.raises(SchemaTooNew, match=rf"meta\.db has schema version 99.*up to {NEWEST}.*upgrade AtollFS"):
            await SqliteStore.open(str(world.path), create=create)
    assert world.path.read_bytes() == before


def _foreign_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (a)")
    connection.close()


def _database_of_another_application(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA application_id = 252006673")
    connection.close()


def _empty_file(path: Path) -> None:
    path.touch()


def _text(path: Path) -> None:
    path.write_text("Dear diary, " * 1000)


def _directory(path: Path) -> None:
    path.mkdir()


def _dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "make", [_foreign_database, _database_of_another_application, _empty_file, _text, _directory, _dangling_link]
)
async def test_what_something_else_made_is_refused_and_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "meta.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for create in (False, True):
        with pytest.raises(StoreError, match=r"meta\.db is no AtollFS metadata database: check the address"):
            await SqliteStore.open(str(path), create=create)
    assert list(SqliteWorld(tmp_path).files()) == ["meta.db"]
    assert (path.read_bytes() if path.is_file() else None) == before


async def test_opening_again_changes_nothing(world: SqliteWorld) -> None:
    async with world.running():
        volume = await world.volume()
        owner = await acquire(volume)
        batch = batch_of(*(example_row(table, number) for table in TABLES for number in range(5)))
        await volume.commit(owner, 1, batch)
        rows = await all_rows(volume)
        await world.end_processes()
        before = world.path.read_bytes()
        await world.process()
        await world.end_processes()
        assert world.path.read_bytes() == before
        assert await all_rows(await world.volume()) == rows


async def test_a_migration_that_was_cut_short_is_made_whole(world: SqliteWorld) -> None:
    """A new file carries our mark before it has a schema: version 0, nothing in it."""
    async with world.running():
        store = await world.process()
        await store.close()
        with sqlite3.connect(world.path) as connection:
            for table in TABLES:
                connection.execute(f'DROP TABLE "{table.name}"')
            connection.execute("DROP TABLE volume")
            connection.execute("PRAGMA user_version = 0")
        connection.close()
        store = await SqliteStore.open(str(world.path))
        await store.create_volume(volume_format(), NOTHING)
        await store.close()


async def test_the_columns_are_those_of_the_row_types(world: SqliteWorld) -> None:
    async with world.running():
        await world.process()
    types = {int: "INTEGER", bytes: "BLOB", str: "TEXT"}
    connection = sqlite3.connect(world.path)
    for table in TABLES:
        columns = connection.execute('SELECT name, type, "notnull" FROM pragma_table_info(?)', (table.name,)).fetchall()
        wanted = [(name, types[kind], 1) for name, kind in zip(table.columns, column_types(table), strict=True)]
        assert columns == [("volume", "INTEGER", 1), *wanted], table
        key = [
            [name for (name,) in connection.execute("SELECT name FROM pragma_index_info(?) ORDER BY seqno", (index,))]
            for index, unique in connection.execute('SELECT name, "unique" FROM pragma_index_list(?)', (table.name,))
            if unique
        ]
        assert key == [["volume", *table.key_columns]], table
    names = {name for (name,) in connection.execute("SELECT name FROM pragma_table_list WHERE schema = 'main'")}
    beside = {"volume", "tenant", "setting"}
    assert names == {table.name for table in TABLES} | beside | {"sqlite_schema", "sqlite_sequence"}
    strict = connection.execute("SELECT name FROM pragma_table_list WHERE strict").fetchall()
    assert len(strict) == len(TABLES) + len(beside)
    connection.close()


def test_every_table_and_column_is_explained_where_it_is_defined() -> None:
    tables = 0
    for migration in load_migrations("sqlite"):
        for statement in migration.statements:
            text, create, body = statement.partition("CREATE TABLE")
            if not create:
                continue
            tables += 1
            assert text.strip().startswith("--"), f"{migration.file_name}: a table without a comment above it"
            commented = False
            for line in body.splitlines()[1:-1]:
                if re.match(r"\s*--", line):
                    commented = True
                elif not re.match(r"\s*(PRIMARY KEY|UNIQUE)", line):
                    assert commented or "--" in line, f"{migration.file_name}: no comment at {line.strip()}"
                    commented = False
    # Beside those of a volume: volume, tenant and setting.
    assert tables == len(TABLES) + 3
