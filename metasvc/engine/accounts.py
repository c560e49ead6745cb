"""Counters and quotas: what the volume and each directory tree use. Rules on a Tx.

Invariants (checked by metasvc.engine.check):

- ``used_bytes``/``used_inodes`` of the volume count each inode once, from creation to removal, the trash and
  sustained inodes included. Space is space_of(length) of regular files.
- A directory's ``child_bytes`` adds the space of the regular files named in it, each name once.
- A quota's ``used_*`` add, over all names below its directory, the space of the files and one inode per name.

Limits are checked where names are made and where files grow, against what is used *and* what is promised to
writers (reserved), so a write that was accepted can always be committed.
"""

from __future__ import annotations

import errno as E
from collections.abc import Iterator

from metasvc.engine.tx import Tx
from metasvc.errors import OutOfSpace, TenantFull
from metasvc.model import IN_TRASH, ROOT_INO, Ino, Inode, Quota
from metasvc.store.tables import INODE, LINK, QUOTA

USED_BYTES = "used_bytes"
USED_INODES = "used_inodes"
TRASH_BYTES = "trash_bytes"
TRASH_INODES = "trash_inodes"

VOLUME_RESERVATION = Ino(0)
"""The key of the volume itself where reservations are kept by quota."""


def is_limited(tx: Tx) -> bool:
    """Return whether anything limits the bytes of the volume or of a part of it."""
    around = tx.around
    return bool(around.format.capacity_bytes) or around.allowance.max_bytes is not None or tx.quotas_exist()


def quotas_above(tx: Tx, directory: Ino) -> list[Quota]:
    """Return the quotas that a name in this directory counts for: its own and those of its ancestors."""
    if not tx.quotas_exist():
        return []
    found = []
    ino = directory
    while True:
        quota = tx.quota(ino)
        if quota is not None:
            found.append(quota)
        if ino == ROOT_INO:
            return found
        inode = tx.inode(ino)
        if inode.parent in (0, IN_TRASH):  # a directory in the trash or unlinked and open: under no tree
            return found
        ino = inode.parent


def parents_of(tx: Tx, inode: Inode) -> Iterator[tuple[Ino, int]]:
    """Yield the directories that name an inode, and how many names each has."""
    if inode.parent not in (0, IN_TRASH):
        yield inode.parent, 1
    elif inode.nlink > 1 and not inode.is_dir:
        for link in tx.group(LINK, inode.ino).values():
            yield link.parent, link.names


def check_room(tx: Tx, quotas: list[Quota], *, bytes_more: int, inodes_more: int, volume: bool = True) -> None:
    """Raise OutOfSpace unless this much more fits: EDQUOT for a directory quota, ENOSPC for the volume.

    TenantFull, if only what the volume may use of its tenant's quota is in the way: that may become more.
    """
    if bytes_more <= 0 and inodes_more <= 0:
        return
    form = tx.around.format
    if volume and form.capacity_bytes and bytes_more > 0:
        used = tx.counter(USED_BYTES) + tx.around.reserved_bytes(VOLUME_RESERVATION)
        if used + bytes_more > form.capacity_bytes:
            raise OutOfSpace(E.ENOSPC, "the volume is full")
    if volume and form.max_inodes and inodes_more > 0 and tx.counter(USED_INODES) + inodes_more > form.max_inodes:
        raise OutOfSpace(E.ENOSPC, "the volume has no inodes left")
    for quota in quotas:
        if quota.max_bytes and bytes_more > 0:
            used = quota.used_bytes + tx.around.reserved_bytes(quota.ino)
            if used + bytes_more > quota.max_bytes:
                raise OutOfSpace(E.EDQUOT, "the quota of a directory is used up")
        if quota.max_inodes and inodes_more > 0 and quota.used_inodes + inodes_more > quota.max_inodes:
            raise OutOfSpace(E.EDQUOT, "the inode quota of a directory is used up")
    if volume:
        _check_allowance(tx, bytes_more=max(0, bytes_more), inodes_more=max(0, inodes_more))


def _check_allowance(tx: Tx, *, bytes_more: int, inodes_more: int) -> None:
    most_bytes, most_inodes = tx.around.allowance[:2]
    if (
        most_bytes is not None
        and bytes_more
        and tx.counter(USED_BYTES) + tx.around.reserved_bytes(VOLUME_RESERVATION) + bytes_more > most_bytes
    ) or (most_inodes is not None and inodes_more and tx.counter(USED_INODES) + inodes_more > most_inodes):
        raise TenantFull(bytes_more=bytes_more, inodes_more=inodes_more)


def charge_tree(tx: Tx, directory: Ino, *, bytes_more: int, inodes_more: int) -> None:
    """Add to all quotas that a name in this directory counts for. Nothing is checked."""
    for quota in quotas_above(tx, directory):
        tx.put(
            QUOTA,
            quota._replace(used_bytes=quota.used_bytes + bytes_more, used_inodes=quota.used_inodes + inodes_more),
        )


def charge_volume(tx: Tx, *, bytes_more: int, inodes_more: int) -> None:
    """Add to the counters of the volume."""
    tx.count(USED_BYTES, bytes_more)
    tx.count(USED_INODES, inodes_more)


def room_for_growth(tx: Tx, inode: Inode, bytes_more: int) -> None:
    """Raise OutOfSpace unless a file may grow by this much."""
    if bytes_more <= 0:
        return
    check_room(tx, [], bytes_more=bytes_more, inodes_more=0)
    if tx.quotas_exist():
        for parent, names in parents_of(tx, inode):
            check_room(tx, quotas_above(tx, parent), bytes_more=bytes_more * names, inodes_more=0, volume=False)


def charge_growth(tx: Tx, inode: Inode, bytes_more: int) -> None:
    """Account for a file that grew (or shrank, if negative): volume, directories, quotas. Not checked."""
    if not bytes_more:
        return
    charge_volume(tx, bytes_more=bytes_more, inodes_more=0)
    if inode.parent == IN_TRASH:  # open when it was removed
        tx.count(TRASH_BYTES, bytes_more)
    for parent, names in parents_of(tx, inode):
        directory = tx.inode(parent)
        tx.put(INODE, directory._replace(child_bytes=directory.child_bytes + bytes_more * names))
        charge_tree(tx, parent, bytes_more=bytes_more * names, inodes_more=0)
