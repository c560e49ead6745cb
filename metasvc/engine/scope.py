"""What of a volume a session may reach that is confined to a subtree. Rules on a Tx.

A session is confined to a directory, by its number: it goes on reaching it when that is renamed or moved, and no other one that
takes its name. Reached is what has a name at or below that directory: of a file with several names one is enough. What has no
name any more, or lies in the trash, is reached by a session that opened it while it had one, and has it open. A file that
somebody moves out of the subtree is out of reach, open or not.

A check is a walk from the inode up to that directory, over rows that are at hand. It must be made in the same step as what it
allows (the same Tx): between two steps a directory may be moved out.
"""

from __future__ import annotations

import errno as E
from collections.abc import Callable, Iterable
from typing import NamedTuple

from metasvc.engine.accounts import parents_of
from metasvc.engine.tx import Tx, refuse
from metasvc.model import IN_TRASH, ROOT_INO, Ino, Inode
from metasvc.store.tables import INODE

__all__ = ["Scope"]


class Scope(NamedTuple):
    """What a session is confined to."""

    root: Ino
    has_open: Callable[[Ino], bool]
    """Whether the session has an inode open."""

    def reaches(self, tx: Tx, ino: Ino) -> bool:
        """Return whether the session may touch an inode; False for one that does not exist. A rule."""
        if ino == self.root:
            return True
        inode: Inode | None = tx.get(INODE, ino)
        if inode is None or ino == ROOT_INO:
            return False
        parents = [parent for parent, _ in parents_of(tx, inode)]
        return any(self._is_at_or_above(tx, parent) for parent in parents) if parents else self.has_open(ino)

    def require(self, tx: Tx, inos: Iterable[Ino]) -> None:
        """Refuse inodes that the session may not touch as if they did not exist. A rule. ENOENT."""
        for ino in inos:
            if not self.reaches(tx, ino):
                refuse(E.ENOENT)

    def _is_at_or_above(self, tx: Tx, directory: Ino) -> bool:
        """Return whether the scope's directory is this one, or lies above it."""
        while directory != self.root:
            inode: Inode | None = None if directory in (0, ROOT_INO, IN_TRASH) else tx.get(INODE, directory)
            if inode is None:
                return False
            directory = inode.parent
        return True
