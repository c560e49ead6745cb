"""The owner's rows in memory: a cache that is never stale, because only the owner writes.

What it owns: for every table the rows (and known absences) that the owner has at hand, and the *pinned*
changes that the store may not show yet. It must not know any rule of POSIX.

Layers, each current where it has an answer:

- *cached*: two generations per table. A hit in the old generation moves to the young one; when the young one is
  full (half of what the volume may take; looked at when an operation changes something or begins to load) the
  old one is dropped. It may be dropped between any two steps of an operation, too, when another volume of the
  process needs room. A grouped table caches whole groups; a *complete* group answers for absent members too.
- *pinned*: rows and tombstones changed by batches that are not durable, or that a load or scan now under
  way might have missed. Pinned rows are never evicted.

Invariants:

1. A cached or pinned row is the newest row: apply() writes both, and install() never replaces either.
2. A change stays pinned until its batch is durable *and* every load and scan that began before that commit
   ended has ended. So a load that read the store before the commit finds the newer row pinned.
3. Everything here is synchronous but for fetch() and scan_dir(), which await only the store, and touch the
   layers only after it has answered. Who scans another table does it within reading().
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from metasvc.engine.memory_budget import MemoryBudget
from metasvc.model import Dentry, Inode
from metasvc.store import VolumeStore
from metasvc.store.tables import (
    CHUNK,
    COUNTER,
    DENTRY,
    INODE,
    LINK,
    PACK,
    PACKABLE,
    QUOTA,
    REPLIES,
    SESSION,
    TABLES,
    XATTR,
    Key,
    Row,
    Table,
)

RESIDENT: Final = (COUNTER, QUOTA, SESSION)
"""Tables that are loaded wholly when the volume is opened, and never evicted."""
_OF_INODE: Final = (DENTRY, CHUNK, XATTR, LINK)
"""Grouped tables whose group is an inode: a new inode has none of their rows."""

_WRITTEN_ONLY: Final = (REPLIES, PACKABLE, PACK)
"""Tables that rules write and do not read: nothing of them is remembered once it is durable."""

_ABSENT: Final[Any] = object()
ROW_COST_BYTES: Final = 700
"""Estimate of what one cached row takes with its key and dictionary slots (measured: inode 650, dentry 420)."""
GROUP_MAX_ROWS: Final = 20_000
"""Larger groups do not survive a change of generation."""


class NeedRows(Exception):
    """An operation needs rows that are not in memory: load them and run it again."""

    def __init__(self, keys: list[tuple[Table, Any]], groups: list[tuple[Table, int]]) -> None:
        super().__init__()
        self.keys = keys
        self.groups = groups


class Group:
    """The cached members of one group of a grouped table."""

    __slots__ = ("complete", "rows", "scanned_to")

    def __init__(self, *, complete: bool) -> None:
        self.rows: dict[Any, Row | None] = {}
        self.complete = complete
        self.scanned_to: Any = None
        """No member up to this one is missing here, because scans from the first on came so far."""


class _Size:
    """What the generations of all tables take, estimated in bytes."""

    __slots__ = ("old_bytes", "young_bytes")

    def __init__(self) -> None:
        self.young_bytes = 0
        self.old_bytes = 0
        """As it was when this generation became the old one: rows that were used again since count in both."""


def cost_bytes(row: Row | None) -> int:
    """Estimate what a cached row takes: of slices also the inline bytes."""
    return ROW_COST_BYTES + (len(row[-1]) if row and isinstance(row[-1], bytes) else 0)


class _Flat:
    """Cached rows of one table keyed by one value: two generations."""

    __slots__ = ("_size", "old", "young")

    def __init__(self, size: _Size) -> None:
        self.young: dict[Any, Row | None] = {}
        self.old: dict[Any, Row | None] = {}
        self._size = size

    def get(self, key: Any) -> Any:
        row = self.young.get(key, _ABSENT)
        if row is _ABSENT and self.old:
            row = self.old.pop(key, _ABSENT)
            if row is not _ABSENT:
                self.young[key] = row
                self._size.young_bytes += cost_bytes(row)
        return row


class _Grouped:
    """Cached groups of one table: two generations."""

    __slots__ = ("_size", "old", "young")

    def __init__(self, size: _Size) -> None:
        self.young: dict[int, Group] = {}
        self.old: dict[int, Group] = {}
        self._size = size

    def get(self, group: int) -> Group | None:
        found = self.young.get(group)
        if found is None and self.old:
            found = self.old.pop(group, None)
            if found is not None:
                self.young[group] = found
                self._size.young_bytes += ROW_COST_BYTES * len(found.rows)
        return found


class Rows:
    """All rows of a volume that the owner has in memory."""

    def __init__(self, store: VolumeStore, *, budget: MemoryBudget) -> None:
        self._store = store
        self._budget = budget
        self._size = _Size()
        self._next_look_bytes = 0
        self._flat = {table: _Flat(self._size) for table in TABLES if not table.grouped}
        self._grouped = {table: _Grouped(self._size) for table in TABLES if table.grouped}
        # The values are (row or None, number of the batch that changed it).
        self._pinned: dict[Table, dict[Any, tuple[Row | None, int]]] = {table: {} for table in TABLES}
        self._pinned_groups: dict[Table, dict[int, dict[Any, None]]] = {table: {} for table in TABLES if table.grouped}
        self._fresh: tuple[set[int], set[int]] = (set(), set())  # inodes made here: young, old
        self._reads_under_way: dict[int, None] = {}  # sequence numbers, in order of their beginning
        self._next_read = 0
        self._releasable: deque[tuple[int, int, list[tuple[Table, Any]]]] = deque()
        self.durable_batch = 0
        """All batches up to this number are durable."""
        self.loads_total = 0
        self.evicted_generations_total = 0
        budget.join(self)

    @property
    def young_bytes(self) -> int:
        """Return about what the rows take that were used since the last change of generation."""
        return self._size.young_bytes

    @property
    def held_bytes(self) -> int:
        """Return about what all rows take."""
        return self._size.young_bytes + self._size.old_bytes

    @property
    def allowance_bytes(self) -> int:
        """Return what the rows may take now: more if other volumes of this process need less."""
        return self._budget.allowance_bytes(self)

    # -- looking up -----------------------------------------------------------------------------------

    def get(self, table: Table, key: Any) -> Any:
        """Return a row, None if it is known to be absent, or ABSENT if memory cannot tell.

        ``key`` is the bare value for one-part keys, a tuple (group, member) else.
        """
        if table.grouped:
            group = self._grouped[table].get(key[0])
            if group is not None:
                row = group.rows.get(key[1], _ABSENT)
                if row is not _ABSENT:
                    return row
                if group.complete:
                    return None
        else:
            row = self._flat[table].get(key)
            if row is not _ABSENT:
                return row
        pinned = self._pinned[table].get(key)
        if pinned is not None:
            return pinned[0]
        if table.grouped and table in _OF_INODE and self.is_fresh(key[0]):
            return None
        return _ABSENT

    def get_all(self, table: Table, keys: list[Any]) -> list[Any]:
        """Return what get() returns for each key of a table that is not grouped."""
        young = self._flat[table].young
        return [row if (row := young.get(key, _ABSENT)) is not _ABSENT else self.get(table, key) for key in keys]

    def group(self, table: Table, group: int) -> Mapping[Any, Row | None] | None:
        """Return all members of a group (None values are absent ones), or None if memory has not all of them."""
        found = self._grouped[table].get(group)
        if found is not None and found.complete:
            return found.rows
        if found is None and table in _OF_INODE and self.is_fresh(group):
            return {}
        return None

    def pinned_batch(self, table: Table, key: Any) -> int:
        """Return the batch that must be durable before a reply may show this row; 0 if none."""
        pinned = self._pinned[table].get(key)
        return 0 if pinned is None or pinned[1] <= self.durable_batch else pinned[1]

    @property
    def has_pins(self) -> bool:
        """Whether anything at all is pinned (cheap test before pinned_batch)."""
        return bool(self._releasable) or any(self._pinned.values())

    def is_fresh(self, ino: int) -> bool:
        """Return whether an inode was made here, so that groups not cached are empty."""
        return ino in self._fresh[0] or ino in self._fresh[1]

    # -- changing -------------------------------------------------------------------------------------

    def mark_fresh(self, ino: int) -> None:
        """Say that an inode is new: the store has no row of any group of it."""
        self._fresh[0].add(ino)

    def apply(self, changes: Mapping[Table, Mapping[Any, Row | None]], batch: int) -> None:
        """Put the changes of an operation, part of the open batch, in force. No await, hence atomic."""
        for table, rows in changes.items():
            pinned = self._pinned[table]
            if table.grouped:
                cache = self._grouped[table]
                pinned_groups = self._pinned_groups[table]
                for key, row in rows.items():
                    pinned[key] = (row, batch)
                    pinned_groups.setdefault(key[0], {})[key[1]] = None
                    group = cache.get(key[0])
                    if group is None:
                        group = Group(complete=table in _OF_INODE and self.is_fresh(key[0]))
                        cache.young[key[0]] = group
                    if row is None and group.complete:
                        group.rows.pop(key[1], None)
                    else:
                        if key[1] not in group.rows:
                            self._size.young_bytes += ROW_COST_BYTES
                        group.rows[key[1]] = row
            else:
                young = self._flat[table]
                for key, row in rows.items():
                    pinned[key] = (row, batch)
                    young.old.pop(key, None)
                    if table in _WRITTEN_ONLY:
                        young.young.pop(key, None)
                        continue
                    former = young.young.get(key, _ABSENT)
                    self._size.young_bytes += cost_bytes(row) - (0 if former is _ABSENT else cost_bytes(former))
                    young.young[key] = row
        self.make_room()

    def make_room(self) -> None:
        """Forget what was not used for longest if memory is at its bound. Not between two loads of one operation."""
        if self._size.young_bytes > self._next_look_bytes:
            self._budget.make_room(self)
            self._next_look_bytes = self._size.young_bytes + self._budget.step_bytes

    def mark_durable(self, batch: int, keys: list[tuple[Table, Any]]) -> None:
        """Say that a batch is in the store; unpin its rows as soon as no older read is under way."""
        self.durable_batch = batch
        self._releasable.append((self._next_read, batch, keys))
        self._release()

    def _release(self) -> None:
        oldest = next(iter(self._reads_under_way), None)
        while self._releasable and (oldest is None or self._releasable[0][0] <= oldest):
            _, batch, keys = self._releasable.popleft()
            for table, key in keys:
                pinned = self._pinned[table]
                entry = pinned.get(key)
                if entry is None or entry[1] != batch:
                    continue  # changed again by a later batch, which will release it
                del pinned[key]
                if table.grouped:
                    members = self._pinned_groups[table][key[0]]
                    del members[key[1]]
                    if not members:
                        del self._pinned_groups[table][key[0]]

    def turn_generation(self) -> None:
        """Drop the old generation; the young one becomes old. Not while a rule runs."""
        self._size.old_bytes, self._size.young_bytes = self._size.young_bytes, 0
        self._next_look_bytes = self._budget.step_bytes
        self.evicted_generations_total += 1
        for flat_table, flat in self._flat.items():
            if flat_table not in RESIDENT:
                flat.old, flat.young = flat.young, {}
        for grouped in self._grouped.values():
            grouped.old, grouped.young = grouped.young, {}
            for number in [n for n, group in grouped.old.items() if len(group.rows) > GROUP_MAX_ROWS]:
                del grouped.old[number]  # a directory in constant use must not fill the memory
                self._fresh[0].discard(number)
                self._fresh[1].discard(number)
        self._fresh = (set(), self._fresh[0])
        # A group that is dropped with the freshness of its inode is loaded from the store later; its pinned
        # rows are laid over what the store says, so nothing is lost by dropping it early.

    # -- loading --------------------------------------------------------------------------------------

    async def fetch(self, keys: Iterable[tuple[Table, Any]], groups: Iterable[tuple[Table, int]]) -> None:
        """Load rows and groups into memory, in one trip to the store."""
        wanted: dict[Table, list[Key]] = {}
        wanted_groups: dict[Table, list[int]] = {}
        for table, key in keys:
            wanted.setdefault(table, []).append(key if table.grouped else (key,))
        for table, group in groups:
            wanted_groups.setdefault(table, []).append(group)
        self.loads_total += 1
        read = self._begin_read()
        try:
            loaded = await self._store.load(wanted, wanted_groups)
            found: dict[Table, dict[Any, Row]] = {}
            for table, rows in loaded.rows.items():
                size = table.key_size
                found[table] = {(row[:2] if size == 2 else row[0]): row for row in rows}
            for table, table_keys in wanted.items():
                rows_found = found.get(table, {})
                for wide in table_keys:
                    key = wide if table.grouped else wide[0]
                    self.install(table, key, rows_found.get(key))
            for table, table_groups in wanted_groups.items():
                members: dict[int, list[Row]] = {group: [] for group in table_groups}
                for row in loaded.rows.get(table, []):
                    if row[0] in members:
                        members[row[0]].append(row)
                for group, group_rows in members.items():
                    self._install_group(table, group, group_rows)
        finally:
            self._end_read(read)

    async def scan_dir(
        self, parent: int, *, after: bytes | None, limit: int
    ) -> tuple[list[tuple[Dentry, Inode | None]], bool]:
        """Return one page of a directory, newest rows, and whether it is the last page.

        What changed since the scan began is merged: pinned rows are laid over the page's range of names.
        """
        self.make_room()
        while True:
            self.loads_total += 1
            read = self._begin_read()
            try:
                page = await self._store.scan_dir(parent, after=after, limit=limit)
                end = len(page) < limit
                self._install_page(parent, page, after=after, end=end)
                changed = [
                    name
                    for name in self._pinned_groups[DENTRY].get(parent, ())
                    if (after is None or name > after) and (end or name <= page[-1][0].name)
                ]
                merged = self._merged(parent, page, changed) if changed else page
                if merged or end:
                    # Before the read ends: it may be the one for whose sake a row is still pinned, and nowhere else in memory.
                    return [(dentry, self.get(INODE, dentry.ino)) for dentry, _ in merged], end
                # All of the page was removed meanwhile: an empty page would look like the last one.
                after = page[-1][0].name
            finally:
                self._end_read(read)

    def _merged(
        self, parent: int, page: list[tuple[Dentry, Inode | None]], changed: list[bytes]
    ) -> list[tuple[Dentry, Inode | None]]:
        """Lay pinned changes of names over a page of a directory."""
        merged = {found[0].name: found for found in page}
        for name in changed:
            dentry: Any = self._pinned[DENTRY][(parent, name)][0]
            if dentry is None:
                merged.pop(name, None)
            else:
                merged[name] = (dentry, None)
        return [merged[name] for name in sorted(merged)]

    def _install_page(
        self, parent: int, page: list[tuple[Dentry, Inode | None]], *, after: bytes | None, end: bool
    ) -> None:
        """Do what install() does for all rows of a page. Pages from the first to the last make a complete group."""
        inodes, pinned = self._flat[INODE], self._pinned[INODE]
        young = inodes.young
        for dentry, inode in page:
            ino = dentry.ino
            if ino not in young and ino not in pinned and (not inodes.old or inodes.get(ino) is _ABSENT):
                young[ino] = inode
                self._size.young_bytes += ROW_COST_BYTES
        dentries: list[Row] = [dentry for dentry, _ in page]
        group = self._install_members(DENTRY, parent, dentries)
        if not group.complete and (after is None or (group.scanned_to is not None and after <= group.scanned_to)):
            # What changed since an earlier page was read is in the group already: apply() writes it there.
            if len(group.rows) > GROUP_MAX_ROWS:
                # It would not stay, and is not worth sorting after each change.
                group.scanned_to = None
            elif end:
                self._complete(group)
            elif page and (group.scanned_to is None or page[-1][0].name > group.scanned_to):
                group.scanned_to = page[-1][0].name

    def _begin_read(self) -> int:
        number = self._next_read
        self._next_read += 1
        self._reads_under_way[number] = None
        return number

    def _end_read(self, number: int) -> None:
        del self._reads_under_way[number]
        self._release()

    def install(self, table: Table, key: Any, row: Row | None) -> None:
        """Keep a row that the store showed, unless memory has a newer one."""
        if key in self._pinned[table]:
            return
        if table.grouped:
            cache = self._grouped[table]
            group = cache.get(key[0])
            if group is None:
                group = cache.young[key[0]] = Group(complete=False)
            if key[1] not in group.rows and not group.complete:
                group.rows[key[1]] = row
                self._size.young_bytes += ROW_COST_BYTES
        else:
            flat = self._flat[table]
            if flat.get(key) is _ABSENT:
                flat.young[key] = row
                self._size.young_bytes += cost_bytes(row)

    def _install_group(self, table: Table, number: int, rows: list[Row]) -> None:
        group = self._install_members(table, number, rows)
        if not group.complete:
            self._complete(group)

    def _install_members(self, table: Table, number: int, rows: list[Row]) -> Group:
        """Do what install() does for rows of one group, and remember what is pinned of it.

        The pins may end before the group is complete, and nothing else may know of them: the group may have been dropped
        after the change.
        """
        cache = self._grouped[table]
        group = cache.get(number)
        if group is None:
            group = cache.young[number] = Group(complete=False)
        if not group.complete:
            have = group.rows
            pinned = self._pinned[table]
            for row in rows:
                if row[1] not in have and row[:2] not in pinned:
                    have[row[1]] = row
                    self._size.young_bytes += ROW_COST_BYTES
            for member in self._pinned_groups[table].get(number, ()):
                have[member] = pinned[(number, member)][0]
        return group

    def _complete(self, group: Group) -> None:
        """Make a group complete whose members were all installed: absences go."""
        for member in [m for m, row in group.rows.items() if row is None]:
            del group.rows[member]
        group.complete = True

    async def load_resident(self) -> None:
        """Load the tables that stay in memory. Call once, before the first operation."""
        for table in RESIDENT:
            after: Key | None = None
            while page := await self._store.scan(table, after=after, limit=1000):
                for row in page:
                    self.install(table, row[0], row)
                after = table.key_of(page[-1])

    def resident(self, table: Table) -> list[Row]:
        """Return all rows of a resident table."""
        return [row for row in self._flat[table].young.values() if row is not None]

    def resident_get(self, table: Table, key: Any) -> Any:
        """Return a row of a resident table, or None."""
        return self._flat[table].young.get(key)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Keep pinned, until the block ends, what a scan of the store that begins in the block might miss."""
        read = self._begin_read()
        try:
            yield
        finally:
            self._end_read(read)

    def pinned_in_range(self, table: Table, *, after: Any, last: Any) -> dict[Any, Row | None]:
        """Return pinned changes with ``after`` < key <= ``last``, to lay them over a scan; call within reading()."""
        return {key: entry[0] for key, entry in self._pinned[table].items() if after < key <= last}


ABSENT: Final = _ABSENT
