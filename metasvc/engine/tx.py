"""One operation's view of the rows: reads through to memory, keeps its own changes apart.

A rule is a plain function ``rule(tx, …)``. It reads and writes rows here; when a row is not in memory
``NeedRows`` unwinds it, the engine loads and runs the rule again from the start. Hence a rule has no side
effect but through its Tx, and it never awaits: from its first read to apply() nothing else runs, so every
operation is atomic and the operations of a volume are serial.
"""

from __future__ import annotations

import errno as E
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn, Protocol, cast

from metasvc.engine.memory import ABSENT, NeedRows, Rows
from metasvc.errors import FsError
from metasvc.model import Chunk, Counter, Dentry, Entry, Ino, Inode, Link, Quota, SessionId, Slice, VolumeFormat, Xattr
from metasvc.store.tables import COUNTER, DENTRY, INODE, QUOTA, SLICE, Key, Row, Table


class Allowance(NamedTuple):
    """What the volume may hold of its tenant's quota, as far as is known; None: there is no such quota."""

    max_bytes: int | None = None
    max_inodes: int | None = None
    further_bytes: int = 0
    further_inodes: int = 0
    """What could be had on top when that was last looked at: for statfs."""


class Surroundings(Protocol):
    """What a rule may ask the engine besides rows."""

    format: VolumeFormat
    allowance: Allowance

    def new_ino(self, tx: Tx) -> Ino:
        """Return an inode number never used before."""
        ...

    def sessions_holding(self, ino: Ino) -> list[SessionId]:
        """Return the sessions that have an inode open."""
        ...

    def reserved_bytes(self, quota: Ino) -> int:
        """Return bytes promised to writers and not yet used: of a directory quota, of the volume for 0."""
        ...

    def granted_bytes(self, ino: Ino) -> int:
        """Return bytes by which a file may grow without asking for room again."""
        ...


