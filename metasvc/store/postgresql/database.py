"""The schema in a PostgreSQL database: recognise it, make it, bring it up to date; and what each connection is told.

Owns the session's settings and the table ``atollfs_schema``, whose one row has the number of the last migration. Knows no
volume. The tables lie in the connection's current schema: ``public`` unless the URL has ``search_path=…``.

Migrations of several processes: whoever migrates holds an advisory lock of the schema, and looks at the version again once it
has it, in a transaction that began after that (one that waited for the lock would not see what the other one made). All
missing migrations are one transaction: after a crash all or none were done, and the lock ends with the
connection. A statement of a running service waits for the locks of ALTER TABLE, at most as long as a call may take.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

import asyncpg

from metasvc.errors import SchemaTooNew, StoreError, VolumeMissing
from metasvc.store.postgresql.address import Address
from metasvc.store.tables import TABLES
from migrations import Migration, load_migrations

__all__ = ["CONNECT_DEADLINE_S", "check_server", "connect", "prepare"]

CONNECT_DEADLINE_S: Final = 5.0
MIN_VERSION: Final = 140000
"""PostgreSQL 14, of 2021, is the oldest that was maintained in 2026. 15 and 18 are tested."""

_SETTINGS: Final = {
    # A transaction that finds a row changed under it takes the new version; at other levels it would fail. The fence of
    # commits needs it: who waited for a successor's takeover sees the successor's epoch.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    # Plans: see rows. Compiling one would take longer than any of these statements.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
    "enable_memoize": "off",
    "jit": "off",
    # The server's bounds; those of a caller are in connections. A statement whose caller has gone ends by itself.
    "statement_timeout": "30s",
    "lock_timeout": "4s",
    "idle_in_transaction_session_timeout": "60s",
    # A client that vanished holds its connection no longer than this.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "bytea_output": "hex",
    "client_min_messages": "warning",
}
_TELL: Final = "; ".join(f"SET {name} = '{value}'" for name, value in _SETTINGS.items())
_STATEMENTS: Final = 256
"""Prepared for each connection: a load or a commit is a statement of its own for each set of tables. Loads of a walk and
commits of creates and the like are two dozen."""

_ASK_SERVER: Final = (
    "SELECT current_setting('server_version_num')::int AS version, current_setting('server_encoding') AS encoding, "
    "current_setting('synchronous_commit') AS synchronous, current_setting('fsync') AS fsync, "
    "current_setting('full_page_writes') AS whole_pages, pg_is_in_recovery() AS is_standby"
)
_LOCK: Final = "SELECT pg_advisory_lock(1098149740, current_schema()::regnamespace::oid::int)"
"""``Atol`` in ASCII, and the schema. Released with the connection."""
_PATIENCE: Final = "SET lock_timeout = '60s'; SET statement_timeout = 0"
"""Of who migrates: to change a large table may take its time."""
_MARK: Final = (
    "-- The version of the schema: one row.\n"
    "CREATE TABLE IF NOT EXISTS atollfs_schema (\n"
    "    is_only BOOLEAN PRIMARY KEY DEFAULT true CHECK (is_only), -- true: there is no second row\n"
    "    version BIGINT NOT NULL -- number of the last migration that was applied\n"
    ")"
)
_OURS: Final = [*(table.name for table in TABLES), "volume", "tenant", "setting"]

log = logging.getLogger(__name__)


async def connect(address: Address, *, deadline_s: float = CONNECT_DEADLINE_S) -> asyncpg.Connection:
    """Connect and tell the session how it shall work. Two trips and those of the driver. Foreign errors.

    Where the server or the role says ``synchronous_commit = off`` the session says ``on``: an acknowledged batch is durable.
    """
    connection: asyncpg.Connection = await asyncpg.connect(
        address.url,
        timeout=deadline_s,
        statement_cache_size=_STATEMENTS,
        max_cached_statement_lifetime=0,
        max_cacheable_statement_size=0,
    )
    try:
        await connection.execute(_TELL)
        # Simple queries: nothing is prepared for what is asked once.
        await connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
        )
    except BaseException:
        connection.terminate()
        raise
    return connection


async def check_server(connection: asyncpg.Connection, at: str) -> None:
    """Refuse a server that cannot hold our rows, and warn of one that may lose them. StoreError, foreign errors."""
    server = await connection.fetchrow(_ASK_SERVER)
    assert server is not None
    if server["version"] < MIN_VERSION:
        raise StoreError(
            f"{at} is version {server['version'] // 10000}: use PostgreSQL {MIN_VERSION // 10000} or newer"
        )
    if server["encoding"] != "UTF8":
        raise StoreError(
            f"{at} has the encoding {server['encoding']}: make a database with createdb --template template0 --encoding UTF8"
        )
    if server["is_standby"]:
        raise StoreError(f"{at} is a standby: name the primary, or add target_session_attrs=read-write to the URL")
    weak = [
        f"{name} = {server[key]}"
        for name, key in (("fsync", "fsync"), ("full_page_writes", "whole_pages"))
        if server[key] == "off"
    ]
    if server["synchronous"] == "local":
        weak.append("synchronous_commit = local")
    if weak:
        log.warning(
            "%s runs with %s: what was acknowledged may be lost when its machine or the primary fails",
            at,
            " and ".join(weak),
        )


async def prepare(
    connection: asyncpg.Connection, at: str, *, create: bool, migrations: Sequence[Migration] | None = None
) -> None:
    """Make sure that there is our schema, and that it is the newest.

    Raises VolumeMissing if there is none and ``create`` is false, SchemaTooNew for one of a newer AtollFS, StoreError where
    something else has tables of our names; nothing is changed then. Foreign errors. Two trips where nothing is to do. Close the
    connection afterwards: it may have the lock, and other settings.
    """
    if migrations is None:
        migrations = load_migrations("postgresql")
    version = await _version(connection)
    if version == len(migrations):
        return
    _refuse_newer(version, at, newest=len(migrations))
    if not version and not create:
        raise VolumeMissing(
            f"{at} was not prepared for AtollFS: run `atoll serve --init --store URL`, or check the address"
        )
    await connection.execute(_PATIENCE)
    await connection.execute(_LOCK)
    async with connection.transaction():
        # Again, now that nobody else migrates: another process may have been quicker.
        version = await _version(connection)
        _refuse_newer(version, at, newest=len(migrations))
        if not version:
            await _refuse_foreign(connection, at)
            await connection.execute(_MARK)
        for migration in migrations[version:]:
            for statement in migration.statements:
                await connection.execute(statement)
        await connection.execute(
            "INSERT INTO atollfs_schema (version) VALUES ($1) ON CONFLICT (is_only) DO UPDATE SET version = excluded.version",
            len(migrations),
        )


async def _version(connection: asyncpg.Connection) -> int:
    """Return the number of the last migration, 0 where there is no schema of ours."""
    if await connection.fetchval("SELECT to_regclass(quote_ident(current_schema()) || '.atollfs_schema')") is None:
        return 0
    return int(await connection.fetchval("SELECT version FROM atollfs_schema") or 0)


def _refuse_newer(version: int, at: str, *, newest: int) -> None:
    if version > newest:
        raise SchemaTooNew(f"{at} has schema version {version}, this AtollFS knows up to {newest}: upgrade AtollFS")


async def _refuse_foreign(connection: asyncpg.Connection, at: str) -> None:
    """Refuse tables of something else, which CREATE TABLE IF NOT EXISTS would take for ours."""
    found = await connection.fetchval(
        "SELECT string_agg(relname, ', ' ORDER BY relname) FROM pg_class "
        "WHERE relnamespace = current_schema()::regnamespace AND relname = ANY ($1)",
        _OURS,
    )
    if found:
        raise StoreError(
            f"{at} has tables of something else ({found}): make a database for AtollFS alone, or a schema, and add "
            "search_path=SCHEMA to the URL"
        )
