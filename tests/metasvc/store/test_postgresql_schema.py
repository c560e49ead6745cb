"""The schema in PostgreSQL: whose it is, its version, migrations, its columns against the row types, and how rows are found."""

from __future__ import annotations

import asyncio
import re

import asyncpg
import pytest

from metasvc.api.volume_format import dump_format
from metasvc.errors import SchemaTooNew, StoreError, VolumeMissing
from metasvc.store.open import open_store
from metasvc.store.postgresql import PostgresqlStore, database, ownership, rows
from metasvc.store.tables import DENTRY, INODE, TABLES, Batch
from migrations import Migration, load_migrations
from tests.closing import close_at_end
from tests.metasvc.store.contract import NOTHING, acquire, all_rows
from tests.metasvc.store.postgresql_world import PostgresqlWorld
from tests.metasvc.store.rows_of import batch_of, column_types, example_row, volume_format
from tests.servers.postgresql import PostgreSQL

MIGRATIONS = load_migrations("postgresql")
NEWEST = len(MIGRATIONS)
BESIDE = {"volume", "tenant", "setting", "atollfs_schema"}


@pytest.fixture
def world(postgresql: PostgreSQL) -> PostgresqlWorld:
    return PostgresqlWorld(postgresql)


async def version(world: PostgresqlWorld) -> int:
    return await world.number(f"SELECT version FROM {world.schema}.atollfs_schema")


async def tables(world: PostgresqlWorld) -> set[str]:
    found = await world.sql(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = $1::regnamespace", world.schema
    )
    return {name for (name,) in found}


async def as_user(world: PostgresqlWorld) -> asyncpg.Connection:
    """Connect as a process of the world does, until the test ends."""
    await world.make()
    connection: asyncpg.Connection = await asyncpg.connect(world.server.url(search_path=world.schema))
    close_at_end(connection.close)
    return connection


async def test_what_was_not_prepared_is_refused_unless_it_may_be_made(world: PostgresqlWorld) -> None:
    await world.make()
    with pytest.raises(VolumeMissing, match="was not prepared for AtollFS: run `atoll serve --init"):
        await open_store(world.url)
    assert await tables(world) == set()
    await (await open_store(world.url, create=True)).close()
    assert await version(world) == NEWEST
    await (await open_store(world.url)).close()
    await (await open_store(world.url.replace("postgresql://", "postgres://"))).close()


async def test_a_newer_schema_is_refused_naming_both_versions(world: PostgresqlWorld) -> None:
    async with world.running():
        await world.process()
        await world.sql(f"UPDATE {world.schema}.atollfs_schema SET version = 99")
        for create in (False, True):
            with pytest.raises(SchemaTooNew, match=rf"has schema version 99.*up to {NEWEST}.*upgrade AtollFS"):
                await PostgresqlStore.open(world.url, create=create)
        assert await version(world) == 99


@pytest.mark.parametrize("table", ["inode", "volume", "setting"])
async def test_tables_of_something_else_are_refused_and_left_alone(world: PostgresqlWorld, table: str) -> None:
    await world.make()
    await world.sql(f"CREATE TABLE {world.schema}.{table} (mine int)")
    with pytest.raises(VolumeMissing, match="was not prepared"):
        await PostgresqlStore.open(world.url)
    with pytest.raises(StoreError, match=rf"has tables of something else \({table}\): make a database"):
        await PostgresqlStore.open(world.url, create=True)
    assert await tables(world) == {table}


@pytest.mark.parametrize("start", range(NEWEST + 1))
async def test_each_earlier_version_is_brought_up_to_date(world: PostgresqlWorld, start: int) -> None:
    connection = await as_user(world)
    await database.prepare(connection, "here", create=True, migrations=MIGRATIONS[:start])
    await connection.close()
    assert await tables(world) == (set() if start == 0 else {table.name for table in TABLES} | BESIDE)
    rows_then = batch_of(*(example_row(table, number) for table in TABLES for number in range(5)))
    if start:
        await world.sql(
            f"INSERT INTO {world.schema}.volume (tenant, name, format) VALUES ('tenant', 'volume', $1)",
            dump_format(volume_format()),
        )
    async with world.running():
        volume = await world.volume()
        assert await version(world) == NEWEST
        await volume.commit(await acquire(volume), 1, rows_then)
        assert await all_rows(volume) == rows_then.puts


