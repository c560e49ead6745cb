"""The journal of one volume: a small commit is one write into it and one sync, and becomes rows of SQLite a moment later.

Owns ``<database>.<volume id>.journal-<epoch>``, and the changes that are in it and not yet in SQLite. journal_format has the
bytes, ownership the SQL, volume says what is called when. Why: a commit of SQLite writes every page that a row lies on, and
their index; a commit here writes one block of a file whose blocks are there already, 5 us to pack (docs/adr/0045).

A file belongs to one epoch of one volume. Its owner makes it after some commits, not at once: most commands have few. It goes
as soon as SQLite has all of it and the owner goes, so an unmounted volume is one database file again.

Invariants:

1. A batch is acknowledged when its record is synced *and* the file had its name before the write and after the sync. Nobody
   else gives a file that name: it has the epoch.
2. ``applied <= last``: SQLite shows all batches up to ``applied``; what those after it changed is in ``_changes``, newest only.
3. SQLite has all batches up to ``applied`` on disk: applying is one transaction with the number of its last batch, and with
   synchronous=FULL. (With NORMAL a sync that fails later leaves a hole in SQLite's log, as the kernel takes what it could
   not write for written, and all behind it is lost with the power though its own sync succeeded.)
4. A half is written from its beginning again only when its last record is one of those. So the file holds every record above
   ``applied``, the chain of records begins at or before the batch after the state that a loss of power leaves, and a
   successor that applies it has every acknowledged batch, each once.
5. The file appears and is taken away from its owner in transactions that hold SQLite's write lock, after the row was checked.
   So an owner that is over cannot put a file there, and a record that it writes into a file that was taken away is not
   acknowledged; one that was, was written before the taking, and whoever takes reads afterwards.

Taking over (ownership.acquire, with the owner lock): rename the file to ``….taken``; read it; apply its chain, if it is of the
stored epoch; take the next epoch; commit; remove it. A process that dies in between leaves
``.taken`` to the next one. Files of earlier epochs are spent: the epoch grows in the transaction that applies. Where both names
exist ``.taken`` is spent: its owner lived on and made another file, after its own transactions brought all of it into SQLite.

SQLite failing: batches go on being taken until both halves are full of what it does not have on disk; then a commit has the
error that SQLite gives, and nothing of it is written.

The journal failing (an error of write or sync): what the disk has of the last record is unknown, and a later sync may say
that all is well. So the file takes nothing any more; its owner brings what was acknowledged into SQLite, removes the file
and syncs the directory, and only then says what became of that batch: it is not applied. Until that succeeds every answer is
StoreError.

A sync of SQLite's failing: what the disk has of its log is unknown. So the volume stops (StoreRefused), the file stays, and
its successor, which writes the log anew (ownership.acquire), applies all of the chain.

Interleavings: append() and the end (stop(), close()) run one after the other, in the one journal thread or, while that
has nothing to do, on the event loop; changes(), has_applied() and restart() run on the writer's thread, beside them.
They share numbers and changes, under ``_lock``, which is never held while anything waits for a disk. append() reads ``applied``
without it: it only grows. One commit is under way at a time, so ``last`` is changed by append(), or by restart() after a
call that went through the journal thread.
"""

from __future__ import annotations

import contextlib
import enum
import os
import secrets
import threading
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from metasvc.errors import StoreError, StoreRefused
from metasvc.store import Ownership
from metasvc.store.packed import pack_batch
from metasvc.store.sqlite.journal_format import (
    BLOCK_BYTES,
    KEY_BYTES,
    Contents,
    Header,
    pack_header,
    pack_record,
    read_journal,
)
from metasvc.store.tables import Batch, Key, Row, Table

__all__ = ["HALF_BYTES", "Appended", "Draft", "Journal", "JournalPaths", "make_draft", "read_taken", "remove_draft"]

HALF_BYTES: Final = 4 << 20
"""So much is written before SQLite has to sync once: a thousand commits, 16 ms of writing when the file is made."""
_MAX_RECORD_BYTES: Final = 64 << 10
"""A batch that is larger goes to SQLite at once: its sync is a small part of what it costs."""


_TAKEN: Final = ".taken"
_DRAFT: Final = ".new"


class Appended(enum.Enum):
    """What became of a record."""

    DURABLE = enum.auto()
    NO_ROOM = enum.auto()
    """Nothing was written: SQLite has to take what is there first."""
    REFUSED = enum.auto()
    """Nothing was written: the file is no longer there, or takes nothing, or the number is not the next one."""


