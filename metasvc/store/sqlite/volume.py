"""One volume of a SQLite database: metasvc.store.VolumeStore.

The first commits go to SQLite, later ones into the volume's journal (see there), which is applied to SQLite when a read needs
it, `_APPLY_AFTER_S` after the first batch that SQLite lacks, and when a half of it is full.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from typing import Final, TypeVar, TypeVarTuple

from chunkstore.errors import AtollError
from metasvc.api.volume_format import check_same_volume, dump_format
from metasvc.errors import Fenced, StoreError
from metasvc.model import Dentry, Inode, VolumeFormat
from metasvc.store import Loaded, Ownership
from metasvc.store.sqlite import ownership as owning
from metasvc.store.sqlite.database import WriterConnection
from metasvc.store.sqlite.journal import Appended, Draft, Journal, JournalPaths, make_draft, remove_draft
from metasvc.store.sqlite.owner_lock import OwnerLock
from metasvc.store.sqlite.rows import load_rows, scan_directory, scan_table
from metasvc.store.sqlite.threads import ConnectionThreads
from metasvc.store.tables import Batch, Key, Row, Table

__all__ = ["JOURNAL_AFTER", "JournalThread", "SqliteVolume"]

JOURNAL_AFTER: Final = 16
"""Commits of an owner before it makes a journal: 8 MiB and 30 ms, which most commands and short mounts do not need."""
_TRY_AGAIN_AFTER: Final = 1000
"""Commits until the next attempt where there was no room for one."""
_APPLY_AFTER_S: Final = 0.2
"""How old the rows are that other processes read: a backup, an administrator's sqlite3."""
_NS_PER_S: Final = 1_000_000_000

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = logging.getLogger(__name__)


class JournalThread:
    """Stands for the right to write journals: who runs calls with it is the only one."""

    def close(self) -> None:
        """Nothing: the files are closed by their volumes."""


