"""Loading the directory that a walk of a tree comes to next, while the entries of this one are looked at.

What it owns: where the walk of one session is, in which order it takes subdirectories, and one chain of loads under way.
All of it is a hint: it only brings rows into memory. What it brings in vain is bounded: about `AHEAD_ENTRIES` names for each
directory that was listed to its end, and only after the walk has gone from a directory to its child or sibling twice. A mount
begins one at its root without having gone anywhere.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from collections.abc import Collection
from typing import Any, Final, NamedTuple

from chunkstore.errors import AtollError
from metasvc.engine.memory import ABSENT, Rows
from metasvc.model import Dentry, Ino, Inode
from metasvc.store.tables import DENTRY, INODE

AHEAD_ENTRIES: Final = 2000
"""So many names are loaded ahead at a time: 5 ms of a thread."""
LARGEST_ENTRIES: Final = 5000
"""Larger directories are not loaded ahead."""
_STEPS: Final = 2
_PAGE_ENTRIES: Final = 1000
_BRANCHES_KEPT: Final = 16
_BRANCHES_GOOD_FOR: Final = 64
"""So many listings after they were sorted the subdirectories of a directory that has changed are sorted again."""
_DEPTH_MAX: Final = 1000
"""Further up no walk is followed: damaged metadata may have a loop."""

log = logging.getLogger(__name__)


class _Branches(NamedTuple):
    """The subdirectories of a directory, in order of their names."""

    directory: Inode
    inos: list[Ino]
    positions: dict[Ino, int]
    made_at: int
    """How many listings had begun."""


class _Loading(NamedTuple):
    """A directory that is being loaded, and a future that is done when it is, or cannot be."""

    ino: Ino
    done: asyncio.Future[None]


class Walk:
    """The walk of one session through a tree, if it is one."""

    def __init__(self, rows: Rows) -> None:
        """Begin nowhere."""
        self._rows = rows
        self._last: Inode | None = None
        self._steps = 0
        self._listed = 0
        self._is_closed = False
        self._order = 0
        """1: subdirectories are taken in order of their names, -1: in the opposite order, 0: unknown."""
        self._branches: dict[Ino, _Branches] = {}
        self._task: asyncio.Task[None] | None = None
        self._loading: _Loading | None = None

    def close(self) -> None:
        """Stop what is under way; nothing is loaded ahead any more."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()

    async def arrive(self, directory: Inode, *, is_start: bool) -> bool:
        """Take note that a directory is listed. If it is being loaded, wait until it is; whether that was so."""
        if is_start:
            self._note(directory)
        if self._loading is None or self._loading.ino != directory.ino:
            return False
        await asyncio.shield(self._loading.done)
        return True

    def look_ahead(self, directory: Inode) -> None:
        """Start to load what comes after a directory that was listed to its end."""
        if self._steps >= _STEPS and self._task is None:
            self._start(self._next(directory))

    def start_at(self, directory: Inode) -> None:
        """Start to load a directory and what comes after it: who mounts a volume is about to list it."""
        self._start(self._wanted(directory.ino))

    def _start(self, found: Inode | None) -> None:
        if found is None or self._is_closed or self._task is not None:
            return
        # Before the task begins: who asks for the directory now waits for it.
        self._begin(found.ino)
        self._task = asyncio.get_running_loop().create_task(self._load(found), name="directories ahead")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._end()
        if not task.cancelled() and (error := task.exception()) is not None:
            # Whoever lists the directory meets the error as well.
            log.log(logging.DEBUG if isinstance(error, AtollError) else logging.ERROR, "loading ahead", exc_info=error)

    async def _load(self, directory: Inode) -> None:
        """Load a directory, and those after it while they are small."""
        found: Inode | None = directory
        entries = 0
        while found is not None and (entries == 0 or entries + found.size_bytes <= AHEAD_ENTRIES):
            self._begin(found.ino)
            after: bytes | None = None
            end = False
            while not end:
                # By the page: what comes out of the store is made into rows in one go, and the loop waits for that.
                rows, end = await self._rows.scan_dir(found.ino, after=after, limit=_PAGE_ENTRIES)
                after = rows[-1][0].name if rows else None
                end = end or not rows
            entries += 1 + found.size_bytes
            found = self._next(found)

    def _begin(self, ino: Ino) -> None:
        """Say which directory is being loaded; the one before it is."""
        if self._loading is None or self._loading.ino != ino:
            self._end()
            self._loading = _Loading(ino, asyncio.get_running_loop().create_future())

    def _end(self) -> None:
        loading, self._loading = self._loading, None
        if loading is not None:
            loading.done.set_result(None)

    def _note(self, directory: Inode) -> None:
        """Compare a directory with the one before it."""
        self._listed += 1
        last, self._last = self._last, directory
        if last is None or last.ino == directory.ino:
            return
        parent = self._inode(directory.parent)
        if directory.parent == last.ino:
            self._steps += 1
            self._learn(last, None, directory)
        elif parent is not None and directory.parent == last.parent:
            self._steps += 1
            self._learn(parent, last, directory)
        elif parent is None or not self._is_above(last, directory.parent):
            self._steps = 0
        else:
            self._steps += 1

    def _learn(self, parent: Inode, before: Inode | None, now: Inode) -> None:
        """See in which order the subdirectories of a directory are taken."""
        branches = self._branches_of(parent)
        position = branches.positions.get(now.ino)
        if position is None or len(branches.inos) < 2:
            return
        if before is not None:
            former = branches.positions.get(before.ino)
            if former is not None:
                self._order = 1 if position > former else -1
        elif position in (0, len(branches.inos) - 1):
            self._order = 1 if position == 0 else -1

    def _next(self, directory: Inode) -> Inode | None:
        """Return the directory that comes after one, if it is known and not in memory yet."""
        order = self._order or 1
        children = self._branches_of(directory).inos
        if children:
            return self._wanted(children[0 if order > 0 else -1])
        here = directory
        # Up, to the first ancestor that has a sibling left; no further than what is in memory.
        for _ in range(_DEPTH_MAX):
            parent = self._inode(here.parent)
            if parent is None or parent.ino == here.ino:
                break
            branches = self._branches_of(parent)
            position = branches.positions.get(here.ino)
            if position is None:
                break
            if 0 <= position + order < len(branches.inos):
                return self._wanted(branches.inos[position + order])
            here = parent
        return None

    def _wanted(self, ino: Ino) -> Inode | None:
        """Return a directory if it is worth loading."""
        inode = self._inode(ino)
        if inode is None or self._rows.group(DENTRY, ino) is not None or inode.size_bytes > LARGEST_ENTRIES:
            return None
        return inode

    def _branches_of(self, directory: Inode) -> _Branches:
        """Return the subdirectories of a directory, as they were not long ago; none if they are not all in memory.

        They are sorted anew only now and then: who removes a tree changes the parent between any two listings.
        """
        if directory.nlink <= 2:
            return _Branches(directory, [], {}, self._listed)
        held = self._branches.get(directory.ino)
        if held is not None and (held.directory is directory or self._listed - held.made_at < _BRANCHES_GOOD_FOR):
            return held
        group = self._rows.group(DENTRY, directory.ino)
        members: Collection[Any] = group.values() if group is not None and len(group) <= LARGEST_ENTRIES else ()
        rows: list[Dentry] = [row for row in members if row is not None and stat.S_ISDIR(row.type)]
        inos = [row.ino for row in sorted(rows, key=lambda row: row.name)]
        found = _Branches(directory, inos, {ino: position for position, ino in enumerate(inos)}, self._listed)
        if group is not None:
            self._branches.pop(directory.ino, None)
            while len(self._branches) >= _BRANCHES_KEPT:
                del self._branches[next(iter(self._branches))]
            self._branches[directory.ino] = found
        return found

    def _inode(self, ino: Ino) -> Inode | None:
        inode: Any = self._rows.get(INODE, ino)
        return None if inode is ABSENT else inode

    def _is_above(self, inode: Inode, ancestor: Ino) -> bool:
        """Return whether a directory lies below an ancestor, as far as memory knows."""
        here: Inode | None = inode
        for _ in range(_DEPTH_MAX):
            if here is None or here.parent == here.ino:
                break
            if here.parent == ancestor:
                return True
            here = self._inode(here.parent)
        return False