async def test_migrations_are_applied_in_order_and_once(world: PostgresqlWorld) -> None:
    steps = [
        Migration(NEWEST + 1, "a.sql", ("ALTER TABLE inode ADD COLUMN IF NOT EXISTS a BIGINT NOT NULL DEFAULT 1",)),
        Migration(NEWEST + 2, "b.sql", ("UPDATE inode SET a = a + 1",)),
    ]
    async with world.running():
        volume = await world.volume()
        await volume.commit(await acquire(volume), 1, batch_of(example_row(INODE, 1)))
        for last in (1, 2, 2):
            connection = await as_user(world)
            await database.prepare(connection, "here", create=False, migrations=[*MIGRATIONS, *steps[:last]])
            await connection.close()
            assert await version(world) == NEWEST + last
            assert await world.number(f"SELECT a FROM {world.schema}.inode") == last
        # The columns that this version does not know do not disturb it.
        assert await volume.scan(INODE, after=None, limit=9) == [example_row(INODE, 1)]


async def test_a_migration_that_fails_changes_nothing(world: PostgresqlWorld) -> None:
    broken = Migration(NEWEST + 2, "b.sql", ("DROP TABLE volume", "SELECT 1 / 0"))
    step = Migration(NEWEST + 1, "a.sql", ("DROP TABLE inode",))
    async with world.running():
        await world.process()
        connection = await as_user(world)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await database.prepare(connection, "here", create=False, migrations=[*MIGRATIONS, step, broken])
        await connection.close()
        assert await version(world) == NEWEST
        assert {"inode", "volume"} <= await tables(world)
        await world.process()


async def test_processes_that_make_the_tables_at_once_all_get_them(world: PostgresqlWorld) -> None:
    async with world.running():
        await world.make()
        stores = await asyncio.gather(*(world.process() for _ in range(8)))
        await stores[0].create_volume(volume_format(), NOTHING)
        for store in stores:
            assert len(await store.list_volumes()) == 1


async def test_two_schemas_of_one_database_do_not_see_each_other(postgresql: PostgreSQL) -> None:
    one, other = PostgresqlWorld(postgresql), PostgresqlWorld(postgresql)
    async with one.running(), other.running():
        await one.volume()
        assert list(await (await other.process()).list_volumes()) == []


async def test_opening_again_changes_nothing(world: PostgresqlWorld) -> None:
    async with world.running():
        volume = await world.volume()
        batch = batch_of(*(example_row(table, number) for table in TABLES for number in range(5)))
        await volume.commit(await acquire(volume), 1, batch)
        described = await world.sql(
            "SELECT oid, relname FROM pg_class WHERE relnamespace = $1::regnamespace ORDER BY 1", world.schema
        )
        await world.end_processes()
        volume = await world.volume()
        assert await all_rows(volume) == batch.puts
        again = await world.sql(
            "SELECT oid, relname FROM pg_class WHERE relnamespace = $1::regnamespace ORDER BY 1", world.schema
        )
        assert described == again


async def test_migrations_may_be_applied_twice(world: PostgresqlWorld) -> None:
    async with world.running():
        await world.process()
        connection = await as_user(world)
        for migration in MIGRATIONS:
            for statement in migration.statements:
                await connection.execute(statement)
        await connection.close()


