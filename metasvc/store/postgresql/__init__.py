"""The store in a PostgreSQL database, for services of several processes: metasvc.store.Store.

Reading order: foreign_errors, address, rows (SQL of the tables), database (schema and settings), connections, ownership (SQL
of the volume row; why the fence holds), volume, and this file.

Concurrency: any number of processes on one database. Every change is one statement on one volume's row, which puts the
changes of a volume into one order; different volumes never wait for each other. Reads take no locks.

Durability: a commit that returned is as durable as the server makes it with ``synchronous_commit = on``, which every session
has unless the server or the role says something stronger or in between (docs/guides/service.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Self, TypeVar

import asyncpg

from metasvc.api.volume_format import dump_format, parse_format
from metasvc.errors import VolumeMissing
from metasvc.model import VolumeFormat
from metasvc.store.postgresql import ownership as owning
from metasvc.store.postgresql.address import Address
from metasvc.store.postgresql.connections import CHANGE_DEADLINE_S, READ_DEADLINE_S, Lane
from metasvc.store.postgresql.database import check_server, connect, prepare
from metasvc.store.postgresql.foreign_errors import FOREIGN, translate
from metasvc.store.postgresql.volume import PostgresqlVolume
from metasvc.store.tables import TABLES, Batch, Key, Table

__all__ = ["PostgresqlStore"]

_DELETED_AT_ONCE: Final = 5000
"""Rows of one statement while a volume is deleted: about 20 ms of the server's time."""
_DELETE_PAUSE_S: Final = 0.02

T = TypeVar("T")


class PostgresqlStore:
    """One schema of a PostgreSQL database with the volumes of many tenants."""

    def __init__(self, address: Address) -> None:
        """Use open()."""
        self._changes = Lane(address, limit=address.connections // 2)
        self._reads = Lane(address, limit=address.connections - address.connections // 2)

    @classmethod
    async def open(cls, url: str, *, create: bool = False) -> Self:
        """Open the database of a URL (metasvc.store.postgresql.address); with ``create`` make the tables if there are none.

        The database itself, and a schema that ``search_path`` names, must be there. The schema's tables are brought up to
        date. Raises VolumeMissing if there are none of ours and ``create`` is false, StoreError if the server cannot be
        reached or used, SchemaTooNew. Cost: one connection of 20 ms (mostly the password's digest) and six trips; 100 ms to
        make the tables.
        """
        address = Address.parse(url)
        try:
            connection = await connect(address)
            try:
                await check_server(connection, address.at)
                await prepare(connection, address.at, create=create)
            finally:
                await connection.close(timeout=1.0)
        except FOREIGN as exc:
            raise translate(exc, address.at) from exc
        return cls(address)

    async def create_volume(self, volume_format: VolumeFormat, rows: Batch) -> None:
        async def work(connection: asyncpg.Connection) -> None:
            tenant, name = volume_format.tenant, volume_format.name
            await owning.create_volume(connection, tenant, name, dump_format(volume_format), rows)

        await self._changes.call(work, deadline_s=CHANGE_DEADLINE_S)

    async def open_volume(self, tenant: str, name: str) -> PostgresqlVolume:
        found = await self._fetch("SELECT id, format FROM volume WHERE tenant = $1 AND name = $2", tenant, name)
        if not found:
            raise VolumeMissing(f"there is no volume {tenant}/{name}; make it with: atoll format")
        volume_id, text = found[0]
        return PostgresqlVolume(volume_id, parse_format(text), changes=self._changes, reads=self._reads)

    async def list_volumes(self) -> Sequence[VolumeFormat]:
        found = await self._fetch("SELECT format FROM volume WHERE tenant IS NOT NULL ORDER BY tenant, name")
        return [parse_format(text) for (text,) in found]

    async def delete_volume(self, tenant: str, name: str) -> None:
        """Delete a volume: its name at once, then its rows in small transactions.

        If the process ends in between, the rows that are left go with the next volume that is deleted.
        """
        await self._change(lambda connection: owning.disown_deleted(connection, tenant, name), again=False)
        while (volume_id := await self._change(owning.find_deleted)) is not None:
            for table in TABLES:
                await self._delete_rows(volume_id, table)
            if not await self._change(partial(owning.forget_deleted, volume_id=volume_id)):
                # Another process is at it, too.
                await asyncio.sleep(_DELETE_PAUSE_S)

    async def _delete_rows(self, volume_id: int, table: Table) -> None:
        after: Key | None = None
        while True:
            work = partial(
                owning.delete_some_rows, volume_id=volume_id, table=table, after=after, limit=_DELETED_AT_ONCE
            )
            after = await self._change(work)
            if after is None:
                return
            await asyncio.sleep(_DELETE_PAUSE_S)

    async def setting(self, name: str) -> bytes | None:
        found = await self._fetch("SELECT value FROM setting WHERE name = $1", name)
        return found[0][0] if found else None

    async def create_setting(self, name: str, value: bytes) -> bool:
        return await self._insert("INSERT INTO setting (name, value) VALUES ($1, $2)", name, value)

    async def settings(self, prefix: str) -> dict[str, bytes]:
        sql = "SELECT name, value FROM setting WHERE name >= $1 AND starts_with(name, $1) ORDER BY name"
        return dict(await self._fetch(sql, prefix))

    async def replace_setting(self, name: str, value: bytes, *, expected: bytes) -> bool:
        sql = "UPDATE setting SET value = $2 WHERE name = $1 AND value = $3 RETURNING true"
        return await self._is_changed(sql, name, value, expected)

    async def delete_setting(self, name: str) -> bool:
        return await self._is_changed("DELETE FROM setting WHERE name = $1 RETURNING true", name)

    async def add_tenant(self, name: str, *, created_ns: int) -> bool:
        return await self._insert("INSERT INTO tenant (name, created_ns) VALUES ($1, $2)", name, created_ns)

    async def remove_tenant(self, name: str) -> bool:
        return await self._is_changed("DELETE FROM tenant WHERE name = $1 RETURNING true", name)

    async def tenants(self) -> Sequence[str]:
        return [name for (name,) in await self._fetch("SELECT name FROM tenant ORDER BY name")]

    async def close(self) -> None:
        """Close the connections, behind what is under way; handles answer nothing any more. May be called twice."""
        await self._reads.close()
        await self._changes.close()

    async def _insert(self, sql: str, *values: object) -> bool:
        """Add a row durably unless one has its key; whether it is this one."""
        return await self._is_changed(f"{sql} ON CONFLICT (name) DO NOTHING RETURNING true", *values)

    async def _is_changed(self, sql: str, *values: object) -> bool:
        """Run, once, a statement that answers true for the row that it changed, durably; whether there was one."""
        return await self._change(lambda connection: connection.fetchval(sql, *values), again=False) is True

    async def _change(self, work: Callable[[asyncpg.Connection], Awaitable[T]], *, again: bool = True) -> T:
        return await self._changes.call(work, deadline_s=CHANGE_DEADLINE_S, again=again)

    async def _fetch(self, sql: str, *values: object) -> list[Any]:
        async def work(connection: asyncpg.Connection) -> list[Any]:
            return await connection.fetch(sql, *values)

        return await self._reads.call(work, deadline_s=READ_DEADLINE_S, again=True)