class Tx:
    """The rows as one operation sees them."""

    __slots__ = ("_counters", "around", "changes", "fresh", "now_ns", "read_batch", "rows")

    def __init__(self, rows: Rows, around: Surroundings, now_ns: int) -> None:
        self.rows = rows
        self.around = around
        self.now_ns = now_ns
        self.changes: dict[Table, dict[Any, Row | None]] = {}
        self.fresh: list[Ino] = []
        self.read_batch = 0
        """The newest batch, not yet durable, of which this operation saw a row."""
        self._counters: dict[str, int] = {}

    # -- reading --------------------------------------------------------------------------------------

    def get(self, table: Table, key: Any) -> Any:
        """Return a row or None; NeedRows if memory cannot tell."""
        changed = self.changes.get(table)
        if changed is not None:
            row = changed.get(key, ABSENT)
            if row is not ABSENT:
                return row
        row = self.rows.get(table, key)
        if row is ABSENT:
            raise NeedRows([(table, key)], [])
        batch = self.rows.pinned_batch(table, key)
        if batch > self.read_batch:
            self.read_batch = batch
        return row

    def require(self, keys: Iterable[tuple[Table, Any]], groups: Iterable[tuple[Table, int]] = ()) -> None:
        """Unwind for all rows and groups that are missing at once: fewer trips than one by one."""
        rows = self.rows
        missing = [(table, key) for table, key in keys if rows.get(table, key) is ABSENT]
        missing_groups = [(table, group) for table, group in groups if rows.group(table, group) is None]
        if missing or missing_groups:
            raise NeedRows(missing, missing_groups)

    def group(self, table: Table, group: int) -> dict[Any, Any]:
        """Return all rows of a group by member."""
        members = self.rows.group(table, group)
        if members is None:
            raise NeedRows([], [(table, group)])
        result: dict[Any, Any] = {}
        for member, row in members.items():
            if row is not None:
                result[member] = row
                batch = self.rows.pinned_batch(table, (group, member))
                if batch > self.read_batch:
                    self.read_batch = batch
        for key, row in self.changes.get(table, {}).items():
            if key[0] == group:
                if row is None:
                    result.pop(key[1], None)
                else:
                    result[key[1]] = row
        return result

    def inode(self, ino: Ino) -> Inode:
        """Return an inode. ENOENT."""
        inode: Inode | None = self.get(INODE, ino)
        if inode is None:
            raise FsError(E.ENOENT)
        return inode

    def ctime_ns(self, inode: Inode) -> int:
        """Return the time of a change of an inode: now, and never before its last one, whatever clients' clocks made of that.

        Clients tell by it which of two answers is newer.
        """
        return max(self.now_ns, inode.ctime_ns)

    def directory(self, ino: Ino) -> Inode:
        """Return the inode of a directory. ENOENT, ENOTDIR."""
        inode = self.inode(ino)
        if not inode.is_dir:
            raise FsError(E.ENOTDIR)
        return inode

    def dentry(self, parent: Ino, name: bytes) -> Dentry | None:
        """Return a dentry or None."""
        return cast("Dentry | None", self.get(DENTRY, (parent, name)))

    def entries(self, parent: Ino, names: list[bytes]) -> list[Entry]:
        """Return those of the names that a directory has, with their inodes. For rules that change nothing.

        What dentry() and inode() would return one by one, in a third of the time.
        """
        rows = self.rows
        members = rows.group(DENTRY, parent)
        if members is None:
            raise NeedRows([], [(DENTRY, parent)])
        dentries: list[Any] = [dentry for name in names if (dentry := members.get(name)) is not None]
        inodes = rows.get_all(INODE, [dentry.ino for dentry in dentries])
        missing = [(INODE, dentry.ino) for dentry, inode in zip(dentries, inodes, strict=True) if inode is ABSENT]
        if missing:
            raise NeedRows(missing, [])
        if rows.has_pins:
            for dentry in dentries:
                for batch in (
                    rows.pinned_batch(DENTRY, (parent, dentry.name)),
                    rows.pinned_batch(INODE, dentry.ino),
                ):
                    self.read_batch = max(self.read_batch, batch)
        return [Entry(dentry.name, inode) for dentry, inode in zip(dentries, inodes, strict=True) if inode is not None]

    def slice(self, slice_id: int) -> Slice | None:
        """Return a slice or None."""
        return cast("Slice | None", self.get(SLICE, slice_id))

    def counter(self, name: str) -> int:
        """Return a counter, with this operation's own changes."""
        row: Counter | None = self.rows.resident_get(COUNTER, name)
        return (row.value if row else 0) + self._counters.get(name, 0)

    def quotas_exist(self) -> bool:
        """Return whether any directory quota is set."""
        return bool(self.changes.get(QUOTA)) or bool(self.rows.resident(QUOTA))

    def quota(self, ino: Ino) -> Quota | None:
        """Return the quota set on a directory, or None."""
        changed = self.changes.get(QUOTA)
        if changed is not None and ino in changed:
            return cast("Quota | None", changed[ino])
        return cast("Quota | None", self.rows.resident_get(QUOTA, ino))

    def changed_inodes(self, inos: Iterable[Ino]) -> list[Inode]:
        """Return those of some inodes that the operation has changed, as they are with the change."""
        changed = cast("dict[Ino, Inode | None]", self.changes.get(INODE, {}))
        return [inode for ino in inos if (inode := changed.get(ino)) is not None]

    # -- changing -------------------------------------------------------------------------------------

    def put(self, table: Table, row: Row | Inode | Dentry | Chunk | Slice | Xattr | Link) -> None:
        """Insert or replace a row."""
        key: Key | Any = row[:2] if table.grouped else row[0]
        self.changes.setdefault(table, {})[key] = row

    def delete(self, table: Table, key: Any) -> None:
        """Delete a row."""
        self.changes.setdefault(table, {})[key] = None

    def count(self, name: str, delta: int) -> None:
        """Add to a counter."""
        if delta:
            self._counters[name] = self._counters.get(name, 0) + delta

    def new_inode(self, inode: Inode) -> None:
        """Insert an inode that is new, so that it is known to have no xattrs, chunks and names."""
        self.fresh.append(inode.ino)
        self.put(INODE, inode)

    def finish(self) -> dict[Table, dict[Any, Row | None]]:
        """Return all changes, counters included."""
        if self._counters:
            counters = self.changes.setdefault(COUNTER, {})
            for name in self._counters:
                counters[name] = Counter(name, self.counter(name))
        return self.changes


Rule = Callable[..., Any]


def refuse(errno: int, detail: str = "") -> NoReturn:
    """Raise the FsError that a rule of POSIX names."""
    raise FsError(errno, detail)
