"""What the service has just said, for as long as a kernel may believe it.

Owns two small memories of one session, which spare trips. Must not know messages.

Directories: a kernel asks for the attributes of a directory right after each change in it, because it checks permissions
itself; the reply to the change has brought them. Neighbours: whoever looks up names of one directory one after the other gets
the names that follow with the third (`wanted`); a page grows while its names are asked for, and shrinks when they are not.

Both hold for a fraction of the second for which kernels keep names and attributes (client.vfs.options), so what another
machine changes shows after 1 s and that much. Own changes show at once: the reply that acknowledges one brings the new
attributes of its directories, and forgets all neighbours; a page that was asked for before that is not taken. An absent name
is never answered from here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from metasvc.model import Entry, Ino, Inode

DIRECTORY_S: Final = 0.1
NEIGHBOURS_S: Final = 0.2
PAUSE_S: Final = 0.1
"""Lookups in a directory that are further apart are no row."""
IN_A_ROW: Final = 2
MIN_PAGE: Final = 8
MAX_PAGE: Final = 512
_REMEMBERED: Final = 64


@dataclass(slots=True)
class _Row:
    """How lookups go in one directory, and the names that came with the last page."""

    asked: int = 0
    asked_s: float = 0.0
    page: int = MIN_PAGE
    hits: int = 0
    known: dict[bytes, Inode] = field(default_factory=dict)
    until_s: float = 0.0


class Recent:
    """What one session was told a moment ago."""

    def __init__(self, *, now_s: Callable[[], float] = time.monotonic) -> None:
        """Remember nothing yet. ``now_s``: seconds of a clock that never goes back."""
        self._now_s = now_s
        self._directories: dict[Ino, tuple[Inode, float]] = {}
        self._rows: dict[Ino, _Row] = {}
        self.changes = 0
        """Grows with every change that was answered: what was asked for before it may be older than that."""

    # -- directories ------------------------------------------------------------------------------------------------------

    def changed(self, directories: Sequence[Inode] = ()) -> None:
        """Take note that a change was answered, and what its directories are with it."""
        self.changes += 1
        self._rows.clear()
        if directories:
            until_s = self._now_s() + DIRECTORY_S
            if len(self._directories) >= _REMEMBERED:
                self._directories.clear()
            for inode in directories:
                former = self._directories.get(inode.ino)
                if former is None or former[0].ctime_ns <= inode.ctime_ns:
                    self._directories[inode.ino] = (inode, until_s)

    def forget(self, ino: Ino) -> None:
        """Forget an inode that was changed in another way."""
        self.changed()
        self._directories.pop(ino, None)

    def directory(self, ino: Ino) -> Inode | None:
        """Return a directory as a change has just left it, if that is known."""
        found = self._directories.get(ino)
        if found is None:
            return None
        if found[1] < self._now_s():
            del self._directories[ino]
            return None
        return found[0]

    # -- neighbours -------------------------------------------------------------------------------------------------------

    def name(self, parent: Ino, name: bytes) -> Inode | None:
        """Return what a name stands for, if it came with a page a moment ago."""
        row = self._rows.get(parent)
        if row is None or row.until_s < self._now_s():
            return None
        inode = row.known.get(name)
        if inode is not None:
            row.hits += 1
        return inode

    def wanted(self, parent: Ino) -> int:
        """Note a lookup that has to be asked; return how many names to ask for from there on, 0 for the one only."""
        now_s = self._now_s()
        row = self._rows.get(parent)
        if row is None:
            if len(self._rows) >= _REMEMBERED:
                self._rows.clear()
            row = self._rows[parent] = _Row()
        if now_s - row.asked_s > max(PAUSE_S, NEIGHBOURS_S if row.known else 0.0):
            row.asked, row.page, row.known, row.hits = 0, MIN_PAGE, {}, 0
        row.asked += 1
        row.asked_s = now_s
        if row.asked <= IN_A_ROW:
            return 0
        if row.known:
            was_used = row.hits * 2 >= len(row.known)
            row.page = min(MAX_PAGE, row.page * 4) if was_used else max(MIN_PAGE, row.page // 4)
            if not was_used and row.page == MIN_PAGE:
                # Names in no order: a few single lookups, then another try.
                row.asked, row.known = -MIN_PAGE, {}
                return 0
        return row.page

    def absent(self, parent: Ino) -> None:
        """Note that a name was not there: who makes files looks for them first, and needs no neighbours."""
        self._rows.pop(parent, None)

    def page(self, parent: Ino, entries: Sequence[Entry], *, asked_at: int) -> None:
        """Take a page that was asked for when `changes` was ``asked_at``."""
        row = self._rows.get(parent)
        if row is not None and asked_at == self.changes:
            row.known = {entry.name: entry.inode for entry in entries}
            row.hits = 0
            row.until_s = self._now_s() + NEIGHBOURS_S


def just_before(name: bytes) -> bytes | None:
    """Return a name that sorts before another, with few names between; None for one that has no such name."""
    if not name or not name[-1]:
        return None
    return name[:-1] + bytes([name[-1] - 1]) + b"\xff"
