"""What the service has just said, for as long as a kernel may believe it.

Owns two small memories of one session, which spare trips. Must not know messages.

Directories: a kernel asks for the attributes of a directory right after each change in it, because it checks permissions
itself; the reply to the change has brought them.

Neighbours: whoever looks up, stats or opens one name of a directory often goes on with others of it, in order or at random. A
name in a page of a directory costs both sides about 5 us, a lookup 250. So lookups that were asked earn a page of names
(`wanted`), at first `FIRST_RATE` for each; more when pages are used, fewer when their time passes in vain, so that random
lookups in a huge directory are hardly slower than without.

Both hold for a fraction of the second for which kernels keep names and attributes (client.vfs.options), so what another
machine changes shows after 1 s and that much. Own changes show at once: the reply that acknowledges one brings the new
attributes of its directories, and forgets all neighbours; a page that was asked for before that is not taken. An absent name
is never answered from here. A name is answered from here once: a kernel that asks again, for O_EXCL or after ESTALE, wants to
know whether it is still so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final

from metasvc.model import DirPage, Ino, Inode

DIRECTORY_S: Final = 0.1
NEIGHBOURS_S: Final = 0.2
IN_A_ROW: Final = 2
"""So many lookups in a directory, without a pause of `NEIGHBOURS_S`, before the first page."""
MAX_PAGE: Final = 1024
"""A page of so many names begins at the first of the directory: few have more."""
FIRST_RATE: Final = 48
_MIN_RATE: Final = 3
_MAX_RATE: Final = 512
_NAMES_FOR_A_HIT: Final = 48
"""What a lookup costs in names of a page."""
_REMEMBERED: Final = 64
_MAX_KNOWN: Final = 16 * MAX_PAGE
"""Names of all directories together: 10 MiB."""


@dataclass(slots=True)
class _Row:
    """How lookups go in one directory, and the names that came with pages."""

    known: dict[bytes, tuple[Inode, float]] = field(default_factory=dict)
    """Names, and until when they are believed."""
    asked_s: float = 0.0
    credit: int = 0
    """Lookups that were asked, or answered from here, since the last page."""
    rate: int = FIRST_RATE
    """Names that a page has for each of these."""
    judged_s: float = 0.0
    is_large: bool = False
    """It has more names than a page."""
    names: int = 0
    hits: int = 0
    """Names that came, and were used, since the rate was judged."""


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
        for row in self._rows.values():
            row.known.clear()
            row.credit = 0
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

    def forget_children(self, parents: Collection[Ino]) -> None:
        """Forget the directories in some others, of which one may have been moved or removed; its parent is one of those.

        Others stay known: the programs beside one that renames would have to ask for theirs, and wait for the next commit.
        """
        self.changed()
        for ino in [ino for ino, (inode, _) in self._directories.items() if inode.parent in parents]:
            del self._directories[ino]

    def clear(self) -> None:
        """Forget everything: what was known turned out to be old, or more has changed than was told."""
        self.changed()
        self._directories.clear()

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
        found = None if row is None else row.known.get(name)
        if row is None or found is None:
            return None
        del row.known[name]
        if found[1] < self._now_s():
            return None
        row.hits += 1
        row.credit += 1
        return found[0]

    def wanted(self, parent: Ino) -> int:
        """Note a lookup that has to be asked; return how many names to ask for instead, 0 for the one only.

        `MAX_PAGE` are asked for from the first of the directory, fewer from the name on.
        """
        now_s = self._now_s()
        row = self._rows.get(parent)
        if row is None:
            if len(self._rows) >= _REMEMBERED:
                del self._rows[next(iter(self._rows))]
            row = self._rows[parent] = _Row(judged_s=now_s)
        if now_s - row.asked_s > NEIGHBOURS_S and not row.hits:
            row.credit = 0
        row.asked_s = now_s
        row.credit += 1
        if row.credit <= IN_A_ROW:
            return 0
        credit, row.credit = row.credit, 0
        was_used = row.hits * _NAMES_FOR_A_HIT >= row.names
        if was_used or now_s - row.judged_s > NEIGHBOURS_S:
            if was_used and row.names:
                row.rate = min(_MAX_RATE, row.rate * 2)
            elif not was_used:
                row.rate = max(_MIN_RATE, row.rate // 2)
            row.names, row.hits, row.judged_s = 0, 0, now_s
        return min(MAX_PAGE - row.is_large, credit * row.rate)

    def absent(self, parent: Ino) -> None:
        """Note that a name was not there: who makes files looks for them first, and earns no neighbours."""
        row = self._rows.get(parent)
        if row is not None:
            row.credit = 0

    def page(self, parent: Ino, page: DirPage, *, asked: int, asked_at: int) -> None:
        """Take a page of as many names as were ``asked`` for, when `changes` was ``asked_at``."""
        row = self._rows.get(parent)
        if row is None:
            return
        entries = page.entries
        if asked == MAX_PAGE:
            row.is_large = not page.end
        row.names += len(entries)
        if asked_at == self.changes:
            now_s = self._now_s()
            if sum(len(each.known) for each in self._rows.values()) > _MAX_KNOWN:
                for each in self._rows.values():
                    each.known.clear()
            until_s = now_s + NEIGHBOURS_S
            row.known.update((entry.name, (entry.inode, until_s)) for entry in entries)


def just_before(name: bytes) -> bytes | None:
    """Return a name that sorts before another, with few names between; None for one that has no such name."""
    if not name or not name[-1]:
        return None
    return name[:-1] + bytes([name[-1] - 1]) + b"\xff"