class JournalPaths:
    """The names of a volume's journals: in use by the owner of an epoch, taken away from it, being made."""

    def __init__(self, database_path: str, volume_id: int) -> None:
        self._prefix = f"{database_path}.{volume_id}.journal-"

    def draft(self) -> str:
        """Return a name for one that is being made, which nobody else uses: an owner that is over may make one, too."""
        return f"{self._prefix}{secrets.token_hex(8)}{_DRAFT}"

    def of_epoch(self, epoch: int) -> str:
        """Return the name that the owner of an epoch gives to its file, and nobody to another one."""
        return f"{self._prefix}{epoch}"

    def take(self) -> list[tuple[int, str]]:
        """Take all files away from whoever writes them; their epochs and paths now, in order of the epochs. OSError.

        The caller holds the write lock of the database. What was taken before, by somebody who died of it, is listed as well.
        """
        found: dict[int, str] = {}
        for name in self._found():
            epoch = name.removesuffix(_TAKEN)
            if not epoch.isdecimal():
                continue
            path = f"{self._prefix}{epoch}{_TAKEN}"
            if name == epoch:
                os.replace(self._prefix + name, path)
            found[int(epoch)] = path
        return sorted(found.items())

    def remove(self) -> None:
        """Remove what was taken, and what was never used."""
        for name in self._found():
            if name.endswith((_TAKEN, _DRAFT)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._prefix + name)

    def _found(self) -> list[str]:
        """Return what follows the prefix in the names that have it."""
        directory, prefix = os.path.split(self._prefix)
        return [name.removeprefix(prefix) for name in os.listdir(directory) if name.startswith(prefix)]


def read_taken(path: str) -> Contents:
    """Read a file that was taken. OSError, and as read_journal()."""
    with open(path, "rb") as file:
        return read_journal(file.read(), path=path)


class Draft(NamedTuple):
    """A file that is no journal yet."""

    path: str
    header: Header


def make_draft(path: str, *, volume_id: int, epoch: int, uuid: str, half_bytes: int) -> Draft:
    """Write a new file, with all its blocks, under a name that nobody reads. Blocks for some 30 ms. OSError."""
    header = Header(volume_id, epoch, half_bytes, secrets.token_bytes(KEY_BYTES), uuid)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Zeros that were written: blocks that are only promised cost a change of the file system at their first write.
        written, image = 0, pack_header(header).ljust(header.file_bytes, b"\0")
        while written < len(image):
            written += os.pwrite(descriptor, memoryview(image)[written:], written)
        os.fsync(descriptor)
    except OSError:
        remove_draft(path)
        raise
    finally:
        os.close(descriptor)
    return Draft(path, header)


def remove_draft(path: str) -> None:
    """Remove a draft that is not used. If that fails the next owner does."""
    with contextlib.suppress(OSError):
        os.unlink(path)