class SqliteVolume:
    """A handle of one volume. Changes go through the store's one writer or a journal, reads through its readers, beside it.

    Ownership: on one machine the kernel knows whether the owner lives, so an flock decides (owner_lock), and the expiry in
    the row is kept for messages and for other stores' sake. acquire() succeeds at once when nobody holds the lock, though the
    row has not expired; it raises NotOwner while somebody does, though the row has. What fences is nonce and
    epoch in the row, checked in the transaction of each commit, whatever became of the lock file; and of batches in a
    journal, that the successor took its file away.
    """

    def __init__(
        self,
        volume_id: int,
        volume_format: VolumeFormat,
        *,
        writer: ConnectionThreads[WriterConnection],
        readers: ConnectionThreads[sqlite3.Connection],
        writes: ConnectionThreads[JournalThread],
        journals: dict[int, Journal],
        journal_after: int,
        half_bytes: int,
        paths: JournalPaths,
        lock: OwnerLock,
        clock: Callable[[], float],
    ) -> None:
        """``writes`` runs what writes journals. ``journals`` has those of this process, by volume id; all handles share it."""
        self._id = volume_id
        self._format = volume_format
        self._writer = writer
        self._readers = readers
        self._writes = writes
        self._journals = journals
        self._journal_after = journal_after
        self._half_bytes = half_bytes
        self._paths = paths
        self._lock = lock
        self._clock = clock
        self._closed = False
        self._ownership: Ownership | None = None
        self._direct_commits = 0
        self._sent_directly = 0
        """The highest number of a batch that may be on its way to SQLite directly, also one that nobody waits for any more:
        what comes under that number again must not overtake it."""
        self._applying: asyncio.TimerHandle | None = None

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return self._closed

    @property
    def format(self) -> VolumeFormat:
        return self._format

    async def acquire(self, *, nonce: str, address: str, ttl_s: float) -> Ownership:
        own = self._own_journal()
        if own is not None and own.ownership.nonce == nonce:
            await self._end_journal(own)
        stale = self._journals.get(self._id)
        arguments = (self._id, self._format.uuid, self._lock, self._paths, nonce, address, self._now_ns())
        taken = await self._write(owning.acquire, *arguments, int(ttl_s * _NS_PER_S))
        if stale is not None:
            # Of another owner in this process: what it acknowledged was in the file, and is in the database now.
            await self._writes.call(_forget, stale)
            self._drop(stale)
        self._ownership = taken
        self._direct_commits = self._sent_directly = 0
        if not self._journal_after:
            await self._begin_journal(taken)
        return taken

    async def renew(self, ownership: Ownership, *, ttl_s: float) -> None:
        await self._write(owning.renew, self._id, ownership, self._now_ns() + int(ttl_s * _NS_PER_S))

    async def release(self, ownership: Ownership) -> None:
        self._check_open()
        journal = self._own_journal()
        if journal is not None and _is_same(journal.ownership, ownership):
            await self._end_journal(journal)
        await self._write(owning.release, self._id, self._lock, ownership)

    async def commit(self, ownership: Ownership, number: int, batch: Batch, *, here: bool = False) -> None:
        self._check_open()
        journal = self._own_journal()
        if journal is None:
            self._sent_directly = max(self._sent_directly, number)
            await self._commit_directly(ownership, number, batch, here=here)
            self._direct_commits += 1
            # There may be one by now: of a commit that nobody waits for.
            if self._direct_commits >= self._journal_after and self._own_journal() is None:
                await self._begin_journal(ownership)
            return
        if _is_same(journal.ownership, ownership):
            if self._sent_directly < number == journal.last + 1:
                record = journal.packed(number, batch)
                if record is not None and await self._append(journal, number, record, batch, here=here):
                    return
            self._sent_directly = max(self._sent_directly, number)
        # Too large, not the next, or not the owner's: the row decides, behind what a caller who gave up has left under way.
        await self._writes.call(_nothing)
        if journal.is_stopped:
            await self._end_journal(journal)
            await self._commit_directly(ownership, number, batch, here=False)
        else:
            await self._write(owning.commit_behind, self._id, journal, ownership, number, batch)

    async def last_batch(self, ownership: Ownership) -> int:
        self._check_open()
        journal = self._own_journal()
        if journal is not None and _is_same(journal.ownership, ownership):
            # Behind a write that is still under way, so that the answer is final.
            await self._writes.call(_nothing)
            if journal.is_stopped:
                await self._end_journal(journal)
            else:
                last = journal.last
                return max(last, await self._write(owning.read_last_batch, self._id, ownership))
        # Through the writer: behind a commit that is still under way.
        return await self._write(owning.read_last_batch, self._id, ownership)

    async def load(self, keys: dict[Table, list[Key]], groups: dict[Table, list[int]]) -> Loaded:
        # What an owner changed a moment ago it has in memory: that a load is concerned is rare.
        journal = self._journals.get(self._id)
        if journal is not None and not journal.concerns(keys, groups):
            journal = None
        return await self._read(journal, load_rows, keys, groups)

    async def scan_dir(self, parent: int, *, after: bytes | None, limit: int) -> list[tuple[Dentry, Inode | None]]:
        return await self._read(self._journals.get(self._id), scan_directory, parent, after, limit)

    async def scan(self, table: Table, *, after: Key | None, limit: int) -> list[Row]:
        return await self._read(self._journals.get(self._id), scan_table, table, after, limit)

    async def put_format(self, ownership: Ownership, volume_format: VolumeFormat) -> None:
        check_same_volume(self._format, volume_format)
        await self._write(owning.replace_format, self._id, ownership, dump_format(volume_format))
        self._format = volume_format

    async def close(self) -> None:
        """Let go of the lock, behind what is queued: the owner is as good as dead, the next one need not wait.

        A journal that SQLite does not take is left to the next owner.
        """
        if self._closed:
            return
        self._closed = True
        journal = self._own_journal()
        try:
            if journal is not None:
                await self._end_journal(journal)
        except AtollError as error:
            log.warning("what the database did not take waits in the journal for the next owner: %s", error)
            if journal is not None:
                await self._writes.call(_close, journal)
                self._drop(journal)
        finally:
            await self._writer.call(_unlock, self._lock)

    # -- the journal ------------------------------------------------------------------------------------------------------

    def _own_journal(self) -> Journal | None:
        """Return the journal of the ownership that was taken through this handle."""
        journal = self._journals.get(self._id)
        if journal is None or self._ownership is None or not _is_same(journal.ownership, self._ownership):
            return None
        return journal

    async def _begin_journal(self, ownership: Ownership) -> None:
        """Make a journal; where it cannot be made commits go on without. The next commit is the first in it."""
        self._direct_commits = 0
        path = self._paths.draft()
        try:
            # In a reader's thread: it takes a while, and the journal thread has the commits of other volumes.
            draft = await self._readers.call(
                _draft, path, self._id, ownership.epoch, self._format.uuid, self._half_bytes
            )
            await self._write(owning.begin_journal, self._id, ownership, self._paths, draft, self._journals)
        except Fenced:
            return  # the next commit says so
        except StoreError as error:
            remove_draft(path)
            log.info("commits go on without a journal: %s", error)
            self._direct_commits = self._journal_after - _TRY_AGAIN_AFTER

    async def _append(self, journal: Journal, number: int, record: bytes, batch: Batch, *, here: bool) -> bool:
        """Write a record; False if the journal does not take it. StoreError: nothing was written, or the outcome is unknown."""
        if self._applying is None:
            self._applying = asyncio.get_running_loop().call_later(_APPLY_AFTER_S, self._apply_later, journal)
        half = journal.half
        while True:
            if here and self._writes.may_call_here:
                appended = self._writes.call_here(_append, journal, number, record, batch)
            else:
                appended = await self._writes.call(_append, journal, number, record, batch)
            if appended is not Appended.NO_ROOM:
                break
            await self._write(owning.apply_journal, self._id, journal)
        if journal.half != half:
            # SQLite has to have what is in the other half before this one is full.
            self._writer.post(owning.apply_journal, self._id, journal)
        return appended is Appended.DURABLE

    def _apply_later(self, journal: Journal) -> None:
        self._applying = None
        if journal.has_changes:
            self._writer.post(owning.apply_journal, self._id, journal)

    async def _end_journal(self, journal: Journal) -> None:
        """Bring all of a journal into SQLite and remove it; the row has the last batch then. StoreError: it is still there."""
        await self._writes.call(_stop, journal)
        await self._writer.call(owning.end_journal, self._id, journal)
        await self._writes.call(_close, journal)
        self._drop(journal)

    def _drop(self, journal: Journal) -> None:
        if self._journals.get(self._id) is journal:
            del self._journals[self._id]
        if self._applying is not None:
            self._applying.cancel()
            self._applying = None

    async def _commit_directly(self, ownership: Ownership, number: int, batch: Batch, *, here: bool) -> None:
        # The lock is waited for in the thread: while the loop stands, no owner here renews, and nobody gets a sign of life.
        is_done = (
            here
            and self._writer.may_call_here
            and self._writer.call_here(owning.commit_at_once, self._id, ownership, number, batch)
        )
        if not is_done:
            await self._write(owning.commit, self._id, ownership, number, batch)

    async def _write(self, function: Callable[[WriterConnection, *Ts], T], *args: *Ts) -> T:
        self._check_open()
        return await self._writer.call(function, *args)

    async def _read(
        self, journal: Journal | None, function: Callable[[sqlite3.Connection, int, *Ts], T], *args: *Ts
    ) -> T:
        """Read from SQLite, what is in a journal included."""
        self._check_open()
        if journal is not None and journal.has_changes:
            try:
                await self._writer.call(owning.apply_journal, self._id, journal)
            except Fenced:
                pass  # the successor has applied it
            except StoreError as error:
                # The low byte says what kind it is. A quota of the file system is an error of writing for SQLite.
                code = getattr(error.__cause__, "sqlite_errorcode", None) or 0
                if code & 0xFF not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
                    raise
                return await self._writer.call(owning.read_with_changes, self._id, journal, function, args)
        return await self._readers.call_in(self._id, function, self._id, *args)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("the volume's handle is closed")

    def _now_ns(self) -> int:
        return int(self._clock() * _NS_PER_S)


def _is_same(one: Ownership, other: Ownership) -> bool:
    return (one.nonce, one.epoch) == (other.nonce, other.epoch)


def _unlock(connection: sqlite3.Connection, lock: OwnerLock) -> None:
    lock.unlock()


def _draft(connection: sqlite3.Connection, path: str, volume_id: int, epoch: int, uuid: str, half_bytes: int) -> Draft:
    return make_draft(path, volume_id=volume_id, epoch=epoch, uuid=uuid, half_bytes=half_bytes)


def _append(token: JournalThread, journal: Journal, number: int, record: bytes, batch: Batch) -> Appended:
    return journal.append(number, record, batch)


def _nothing(token: JournalThread) -> None:
    """Be behind what is queued."""


def _stop(token: JournalThread, journal: Journal) -> None:
    journal.stop()


def _close(token: JournalThread, journal: Journal) -> None:
    journal.close()


def _forget(token: JournalThread, journal: Journal) -> None:
    journal.close()
    journal.forget()
