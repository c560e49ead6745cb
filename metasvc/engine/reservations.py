"""Room promised to writers: so that ENOSPC and EDQUOT come from write(2), never first from close(2).

Owns, for each file that somebody writes to, the end up to which it was promised to grow, and the sums per
quota (key 0: the volume). It is not durable: what is promised is lost with the session that had it, and
what was written without room left is refused at commit. Sessions that outlive the owner say what it had promised.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

from chunkstore.geometry import MAX_FILE_BYTES
from metasvc.engine import accounts
from metasvc.engine.accounts import USED_BYTES, VOLUME_RESERVATION
from metasvc.engine.content import regular
from metasvc.engine.tx import Tx, refuse
from metasvc.model import SPACE_UNIT_BYTES, Ino, Inode, space_of
from metasvc.store.tables import INODE

AHEAD_BYTES = 64 * 1024 * 1024
"""Promised beyond what was asked where there is plenty, so that a sequential writer asks seldom."""
SHARE = 16
"""Never promise ahead more than this part of what is left."""


@dataclass(slots=True)
class _Promise:
    end_bytes: int
    """Charged size up to which the file may grow."""
    names: dict[Ino, int] = field(default_factory=dict)
    """For the volume and each quota: how often the growth counts."""
    held_bytes: int = 0


class Reservations:
    """All promises of one volume."""

    def __init__(self) -> None:
        self._files: dict[Ino, _Promise] = {}
        self._sums: dict[Ino, int] = {}

    def reserved_bytes(self, quota: Ino) -> int:
        """Return the sum of what is promised in a quota (0: the volume)."""
        return self._sums.get(quota, 0)

    def granted_bytes(self, ino: Ino) -> int:
        """Return what a file may still grow."""
        promise = self._files.get(ino)
        return promise.held_bytes if promise else 0

    def reserve(self, tx: Tx, ino: Ino, end: int) -> int:
        """Promise growth to ``end`` and perhaps beyond; the new end. A rule that changes only this object."""
        inode = regular(tx, ino)
        if end > MAX_FILE_BYTES:
            refuse(errno.EFBIG)
        if not accounts.is_limited(tx):
            return MAX_FILE_BYTES
        promise = self._files.get(ino)
        have = max(inode.space_bytes, promise.end_bytes if promise else 0)
        more = space_of(end) - have
        if more <= 0:
            return have
        accounts.room_for_growth(tx, inode, more)
        names, left = self._limits(tx, ino)
        ahead = min(AHEAD_BYTES, max(0, left - more) // SHARE) // SPACE_UNIT_BYTES * SPACE_UNIT_BYTES
        if promise is None:
            promise = self._files[ino] = _Promise(have, names)
        promise.end_bytes = min(have + more + ahead, space_of(MAX_FILE_BYTES))
        self._hold(promise, promise.end_bytes - inode.space_bytes)
        return promise.end_bytes

    def restore(self, tx: Tx, ino: Ino, end: int) -> None:
        """Promise again what an earlier owner promised, as far as there is room: it was kept free. A rule as reserve()."""
        inode: Inode | None = tx.get(INODE, ino)
        if inode is None or not inode.is_file or not accounts.is_limited(tx):
            return
        promise = self._files.get(ino)
        have = max(inode.space_bytes, promise.end_bytes if promise else 0)
        if space_of(end) <= have or end >= MAX_FILE_BYTES:
            # The second: it was promised when there was no limit.
            return
        names, left = self._limits(tx, ino)
        room = max(0, left) // max(names.values()) // SPACE_UNIT_BYTES * SPACE_UNIT_BYTES
        if promise is None:
            promise = self._files[ino] = _Promise(have, names)
        promise.end_bytes = min(space_of(end), have + room)
        self._hold(promise, promise.end_bytes - inode.space_bytes)

    def _limits(self, tx: Tx, ino: Ino) -> tuple[dict[Ino, int], int]:
        """Return how often growth counts for each limit, and the least that is left of any."""
        names: dict[Ino, int] = {VOLUME_RESERVATION: 1}
        left = MAX_FILE_BYTES
        if tx.around.format.capacity_bytes:
            left = tx.around.format.capacity_bytes - tx.counter(USED_BYTES) - self.reserved_bytes(VOLUME_RESERVATION)
        if tx.around.allowance.max_bytes is not None:
            held = tx.counter(USED_BYTES) + self.reserved_bytes(VOLUME_RESERVATION)
            left = min(left, tx.around.allowance.max_bytes - held)
        if tx.quotas_exist():
            for parent, count in accounts.parents_of(tx, tx.inode(ino)):
                for quota in accounts.quotas_above(tx, parent):
                    names[quota.ino] = names.get(quota.ino, 0) + count
                    if quota.max_bytes:
                        left = min(left, quota.max_bytes - quota.used_bytes - self.reserved_bytes(quota.ino))
        return names, left

    def resized(self, ino: Ino, space_bytes: int) -> None:
        """Note a new charged size of a file: what became use is no longer promised."""
        promise = self._files.get(ino)
        if promise is not None:
            self._hold(promise, max(0, promise.end_bytes - space_bytes))

    def release(self, ino: Ino) -> None:
        """Take back what a file did not use."""
        promise = self._files.pop(ino, None)
        if promise is not None:
            self._hold(promise, 0)

    def _hold(self, promise: _Promise, held_bytes: int) -> None:
        change = held_bytes - promise.held_bytes
        promise.held_bytes = held_bytes
        for key, names in promise.names.items():
            self._sums[key] = self._sums.get(key, 0) + change * names
