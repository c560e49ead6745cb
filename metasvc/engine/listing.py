"""Listing directories, and bringing the neighbours of what is looked up one by one.

What it owns: the sorted names of a few directories, and how often lookups missed memory per directory. Both
are hints: losing them costs time only.

A job start looks up, stats and opens thousands of names in a directory one after the other, in order or at
random. Each that is not in memory would cost trips to the store (60 to 100 us each in a thread, a round trip
to a database later). The second miss in a directory therefore loads neighbours: all names and inodes of a
directory of up to a thousand, else a page that grows with its use; and for opens the maps and inline bytes of
files whose inode numbers are near. What that may cost in vain is bounded: 5 ms for the names, 1.5 ms for maps.

Whoever lists a tree goes from a directory to its child or its sibling. While entries of one are looked at (8 us each in a
program that stats them) the next one is loaded (metasvc.engine.walking): half of the time of a walk was waiting for it.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from metasvc.engine.engine import Engine
from metasvc.engine.memory import ABSENT, ROW_COST_BYTES
from metasvc.engine.tx import Tx
from metasvc.engine.walking import Walk
from metasvc.model import DirPage, Entry, Ino, Inode, SliceRef, unpack_refs
from metasvc.store.tables import CHUNK, DENTRY, INODE, SLICE

NEIGHBOURS_MIN = 8
NEIGHBOURS_MAX = 1000
"""Names loaded at the second and later misses in a directory (SQLite: 2.5 ms for a thousand)."""
PAGES_AFTER_MISSES = 32
"""So many misses in a larger directory cost what a full page does; after them each miss loads one."""
CONTENT_NEIGHBOURS = 64
"""Files whose maps (and inline bytes, up to 32 KiB each) are loaded at the second open that missed."""
CONTENT_SHARE = 0.5
"""Share of the memory up to which files near the one that is opened are still there when their turn comes."""
CONTENT_COST_BYTES = 4 * ROW_COST_BYTES
"""What a file takes in memory beside its inline bytes: name, inode, map and slice."""
SORTED_DIRECTORIES = 16


@dataclass(slots=True)
class _Habit:
    """How lookups and opens go in one directory."""

    limit: int = NEIGHBOURS_MIN
    hits: int = 0
    misses: int = 0
    opens_missed: int = 0
    generation: int = 0
    """When an open in it missed memory last, in generations of rows that were evicted."""
    content_bytes: int = 0
    """What all files of the directory with their inline bytes take in memory; 0 before opens in it missed memory twice."""


class Listing:
    """Reads of directories for one session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sorted: dict[Ino, tuple[Inode, list[bytes]]] = {}
        self._habits: dict[Ino, _Habit] = {}
        self._opened_last = Ino(0)
        self._opened_in_order = 0
        self._walk = Walk(engine.rows)

    async def page(self, ino: Ino, *, after: bytes | None, limit: int) -> DirPage:
        """Return one page of a directory. ENOTDIR, ENOENT."""
        engine = self._engine
        inode: Inode = await engine.run(Tx.directory, ino)
        rows = engine.rows
        if await self._walk.arrive(inode, is_start=after is None):
            # It may have been changed while its load was waited for.
            inode = await engine.run(Tx.directory, ino)
        known = rows.group(DENTRY, ino)
        if known is None:
            found, end = await rows.scan_dir(ino, after=after, limit=limit)
            if rows.has_pins:
                await engine.settled()
            entries = [Entry(dentry.name, child) for dentry, child in found if child is not None]
            if end:
                self._walk.look_ahead(inode)
            return DirPage(entries, end)
        held = self._sorted.get(ino)
        if held is None or held[0] is not inode:
            while len(self._sorted) >= SORTED_DIRECTORIES:
                del self._sorted[next(iter(self._sorted))]
            held = self._sorted[ino] = (inode, sorted(name for name, row in known.items() if row is not None))
        names = held[1]
        first = 0 if after is None else bisect_right(names, after)
        wanted = names[first : first + limit]

        entries = await engine.run(Tx.entries, ino, wanted)
        end = first + limit >= len(names)
        if end:
            self._walk.look_ahead(inode)
        return DirPage(entries, end)

    async def begin_at(self, ino: Ino) -> None:
        """Load the top of a tree in the background. ENOENT, ENOTDIR."""
        directory: Inode = await self._engine.run(Tx.directory, ino)
        self._walk.start_at(directory)

    def close(self) -> None:
        """Stop what is loaded ahead."""
        self._walk.close()

    async def expect(self, parent: Ino, name: bytes) -> None:
        """Before a lookup: load names around it if lookups in this directory keep missing memory.

        A directory of up to a thousand names comes whole. Of a larger one so many: four times as many when half
        of the last page was asked for since, a quarter when not, so that a few random lookups in a huge directory
        do not read a thousand names for one; a full page once misses have cost as much as that.
        """
        rows = self._engine.rows
        dentry = rows.get(DENTRY, (parent, name))
        habit = self._habits.get(parent)
        if dentry is not ABSENT and (dentry is None or rows.get(INODE, dentry.ino) is not ABSENT):
            if habit is not None:
                habit.hits += 1
            return
        if habit is None:
            self._habit(parent)
            return
        directory = rows.get(INODE, parent)
        if directory is not ABSENT and directory is not None and directory.size_bytes <= NEIGHBOURS_MAX:
            await rows.scan_dir(parent, after=None, limit=NEIGHBOURS_MAX + 1)
            return
        habit.misses += 1
        if habit.misses > PAGES_AFTER_MISSES:
            habit.limit = NEIGHBOURS_MAX
        else:
            used = habit.hits * 2 >= habit.limit
            habit.limit = min(NEIGHBOURS_MAX, habit.limit * 4) if used else max(NEIGHBOURS_MIN, habit.limit // 4)
        habit.hits = 0
        # The page begins at the name that is wanted: whoever goes through names in order finds the next ones.
        before = name[:-1] + bytes([name[-1] - 1]) + b"\xff" if name and name[-1] else None
        found, end = await rows.scan_dir(parent, after=before, limit=habit.limit)
        if rows.get(DENTRY, (parent, name)) is ABSENT and (end or (found and found[-1][0].name > name)):
            rows.install(DENTRY, (parent, name), None)

    def _habit(self, parent: Ino) -> _Habit:
        habit = self._habits.get(parent)
        if habit is None:
            while len(self._habits) >= 1024:
                del self._habits[next(iter(self._habits))]
            habit = self._habits[parent] = _Habit()
        return habit

    async def expect_content(self, ino: Ino) -> None:
        """Before an open: load maps of files near by, if opens go through them in order or keep missing memory."""
        rows = self._engine.rows
        last, self._opened_last = self._opened_last, ino
        self._opened_in_order = self._opened_in_order + 1 if 0 < ino - last <= CONTENT_NEIGHBOURS else 0
        if rows.get(CHUNK, (ino, 0)) is not ABSENT:
            return
        if self._opened_in_order >= 2:
            # Once is an accident where there are few files.
            first = ino
        elif self._opens_keep_missing(ino):
            first = Ino(ino - ino % CONTENT_NEIGHBOURS)
        else:
            return
        rows.make_room()
        inos = range(first, first + CONTENT_NEIGHBOURS)
        await rows.fetch([(CHUNK, (number, 0)) for number in inos if rows.get(CHUNK, (number, 0)) is ABSENT], [])
        refs: list[SliceRef] = []
        for number in inos:
            chunk = rows.get(CHUNK, (number, 0))
            if chunk is not ABSENT and chunk is not None:
                refs += unpack_refs(chunk.refs)[:4]
        await rows.fetch([(SLICE, ref.slice_id) for ref in refs if rows.get(SLICE, ref.slice_id) is ABSENT], [])

    def _opens_keep_missing(self, ino: Ino) -> bool:
        """Note an open that missed memory; return whether to load what is near, although opens go in no order."""
        rows = self._engine.rows
        inode = rows.get(INODE, ino)
        directory = rows.get(INODE, inode.parent) if inode is not ABSENT and inode is not None else None
        if directory is ABSENT or directory is None or not directory.is_dir:
            return False
        habit = self._habit(directory.ino)
        habit.opens_missed += 1
        if habit.opens_missed == 1:
            return False
        # All directories in which files are opened at random share the memory. Where they do not fit, what is loaded beside the
        # file that is wanted is gone before its turn: 5 ms for each of 20,000 files of 4 KiB, instead of 0.8 one by one.
        count, inline_limit = max(1, directory.size_bytes), self._engine.format.inline_limit_bytes
        inline_bytes = directory.child_bytes if directory.child_bytes <= count * inline_limit else 0
        habit.content_bytes = count * CONTENT_COST_BYTES + inline_bytes
        habit.generation = rows.evicted_generations_total
        # What missed nothing for two generations is not being read at random now, or is gone.
        recent = habit.generation - 2
        together_bytes = sum(each.content_bytes for each in self._habits.values() if each.generation >= recent)
        return together_bytes <= CONTENT_SHARE * rows.allowance_bytes
