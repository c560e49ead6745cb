"""One volume of a SQLite database: metasvc.store.VolumeStore."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

from metasvc.api.volume_format import check_same_volume, dump_format
from metasvc.errors import StoreError
from metasvc.model import Dentry, Inode, VolumeFormat
from metasvc.store import Loaded, Ownership
from metasvc.store.sqlite import ownership as owning
from metasvc.store.sqlite.database import WriterConnection
from metasvc.store.sqlite.owner_lock import OwnerLock
from metasvc.store.sqlite.rows import load_rows, scan_directory, scan_table
from metasvc.store.sqlite.threads import ConnectionThreads
from metasvc.store.tables import Batch, Key, Row, Table

__all__ = ["SqliteVolume"]

_NS_PER_S: Final = 1_000_000_000

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SqliteVolume:
    """A handle of one volume. Changes go through the store's one writer, reads through its readers, beside it.

    Ownership: on one machine the kernel knows whether the owner lives, so an flock decides (owner_lock), and the expiry in
    the row is kept for messages and for other stores' sake. acquire() succeeds at once when nobody holds the lock, though the
    row has not expired; it raises NotOwner while somebody does, though the row has. What fences is nonce and
    epoch in the row, checked in the transaction of each commit, whatever became of the lock file.
    """

    def __init__(
        self,
        volume_id: int,
        volume_format: VolumeFormat,
        *,
        writer: ConnectionThreads[WriterConnection],
        readers: ConnectionThreads[sqlite3.Connection],
        lock: OwnerLock,
        clock: Callable[[], float],
    ) -> None:
        self._id = volume_id
        self._format = volume_format
        self._writer = writer
        self._readers = readers
        self._lock = lock
        self._clock = clock
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def format(self) -> VolumeFormat:
        return self._format

    async def acquire(self, *, nonce: str, address: str, ttl_s: float) -> Ownership:
        arguments = (self._id, self._lock, nonce, address, self._now_ns(), int(ttl_s * _NS_PER_S))
        return await self._write(owning.acquire, *arguments)

    async def renew(self, ownership: Ownership, *, ttl_s: float) -> None:
        await self._write(owning.renew, self._id, ownership, self._now_ns() + int(ttl_s * _NS_PER_S))

    async def release(self, ownership: Ownership) -> None:
        await self._write(owning.release, self._id, self._lock, ownership)

    async def commit(self, ownership: Ownership, number: int, batch: Batch, *, here: bool = False) -> None:
        if here and self._writer.may_call_here:
            self._check_open()
            # The lock is waited for in the thread: while the loop stands, no owner here renews, and nobody gets a sign of life.
            if self._writer.call_here(owning.commit_at_once, self._id, ownership, number, batch):
                return
        await self._write(owning.commit, self._id, ownership, number, batch)

    async def last_batch(self, ownership: Ownership) -> int:
        # Through the writer: behind a commit that is still under way, so that the answer is final.
        return await self._write(owning.read_last_batch, self._id, ownership)

    async def load(self, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]) -> Loaded:
        return await self._read(load_rows, self._id, keys, groups)

    async def scan_dir(self, parent: int, *, after: bytes | None, limit: int) -> list[tuple[Dentry, Inode | None]]:
        return await self._read(scan_directory, self._id, parent, after, limit)

    async def scan(self, table: Table, *, after: Key | None, limit: int) -> list[Row]:
        return await self._read(scan_table, self._id, table, after, limit)

    async def put_format(self, ownership: Ownership, volume_format: VolumeFormat) -> None:
        check_same_volume(self._format, volume_format)
        await self._write(owning.replace_format, self._id, ownership, dump_format(volume_format))
        self._format = volume_format

    async def close(self) -> None:
        """Let go of the lock, behind what is queued: the owner is as good as dead, the next one need not wait."""
        if not self._closed:
            self._closed = True
            await self._writer.call(_unlock, self._lock)

    async def _write(self, function: Callable[[WriterConnection, *Ts], T], *args: *Ts) -> T:
        self._check_open()
        return await self._writer.call(function, *args)

    async def _read(self, function: Callable[[sqlite3.Connection, *Ts], T], *args: *Ts) -> T:
        self._check_open()
        return await self._readers.call(function, *args)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the volume's handle is closed")

    def _now_ns(self) -> int:
        return int(self._clock() * _NS_PER_S)


def _unlock(connection: sqlite3.Connection, lock: OwnerLock) -> None:
    lock.unlock()