class Journal:
    """The journal of the owner's process, while it takes batches."""

    def __init__(self, paths: JournalPaths, draft: Draft, ownership: Ownership, *, last: int) -> None:
        """Put a draft in its place, durably. ``last`` is the stored batch. OSError.

        The caller holds the write lock of the database, and has checked that the ownership is the stored one.
        """
        self.ownership = ownership
        self.last = self.applied = last
        self.is_stopped = False
        self.is_forgotten = False
        """A successor has the volume: the file is not this owner's any more."""
        header = draft.header
        self._path = paths.of_epoch(header.epoch)
        self._key = header.key
        self._half_bytes = header.half_bytes
        self.half, self._tail = 0, 0
        self._last_of_half = [last, last]
        self._is_distrusted = False
        self._lock = threading.Lock()
        # The number is that of the batch that changed the row last.
        self._changes: dict[Table, dict[Key, tuple[int, Row | None]]] = {}
        self._groups: dict[Table, dict[int, int]] = {}
        self._descriptor = os.open(draft.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.replace(draft.path, self._path)
            _sync_directory_of(self._path)
        except OSError:
            os.close(self._descriptor)
            raise

    # -- the owner's side: journal thread or event loop -----------------------------------------------------------------

    def packed(self, number: int, batch: Batch) -> bytes | None:
        """Return the record of a batch, None if it is too large for a journal. StoreRefused. Runs anywhere."""
        packed = pack_batch(batch)
        if len(packed) > min(_MAX_RECORD_BYTES, self._half_bytes // 4):
            return None
        return pack_record(self._key, number, packed)

    def append(self, number: int, record: bytes, batch: Batch) -> Appended:
        """Write a record and sync it. StoreError: it may be there or not, and the journal is stopped."""
        if self.is_stopped or number != self.last + 1 or not self._is_in_place():
            return Appended.REFUSED
        half, tail = self.half, self._tail
        if tail + len(record) > self._half_bytes:
            half, tail = 1 - half, 0
            if self._last_of_half[half] > self.applied:
                return Appended.NO_ROOM
        try:
            offset = BLOCK_BYTES + half * self._half_bytes + tail
            if os.pwrite(self._descriptor, record, offset) != len(record):
                raise OSError(f"a record was written in part at {offset}")
            os.fdatasync(self._descriptor)
            if not self._is_in_place():
                raise StoreError(f"{self._path} was taken away while a batch was written")
            with self._lock:
                self._note(number, batch)
                self.last = number
        except OSError as exc:
            self.is_stopped = True
            raise StoreError(f"writing {self._path} failed: check the disk and the kernel's log ({exc})") from exc
        except BaseException:
            # A record that is there and does not count: nothing may follow it.
            self.is_stopped = True
            raise
        self.half, self._tail = half, tail + len(record)
        self._last_of_half[half] = number
        return Appended.DURABLE

    def stop(self) -> None:
        """Take nothing any more."""
        self.is_stopped = True

    def close(self) -> None:
        """Stop, and let go of the file, which stays where it is. May be called twice."""
        self.is_stopped = True
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    # -- SQLite's side: the writer's thread -----------------------------------------------------------------------------

    def changes(self) -> tuple[int, Batch]:
        """Return the number of the last batch, and all that SQLite lacks up to it, as one batch. StoreRefused.

        A row that several batches changed is in it once.
        """
        if self._is_distrusted:
            raise StoreRefused(
                f"a sync of the database failed: check the disk and the kernel's log; what {self._path} has is applied "
                "when the volume is opened again"
            )
        puts: dict[Table, list[Row]] = {}
        deletes: dict[Table, list[Key]] = {}
        with self._lock:
            for table, changed in self._changes.items():
                put = [row for _, row in changed.values() if row is not None]
                if put:
                    puts[table] = put
                if len(put) < len(changed):
                    deletes[table] = [key for key, (_, row) in changed.items() if row is None]
            return self.last, Batch(puts, deletes)

    def has_applied(self, number: int) -> None:
        """Take note that SQLite has all batches up to a number, on disk."""
        with self._lock:
            if number == self.last:
                self._changes = {}
                self._groups = {}
            else:
                for table, changed in self._changes.items():
                    self._changes[table] = {key: change for key, change in changed.items() if change[0] > number}
                for table, groups in self._groups.items():
                    self._groups[table] = {group: last for group, last in groups.items() if last > number}
            self.applied = number

    def restart(self, number: int) -> None:
        """Take note of a batch that went to SQLite directly, after all that is here, and was synced there."""
        with self._lock:
            assert self.applied == self.last < number
            self.last = self.applied = number
            if self._tail:
                # The records go on behind a gap, hence in a half of their own. In one with none yet they may: the other one has
                # the newest records then, and of its beginning nothing may be lost.
                self.half, self._tail = 1 - self.half, 0

    def distrust(self) -> None:
        """Take note that a sync of SQLite failed."""
        self._is_distrusted = self.is_stopped = True

    def forget(self) -> None:
        """Drop what SQLite lacks: a successor has the volume, and read it here."""
        self.is_stopped = self.is_forgotten = True
        with self._lock:
            self._changes = {}
            self._groups = {}
            self.applied = self.last

    def remove(self) -> None:
        """Remove the file, durably, unless it is gone already. OSError."""
        assert self.applied == self.last
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        _sync_directory_of(self._path)

    # -- the event loop -------------------------------------------------------------------------------------------------

    @property
    def has_changes(self) -> bool:
        """Whether SQLite lacks anything."""
        return self.applied < self.last

    def concerns(self, keys: Mapping[Table, Iterable[Key]], groups: Mapping[Table, Iterable[int]]) -> bool:
        """Return whether SQLite lacks a change of any of these rows."""
        if self.applied == self.last:
            return False
        with self._lock:
            for table, wanted in keys.items():
                changed = self._changes.get(table)
                if changed and any(key in changed for key in wanted):
                    return True
            for table, wanted_groups in groups.items():
                changed_groups = self._groups.get(table)
                if changed_groups and any(group in changed_groups for group in wanted_groups):
                    return True
        return False

    def _note(self, number: int, batch: Batch) -> None:
        for table, rows in batch.puts.items():
            changed = self._changes.setdefault(table, {})
            size = table.key_size
            for row in rows:
                changed[row[:size]] = (number, row)
            if table.grouped:
                self._groups.setdefault(table, {}).update((row[0], number) for row in rows)
        for table, keys in batch.deletes.items():
            changed = self._changes.setdefault(table, {})
            for key in keys:
                changed[tuple(key)] = (number, None)
            if table.grouped:
                self._groups.setdefault(table, {}).update((key[0], number) for key in keys)

    def _is_in_place(self) -> bool:
        # Not by stat(): whose answer has the time of the last write, after that the next write must have a new one, and so
        # changes the inode: 55 us for each (Linux 6.13 on, ext4).
        return os.access(self._path, os.F_OK)


def _sync_directory_of(path: str) -> None:
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
