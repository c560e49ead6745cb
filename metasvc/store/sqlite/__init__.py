"""The store in one SQLite file, for embedded volumes and for a service on one machine: metasvc.store.Store.

Reading order: foreign_errors, threads, owner_lock, log_room, database (file and schema), rows (SQL of the tables),
journal_format, journal, ownership (SQL of the volume row), volume, and this file.

Concurrency: one thread with one connection makes all changes of a process, up to four read beside it; the log (WAL) lets
readers of this and other processes go on while a commit is under way. One more thread writes the journals. Several processes
may open one database: reading needs no ownership, and writers of different volumes wait for each other's transactions.

Durability: a commit is on disk when it returns, and atomic: in SQLite (synchronous=FULL; that is SQLite's promise, taken as
given), or in the volume's journal, which reaches SQLite a moment later. What another process reads is as old as that.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Self

from metasvc.api.volume_format import dump_format, parse_format
from metasvc.errors import StoreError, VolumeExists, VolumeMissing
from metasvc.model import VolumeFormat
from metasvc.store.sqlite.database import connect_reader, connect_writer, prepare, transaction
from metasvc.store.sqlite.journal import HALF_BYTES, Journal, JournalPaths
from metasvc.store.sqlite.owner_lock import OwnerLock
from metasvc.store.sqlite.ownership import not_owner
from metasvc.store.sqlite.rows import apply_batch, delete_some_rows
from metasvc.store.sqlite.threads import CALL_DEADLINE_S, ConnectionThreads
from metasvc.store.sqlite.volume import JOURNAL_AFTER, JournalThread, SqliteVolume
from metasvc.store.tables import Batch

__all__ = ["SqliteStore"]

_READERS: Final = 4
_DELETED_AT_ONCE: Final = 5000
"""Rows of one transaction while a volume is deleted: about 20 ms, in which other volumes cannot commit."""
_DELETE_PAUSE_S: Final = 0.02


class SqliteStore:
    """One database file with the volumes of many tenants."""

    def __init__(self, path: str, *, clock: Callable[[], float], journal_after: int, half_bytes: int) -> None:
        """Use open()."""
        # Journals and lock files lie where SQLite has its own: beside the file, not beside a link to it.
        self._path = path = os.path.realpath(path) if os.path.exists(path) else os.path.abspath(path)
        self._clock = clock
        self._writer = ConnectionThreads(path, partial(connect_writer, path), name="sqlite-writer", limit=1)
        self._readers = ConnectionThreads(path, partial(connect_reader, path), name="sqlite-reader", limit=_READERS)
        self._writes = ConnectionThreads(path, JournalThread, name="sqlite-journal", limit=1)
        self._journal_after = journal_after
        self._half_bytes = half_bytes
        self._journals: dict[int, Journal] = {}
        self._volumes: list[SqliteVolume] = []

    @classmethod
    async def open(
        cls,
        path: str,
        *,
        create: bool = False,
        clock: Callable[[], float] = time.time,
        journal_after: int = JOURNAL_AFTER,
        half_bytes: int = HALF_BYTES,
    ) -> Self:
        """Open the database at a path; with ``create`` make it if it is missing or empty.

        ``clock`` gives seconds and must be one that all processes share. An owner makes a journal after ``journal_after``
        commits, with 0 before the first, of two halves of ``half_bytes``. The schema is brought up to date. Raises
        VolumeMissing if there is no file, StoreError if it is none of ours or unusable, SchemaTooNew. Cost: about 10 ms
        to create, 2 ms to open.
        """
        store = cls(path, clock=clock, journal_after=journal_after, half_bytes=half_bytes)
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                await asyncio.to_thread(prepare, store._path, create=create)
        except TimeoutError as exc:
            raise StoreError(f"{path} did not open within {CALL_DEADLINE_S:.0f} s: check the disk") from exc
        return store

    async def create_volume(self, volume_format: VolumeFormat, rows: Batch) -> None:
        await self._writer.call(_create_volume, volume_format, rows)

    async def open_volume(self, tenant: str, name: str) -> SqliteVolume:
        volume_id, text = await self._readers.call(_find_volume, tenant, name)
        volume = SqliteVolume(
            volume_id,
            parse_format(text),
            writer=self._writer,
            readers=self._readers,
            writes=self._writes,
            journals=self._journals,
            journal_after=self._journal_after,
            half_bytes=self._half_bytes,
            paths=JournalPaths(self._path, volume_id),
            lock=OwnerLock(self._path, volume_id),
            clock=self._clock,
        )
        self._volumes = [*(other for other in self._volumes if not other.closed), volume]
        return volume

    async def list_volumes(self) -> Sequence[VolumeFormat]:
        return [parse_format(text) for text in await self._readers.call(_list_volumes)]

    async def delete_volume(self, tenant: str, name: str) -> None:
        """Delete a volume: its name at once, then its rows in small transactions.

        If the process ends in between, the rows that are left go with the next volume that is deleted.
        """
        await self._writer.call(_delete_volume, self._path, tenant, name, int(self._clock() * 1e9))
        left = True
        while left:
            left = await self._writer.call(_delete_leftovers, self._path)
            # Writers of other processes poll for the lock: leave it free half of the time.
            await asyncio.sleep(_DELETE_PAUSE_S)

    async def setting(self, name: str) -> bytes | None:
        return await self._readers.call(_setting, name)

    async def create_setting(self, name: str, value: bytes) -> bool:
        sql = "INSERT OR IGNORE INTO setting (name, value) VALUES (?, ?)"
        return bool(await self._writer.call(_count_changed, sql, (name, value)))

    async def settings(self, prefix: str) -> dict[str, bytes]:
        return await self._readers.call(_settings, prefix)

    async def replace_setting(self, name: str, value: bytes, *, expected: bytes) -> bool:
        sql = "UPDATE setting SET value = ? WHERE name = ? AND value = ?"
        return bool(await self._writer.call(_count_changed, sql, (value, name, expected)))

    async def delete_setting(self, name: str) -> bool:
        return bool(await self._writer.call(_count_changed, "DELETE FROM setting WHERE name = ?", (name,)))

    async def add_tenant(self, name: str, *, created_ns: int) -> bool:
        sql = "INSERT OR IGNORE INTO tenant (name, created_ns) VALUES (?, ?)"
        return bool(await self._writer.call(_count_changed, sql, (name, created_ns)))

    async def remove_tenant(self, name: str) -> bool:
        return bool(await self._writer.call(_count_changed, "DELETE FROM tenant WHERE name = ?", (name,)))

    async def tenants(self) -> Sequence[str]:
        return await self._readers.call(_tenants)

    async def close(self) -> None:
        """Close all handles and the threads' connections; the last connection to the file empties the log into it."""
        try:
            for volume in self._volumes:
                await volume.close()
        finally:
            self._volumes.clear()
            await self._readers.close()
            await self._writes.close()
            await self._writer.close()


