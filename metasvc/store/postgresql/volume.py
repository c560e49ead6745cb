"""One volume of a PostgreSQL database: metasvc.store.VolumeStore.

What is known of an ownership's commits is one value, ``_settled``: under which attempt they go, and whether the outcome of the
last one is known. Interleavings:

- A commit is one trip while all goes well. Before it is sent its outcome counts as unknown, and as known again when the server
  has answered; so a commit whose connection broke, whose deadline passed, or whose caller was cancelled leaves it unknown.
- While it is unknown, the next commit of this ownership settles first (ownership.settle), and so does last_batch() always. From
  then on what was sent before is applied or void, for good: a statement that a dead connection left behind cannot be applied
  after last_batch() has said that it was not.
- Two settle at once, or a settle that was thought lost arrives late: ``attempt`` is another than this handle thinks. Nothing
  is applied then; the commit finds out, settles, and is sent again.
- An ownership that was taken by another handle is unknown here at first, which is one more trip, no more.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import asyncpg

from metasvc.api.volume_format import check_same_volume, dump_format
from metasvc.errors import StoreError
from metasvc.model import Dentry, Inode, VolumeFormat
from metasvc.store import Loaded, Ownership
from metasvc.store.postgresql import ownership as owning
from metasvc.store.postgresql.connections import CHANGE_DEADLINE_S, READ_DEADLINE_S, Lane
from metasvc.store.postgresql.rows import (
    load_sql,
    load_values,
    loaded,
    scan_dir_sql,
    scan_sql,
    scanned,
    scanned_dir,
)
from metasvc.store.tables import TABLES, Batch, Key, Row, Table

__all__ = ["PostgresqlVolume"]

_CONTENDED: Final = "{at}: another process with the same ownership commits at the same time"
_RENEW_SHARE: Final = 0.6
"""Of the lease, which its owner counts from before it asked: a renewal that comes back later leaves no time for the next one,
which is sent a third of the lease after it."""
_ATTEMPTS: Final = 8
"""So often a commit settles because the attempt was another one; each time somebody else has settled in between."""


class PostgresqlVolume:
    """A handle of one volume. Changes and reads have lanes of their own.

    Ownership goes by the row and the server's clock. Renewals, releases, acquisitions and last_batch() are done again when
    the connection breaks; to acquire twice with one nonce is to have a later epoch.
    """

    def __init__(self, volume_id: int, volume_format: VolumeFormat, *, changes: Lane, reads: Lane) -> None:
        self._id = volume_id
        self._format = volume_format
        self._changes = changes
        self._reads = reads
        self._closed = False
        self._settled: tuple[str, int, int] | None = None
        """Nonce, epoch and attempt of the ownership whose last commit has a known outcome. None: unknown."""

    @property
    def format(self) -> VolumeFormat:
        return self._format

    async def acquire(self, *, nonce: str, address: str, ttl_s: float) -> Ownership:
        self._check_open()

        async def work(connection: asyncpg.Connection) -> Ownership:
            return await owning.acquire(connection, self._id, nonce, address, ttl_s)

        taken = await self._changes.call(work, deadline_s=CHANGE_DEADLINE_S, again=True)
        self._settled = (taken.nonce, taken.epoch, 0)
        return taken

    async def renew(self, ownership: Ownership, *, ttl_s: float) -> None:
        self._check_open()

        async def work(connection: asyncpg.Connection) -> None:
            await owning.renew(connection, self._id, ownership, ttl_s)

        deadline_s = min(CHANGE_DEADLINE_S, ttl_s * _RENEW_SHARE)
        await self._changes.call(work, deadline_s=deadline_s, again=True)

    async def release(self, ownership: Ownership) -> None:
        self._check_open()

        async def work(connection: asyncpg.Connection) -> None:
            await owning.release(connection, self._id, ownership)

        await self._changes.call(work, deadline_s=CHANGE_DEADLINE_S, again=True)

    async def commit(self, ownership: Ownership, number: int, batch: Batch, *, here: bool = False) -> None:
        """Commit; ``here`` changes nothing. One trip; one more if the outcome of the commit before is unknown."""
        self._check_open()
        for _ in range(_ATTEMPTS):
            if self._settled is None or self._settled[:2] != (ownership.nonce, ownership.epoch):
                await self._settle(ownership)
            if await self._commit(ownership, number, batch):
                return
        raise StoreError(_CONTENDED.format(at=self._changes.at))

    async def _commit(self, ownership: Ownership, number: int, batch: Batch) -> bool:
        """Send a commit under the attempt that is known; False if that is not the stored one."""
        settled, self._settled = self._settled, None
        assert settled is not None
        attempt = settled[2]

        async def work(connection: asyncpg.Connection) -> bool:
            return await owning.commit(connection, self._id, ownership, attempt, number, batch)

        is_done = await self._changes.call(work, deadline_s=CHANGE_DEADLINE_S)
        if is_done:
            self._settled = settled
        return is_done

    async def last_batch(self, ownership: Ownership) -> int:
        """Return the number of the last batch, for good: no commit sent before is applied afterwards. Fenced."""
        self._check_open()
        return await self._settle(ownership)

    async def _settle(self, ownership: Ownership) -> int:
        async def work(connection: asyncpg.Connection) -> owning.Settled:
            return await owning.settle(connection, self._id, ownership)

        settled = await self._changes.call(work, deadline_s=CHANGE_DEADLINE_S, again=True)
        self._settled = (ownership.nonce, ownership.epoch, settled.attempt)
        return settled.last_batch

    async def load(self, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]) -> Loaded:
        # In one order, so that as few statements as possible are prepared.
        keys = {table: keys[table] for table in TABLES if keys.get(table)}
        groups = {table: groups[table] for table in TABLES if groups.get(table)}
        if not keys and not groups:
            self._check_open()
            return Loaded({})
        values = load_values(keys, groups)
        found = await self._read(load_sql(tuple(keys), tuple(groups)), *values)
        return loaded([*keys, *groups], found)

    async def scan_dir(self, parent: int, *, after: bytes | None, limit: int) -> list[tuple[Dentry, Inode | None]]:
        values = (parent, limit) if after is None else (parent, limit, after)
        return scanned_dir(await self._read(scan_dir_sql(is_first=after is None), *values))

    async def scan(self, table: Table, *, after: Key | None, limit: int) -> list[Row]:
        sql = scan_sql(table, is_first=after is None)
        return scanned(table, await self._read(sql, limit, *(after or ())))

    async def put_format(self, ownership: Ownership, volume_format: VolumeFormat) -> None:
        self._check_open()
        check_same_volume(self._format, volume_format)
        text = dump_format(volume_format)
        for _ in range(_ATTEMPTS):
            # Like a commit: one that comes late must not undo the next one.
            await self._settle(ownership)
            settled, self._settled = self._settled, None
            assert settled is not None
            work = partial(
                owning.replace_format, volume_id=self._id, ownership=ownership, attempt=settled[2], text=text
            )
            if await self._changes.call(work, deadline_s=CHANGE_DEADLINE_S):
                self._settled = settled
                self._format = volume_format
                return
        raise StoreError(_CONTENDED.format(at=self._changes.at))

    async def close(self) -> None:
        """Answer nothing any more. The ownership lasts until it is released or expires."""
        self._closed = True

    async def _read(self, sql: str, *values: object) -> tuple[Any, ...]:
        """Run a statement on the volume that answers one row. One trip."""
        self._check_open()

        async def work(connection: asyncpg.Connection) -> tuple[Any, ...]:
            row = await connection.fetchrow(sql, self._id, *values)
            assert row is not None, "an aggregate without GROUP BY answers one row"
            return tuple(row)

        return await self._reads.call(work, deadline_s=READ_DEADLINE_S, again=True)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the volume's handle is closed")
