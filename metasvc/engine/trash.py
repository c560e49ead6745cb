"""The trash: removed names whose inodes are kept for a while. Rules on a Tx.

A trashed inode has no name and nlink 0, and exactly one Trashed row. Files lose their last name into it,
directories when they are removed (empty by then, what was in them was trashed before and says so by its
parent). It counts for the volume's usage and for no directory quota.
"""

from __future__ import annotations

import errno as E

from metasvc.engine import accounts, content
from metasvc.engine.dentries import add_name
from metasvc.engine.tx import Tx, refuse
from metasvc.model import Caller, Ino, Inode, Trashed, TrashId
from metasvc.store.tables import CHUNK, INODE, LINK, TRASHED, XATTR

NEXT_TRASH = "next_trash"


def add(tx: Tx, caller: Caller, inode: Inode, parent: Ino, name: bytes, *, later_ns: int = 0) -> TrashId:
    """Put an inode that lost its last name into the trash; if it is open it stays usable.

    ``later_ns`` lets an entry that is still being made expire so much later than one removed now.
    """
    tx.count(NEXT_TRASH, 1)
    trash_id = TrashId(tx.counter(NEXT_TRASH))
    tx.put(TRASHED, Trashed(trash_id, tx.now_ns + later_ns, inode.ino, parent, name, caller.uid))
    tx.count(accounts.TRASH_BYTES, inode.space_bytes)
    tx.count(accounts.TRASH_INODES, 1)
    return trash_id


def get(tx: Tx, trash_id: TrashId) -> Trashed:
    """Return an entry of the trash. ENOENT."""
    row: Trashed | None = tx.get(TRASHED, trash_id)
    if row is None:
        refuse(E.ENOENT, "no such entry in the trash")
    return row


def expire(tx: Tx, trash_id: TrashId) -> bool:
    """Remove an entry and its inode for good; False if the entry is gone already."""
    row: Trashed | None = tx.get(TRASHED, trash_id)
    if row is None:
        return False
    tx.require([(INODE, row.ino)], [(XATTR, row.ino), (CHUNK, row.ino), (LINK, row.ino)])
    inode: Inode | None = tx.get(INODE, row.ino)
    tx.delete(TRASHED, trash_id)
    if inode is not None:
        _uncount(tx, inode)
        content.remove_or_sustain(tx, inode)
    return True


def forget(tx: Tx, row: Trashed, inode: Inode) -> None:
    """Take an entry out of the trash; the caller gives its inode a name."""
    tx.delete(TRASHED, row.trash_id)
    _uncount(tx, inode)


def _uncount(tx: Tx, inode: Inode) -> None:
    tx.count(accounts.TRASH_BYTES, -inode.space_bytes)
    tx.count(accounts.TRASH_INODES, -1)


def restore(tx: Tx, caller: Caller, trash_id: TrashId) -> Inode:
    """Give a trashed inode its name back, in the directory where it was (which must not be in the trash).

    ENOENT (entry or directory gone), EEXIST, EPERM, EDQUOT.
    """
    row = get(tx, trash_id)
    if caller.uid not in (0, row.uid):
        refuse(E.EPERM, "only who removed it, or root, may restore it")
    parent: Inode | None = tx.get(INODE, row.parent)
    if parent is None or parent.nlink == 0:
        refuse(E.ENOENT, "its directory is gone")
    if tx.dentry(row.parent, row.name) is not None:
        refuse(E.EEXIST)
    inode = tx.inode(row.ino)
    accounts.check_room(
        tx,
        accounts.quotas_above(tx, row.parent),
        bytes_more=inode.space_bytes,
        inodes_more=1,
        volume=False,
    )
    forget(tx, row, inode)
    inode = inode._replace(nlink=2 if inode.is_dir else 1, parent=row.parent, ctime_ns=tx.ctime_ns(inode))
    tx.put(INODE, inode)
    add_name(tx, parent, row.name, inode)
    return inode
