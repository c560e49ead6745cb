"""The audit of counters: what the volume and its quotas say is used, compared with the inodes while everybody works.

Every operation keeps the counters exactly (metasvc.engine.accounts). Should they be wrong none the less, by a bug or because
somebody edited the store, fsck finds it but holds changes back; the audit finds and repairs it and holds nobody back.

What it owns: a walk over the inode table in pages, and sums over the inodes up to a cursor. All four counters of the volume
and the usage of every quota are sums over inodes: an inode in the trash says so by its parent, and a quota is the sum of what
its directory and those below it say of themselves (``child_bytes``, entries). Whether *those* are right only fsck sees.

Interleavings:

- Invariant: the sums are exact for the inodes that are in force now and not above the cursor. An operation that changes an
  inode there changes the sums by the difference in the stretch in which it comes into force (``changed``).
- A page from the store is the state of some moment. What was changed since it was asked for, or was in force and not durable
  then, is pinned (Rows.reading) and laid over it. Then sums and cursor move on, with no await since the pinned rows were read.
- When the cursor is at the end, comparing and repairing are one operation, which is begun again if it is held back.
- A quota contains a directory or not for as long as both live: no directory with anything in it moves between quotas (EXDEV).
  What arrives all the same is a clone that became complete, or what fsck repairs: the quotas concerned are left to the next
  audit, as are those that are set meanwhile.
- Nothing but the repair is written. A walk that ends early, for whatever reason, leaves no trace.

Memory: one page, what changes while it is read, and two numbers for each quota.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from metasvc.engine.accounts import TRASH_BYTES, TRASH_INODES, USED_BYTES, USED_INODES
from metasvc.engine.engine import Changes, Engine
from metasvc.engine.memory import ABSENT, NeedRows
from metasvc.engine.tx import Tx
from metasvc.errors import StoreError
from metasvc.model import IN_TRASH, ROOT_INO, Ino, Inode
from metasvc.store.tables import INODE, QUOTA

PAGE_ROWS: Final = 1000
WALKS_MAX: Final = 3
DEPTH_MAX: Final = 10_000
"""A directory deeper than this is taken for part of a loop, which fsck finds; quotas are not audited then."""
_BEFORE_ALL: Final = Ino(0)
_AFTER_ALL: Final = Ino((1 << 63) - 1)


@dataclass(frozen=True, slots=True)
class Difference:
    """A counter that was wrong, and was repaired."""

    counter: str
    quota: Ino
    """The directory whose quota it belongs to; 0 for the volume."""
    found: int
    expected: int


@dataclass(frozen=True, slots=True)
class Audited:
    """What an audit found."""

    inodes: int
    quotas: int
    """How many quotas the walk could follow from its beginning to its end."""
    differences: list[Difference]


async def audit(engine: Engine, *, pause_s: float, page_rows: int = PAGE_ROWS) -> Audited:
    """Compare counters and quotas with the inodes, and repair them; durable. One audit of an engine at a time.

    Rests ``pause_s`` after each page. May be cancelled at any moment. StoreError, and what made the engine fail.
    """
    for _ in range(WALKS_MAX):
        walk = _Walk(engine)
        assert engine.watch is None, "one audit at a time"
        engine.watch = walk.changed
        try:
            while not walk.is_lost and walk.cursor != _AFTER_ALL:
                await walk.advance(page_rows)
                await asyncio.sleep(pause_s)
            differences: list[Difference] | None = await engine.run(walk.repair)
            if differences is not None:
                return Audited(walk.sums[USED_INODES], len(walk.quotas), differences)
        finally:
            engine.watch = None
    raise StoreError("inodes were repaired under the audit of counters again and again")


@dataclass(slots=True)
class _Used:
    """What was found of one quota so far."""

    used_bytes: int = 0
    used_inodes: int = 0


class _Walk:
    """One walk over all inodes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rows = engine.rows
        self.cursor = _BEFORE_ALL
        self.sums = dict.fromkeys((USED_BYTES, USED_INODES, TRASH_BYTES, TRASH_INODES), 0)
        self.quotas: dict[Ino, _Used] = {row[0]: _Used() for row in engine.rows.resident(QUOTA)}
        """Quotas that are there since the walk began, and that nothing entered as a whole."""
        self.is_lost = False
        """Whether an inode was changed of which nobody knows how it was: the sums are worth nothing."""

    # -- walking ------------------------------------------------------------------------------------------

    async def advance(self, limit: int) -> None:
        """Read the next page and move the cursor behind it. One trip to the store, more for quotas."""
        rows = self._rows
        rows.make_room()
        with rows.reading():
            after = self.cursor
            page = await self._engine.store.scan(INODE, after=(after,), limit=limit)
            last: Ino = page[-1][0] if len(page) == limit else _AFTER_ALL
            for _ in range(DEPTH_MAX):
                inodes: dict[Ino, Any] = {row[0]: row for row in page}
                inodes.update(rows.pinned_in_range(INODE, after=after, last=last))
                try:
                    above = self._quotas_of(inodes)
                except NeedRows as need:
                    await rows.fetch(need.keys, ())
                    continue
                for inode in inodes.values():
                    if inode is not None:
                        self._add(inode, +1)
                for ino, quotas in above.items():
                    self._charge(quotas, inodes[ino].child_bytes, inodes[ino].size_bytes)
                self.cursor = last
                return
        raise StoreError("directories are too deep for the audit of counters; the memory limit is too small")

    def _add(self, inode: Inode, sign: int) -> None:
        sums = self.sums
        space = sign * inode.space_bytes
        sums[USED_BYTES] += space
        sums[USED_INODES] += sign
        if inode.parent == IN_TRASH:
            sums[TRASH_BYTES] += space
            sums[TRASH_INODES] += sign

    def _charge(self, quotas: Collection[Ino], bytes_more: int, inodes_more: int) -> None:
        for ino in quotas:
            used = self.quotas[ino]
            used.used_bytes += bytes_more
            used.used_inodes += inodes_more

    def _quotas_of(self, inodes: Mapping[Ino, Inode | None]) -> dict[Ino, list[Ino]]:
        """Return the quotas that each directory counts for, if it has anything in it. NeedRows, for all at once."""
        found: dict[Ino, list[Ino]] = {}
        missing: dict[Ino, None] = {}
        for ino, inode in inodes.items():
            if not self.quotas:
                return {}
            if inode is not None and inode.is_dir and (inode.size_bytes or inode.child_bytes):
                try:
                    found[ino] = self._above(ino, inodes)
                except NeedRows as need:
                    missing.update((key, None) for _, key in need.keys)
        if missing:
            raise NeedRows([(INODE, ino) for ino in missing], [])
        return found if self.quotas else {}

    def _above(self, ino: Ino, known: Mapping[Ino, Inode | None]) -> list[Ino]:
        """Return the quotas of a directory and those above it, as they are in force. NeedRows.

        ``known``: inodes that are at hand though memory may not have them.
        """
        found = []
        for _ in range(DEPTH_MAX):
            if ino in self.quotas:
                found.append(ino)
            if ino in (ROOT_INO, 0, IN_TRASH):
                return found
            inode = known.get(ino, ABSENT)
            if inode is ABSENT:
                inode = self._rows.get(INODE, ino)
            if inode is ABSENT:
                raise NeedRows([(INODE, ino)], [])
            ino = Ino(0) if inode is None else inode.parent
        self.quotas.clear()
        return []

    # -- beside operations --------------------------------------------------------------------------------

    def changed(self, changes: Changes, fresh: Collection[Ino]) -> None:
        """Take note of changes that come into force in this stretch; memory has the rows as they were before."""
        inodes: Mapping[Ino, Any] = changes.get(INODE, {})
        for ino, new in inodes.items():
            old: Any = None if ino in fresh else self._rows.get(INODE, ino)
            if old is ABSENT:
                self.is_lost = True
                return
            if ino <= self.cursor:
                if old is not None:
                    self._add(old, -1)
                if new is not None:
                    self._add(new, +1)
            if self.quotas:
                self._changed_below_quotas(ino, old, new)

    def _changed_below_quotas(self, ino: Ino, old: Inode | None, new: Any) -> None:
        if old is None or not old.is_dir:
            if new is not None and new.is_dir and new.size_bytes:
                self.quotas.clear()  # out of nothing, with something in it: no rule does that
            return
        entries, space = (0, 0) if new is None else (new.size_bytes, new.child_bytes)
        try:
            if ino <= self.cursor and (entries, space) != (old.size_bytes, old.child_bytes):
                self._charge(self._above(ino, {}), space - old.child_bytes, entries - old.size_bytes)
            # What is in a clone that is not complete has higher numbers than the clone.
            is_unseen_clone = old.parent == IN_TRASH and ino > self.cursor
            if new is not None and new.parent != old.parent and entries and not is_unseen_clone:
                for quota in set(self._above(old.parent, {})) ^ set(self._above(new.parent, {})):
                    self.quotas.pop(quota, None)
        except NeedRows:
            # An operation that charges a quota has the directories above at hand; this one did not.
            self.quotas.clear()

    # -- at the end ---------------------------------------------------------------------------------------

    def repair(self, tx: Tx) -> list[Difference] | None:
        """Put right what is wrong, and return it; None if the sums are worth nothing. A rule."""
        if self.is_lost:
            return None
        found: list[Difference] = []
        for name, expected in self.sums.items():
            value = tx.counter(name)
            if value != expected:
                found.append(Difference(name, Ino(0), value, expected))
                tx.count(name, expected - value)
        for ino, used in self.quotas.items():
            quota = tx.quota(ino)
            if quota is None:
                continue  # removed meanwhile
            noted = quota.used_bytes, quota.used_inodes
            expected_pair = used.used_bytes, used.used_inodes
            if noted != expected_pair:
                for name, value, right in zip((USED_BYTES, USED_INODES), noted, expected_pair, strict=True):
                    if value != right:
                        found.append(Difference(name, ino, value, right))
                tx.put(QUOTA, quota._replace(used_bytes=used.used_bytes, used_inodes=used.used_inodes))
        return found