def _create_volume(connection: sqlite3.Connection, volume_format: VolumeFormat, rows: Batch) -> None:
    tenant, name = volume_format.tenant, volume_format.name
    with transaction(connection):
        if connection.execute("SELECT 1 FROM volume WHERE tenant = ? AND name = ?", (tenant, name)).fetchone():
            raise VolumeExists(f"volume {tenant}/{name} exists already; choose another name or delete it first")
        added = connection.execute(
            "INSERT INTO volume (tenant, name, format) VALUES (?, ?, ?)", (tenant, name, dump_format(volume_format))
        )
        assert added.lastrowid is not None
        apply_batch(connection, added.lastrowid, rows)


def _setting(connection: sqlite3.Connection, name: str) -> bytes | None:
    row = connection.execute("SELECT value FROM setting WHERE name = ?", (name,)).fetchone()
    return None if row is None else bytes(row[0])


def _settings(connection: sqlite3.Connection, prefix: str) -> dict[str, bytes]:
    sql = "SELECT name, value FROM setting WHERE name >= ? AND substr(name, 1, ?) = ? ORDER BY name"
    return {name: bytes(value) for name, value in connection.execute(sql, (prefix, len(prefix), prefix))}


def _tenants(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM tenant ORDER BY name").fetchall()]


def _count_changed(connection: sqlite3.Connection, sql: str, values: tuple[object, ...]) -> int:
    """Run a statement that changes rows, durably; how many."""
    with transaction(connection):
        return connection.execute(sql, values).rowcount


def _find_volume(connection: sqlite3.Connection, tenant: str, name: str) -> tuple[int, str]:
    row = connection.execute("SELECT id, format FROM volume WHERE tenant = ? AND name = ?", (tenant, name)).fetchone()
    if row is None:
        raise VolumeMissing(f"there is no volume {tenant}/{name}; make it with: atoll format")
    return row[0], row[1]


def _list_volumes(connection: sqlite3.Connection) -> list[str]:
    rows = connection.execute("SELECT format FROM volume WHERE tenant IS NOT NULL ORDER BY tenant, name").fetchall()
    return [text for (text,) in rows]


def _delete_volume(connection: sqlite3.Connection, path: str, tenant: str, name: str, now_ns: int) -> None:
    volume_id, _ = _find_volume(connection, tenant, name)
    lock = OwnerLock(path, volume_id)
    if not lock.try_lock():
        raise not_owner(connection, volume_id, lock, now_ns)
    try:
        with transaction(connection):
            # An owner that lives though its lock file was removed is fenced by this, as by a takeover.
            paths = JournalPaths(path, volume_id)
            paths.take()
            connection.execute(
                "UPDATE volume SET tenant = NULL, name = NULL, owner_nonce = NULL, owner_address = NULL, "
                "owner_expires_ns = 0, epoch = epoch + 1 WHERE id = ?",
                (volume_id,),
            )
        paths.remove()
    finally:
        lock.unlock(remove=True)


def _delete_leftovers(connection: sqlite3.Connection, path: str) -> bool:
    """Delete some rows of deleted volumes; False when nothing is left of any."""
    with transaction(connection):
        row = connection.execute("SELECT id FROM volume WHERE tenant IS NULL LIMIT 1").fetchone()
        if row is None:
            return False
        if not delete_some_rows(connection, row[0], _DELETED_AT_ONCE):
            JournalPaths(path, row[0]).remove()
            connection.execute("DELETE FROM volume WHERE id = ?", row)
    return True