async def test_the_columns_are_those_of_the_row_types(world: PostgresqlWorld) -> None:
    async with world.running():
        await world.process()
        types = {int: "bigint", bytes: "bytea", str: "text"}
        for table in TABLES:
            found = await world.sql(
                "SELECT attname, format_type(atttypid, NULL), attnotnull, attcollation::regcollation::text FROM pg_attribute "
                "WHERE attrelid = $1::regclass AND attnum > 0 ORDER BY attnum",
                f"{world.schema}.{table.name}",
            )
            columns = list(zip(("volume", *table.columns), (int, *column_types(table)), strict=True))
            collations = {int: "-", bytes: "-", str: '"C"'}
            assert [tuple(row) for row in found] == [
                (name, types[kind], True, collations[kind]) for name, kind in columns
            ], table
            keys = await world.sql(
                "SELECT indisunique, pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = $1::regclass",
                f"{world.schema}.{table.name}",
            )
            assert len(keys) == 1, f"{table}: one index is enough"
            assert keys[0][0]
            assert keys[0][1].endswith(f"({', '.join(('volume', *table.key_columns))})"), table
        assert await tables(world) == {table.name for table in TABLES} | BESIDE


def test_every_table_and_column_is_explained_where_it_is_defined() -> None:
    count = 0
    for migration in MIGRATIONS:
        for statement in migration.statements:
            text, create, body = statement.partition("CREATE TABLE")
            if not create:
                continue
            count += 1
            assert text.strip().startswith("--"), f"{migration.file_name}: a table without a comment above it"
            commented = False
            for line in body.splitlines()[1:-1]:
                if re.match(r"\s*--", line):
                    commented = True
                elif not re.match(r"\s*(PRIMARY KEY|UNIQUE)", line):
                    assert commented or "--" in line, f"{migration.file_name}: no comment at {line.strip()}"
                    commented = False
    # Beside those of a volume: volume, tenant and setting. The version's table is in metasvc/store/postgresql/database.py.
    assert count == len(TABLES) + 3


async def test_rows_are_found_by_their_whole_key_though_the_tables_were_empty_when_it_was_planned(
    world: PostgresqlWorld,
) -> None:
    """A plan that goes through all rows of a volume is right and quick as long as a table is small, and stays for ever."""
    statements: list[tuple[str, str, int]] = []
    for table in TABLES:
        key = table.key_size
        batch = Batch({table: [example_row(table, 1)]}, {table: [table.key_of(example_row(table, 1))]})
        statements += [
            (f"commit {table}", ownership._commit_sql(rows.shape_of(batch)), key),
            (f"load {table}", rows.load_sql((table,), ()), key),
            (f"scan {table}", rows.scan_sql(table, is_first=False), key),
            (f"scan all {table}", rows.scan_sql(table, is_first=True), 0),
            (f"delete {table}", rows.delete_some_sql(table, is_first=False), key),
        ]
        if table.grouped:
            statements.append((f"group {table}", rows.load_sql((), (table,)), 1))
    statements.append(("several", rows.load_sql((INODE, DENTRY), (DENTRY,)), 1))
    statements += [(f"directory {first}", rows.scan_dir_sql(is_first=first), 1) for first in (False, True)]
    async with world.running():
        await world.process()
        connection = await as_user(world)
        await connection.execute(database._TELL)
        for name, sql, key_columns in statements:
            count = max(int(number) for number in re.findall(r"\$(\d+)", sql))
            await connection.execute(f"PREPARE planned AS {sql}")
            plan = [
                row[0].strip()
                for row in await connection.fetch(f"EXPLAIN EXECUTE planned ({', '.join(['NULL'] * count)})")
            ]
            await connection.execute("DEALLOCATE planned")
            scans = [
                line
                for line in plan
                if " Scan " in line and re.search(r" on (?!own|gone|k\b|k_|unnest|p\b|volume)", line)
            ]
            assert scans, name
            for line in scans:
                assert re.search(r"Index (Only )?Scan using \w+_pkey|Tid Scan|Subquery Scan", line), (name, plan)
            conditions = [line for line in plan if line.startswith("Index Cond:") and "volume" in line]
            assert conditions, (name, plan)
            for line in conditions:
                # ROW(a, b) > ROW(x, y) is one condition on two columns.
                assert line.count(" = ") + line.count(" > ") + line.count("ROW(") // 2 >= 1 + key_columns, (name, line)
            assert not [line for line in plan if line.startswith(("Join Filter", "Hash", "->  Hash"))], (name, plan)
        await connection.close()
