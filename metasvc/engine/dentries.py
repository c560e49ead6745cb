"""Adding and dropping a name, with all that a directory counts. Rules on a Tx."""

from __future__ import annotations

import stat

from metasvc.engine import accounts
from metasvc.engine.tx import Tx
from metasvc.model import Dentry, Inode
from metasvc.store.tables import DENTRY, INODE


def add_name(tx: Tx, directory: Inode, name: bytes, inode: Inode) -> None:
    """Insert a dentry and account for it in the directory and its quotas; the inode is not touched."""
    tx.put(DENTRY, Dentry(directory.ino, name, inode.ino, stat.S_IFMT(inode.mode)))
    space = inode.space_bytes
    tx.put(
        INODE,
        directory._replace(
            size_bytes=directory.size_bytes + 1,
            nlink=directory.nlink + inode.is_dir,
            child_bytes=directory.child_bytes + space,
            mtime_ns=tx.now_ns,
            ctime_ns=tx.ctime_ns(directory),
        ),
    )
    accounts.charge_tree(tx, directory.ino, bytes_more=space, inodes_more=1)


def drop_name(tx: Tx, directory: Inode, name: bytes, inode: Inode) -> None:
    """Remove a dentry and its account; the inode is not touched."""
    tx.delete(DENTRY, (directory.ino, name))
    space = inode.space_bytes
    tx.put(
        INODE,
        directory._replace(
            size_bytes=directory.size_bytes - 1,
            nlink=directory.nlink - inode.is_dir,
            child_bytes=directory.child_bytes - space,
            mtime_ns=tx.now_ns,
            ctime_ns=tx.ctime_ns(directory),
        ),
    )
    accounts.charge_tree(tx, directory.ino, bytes_more=-space, inodes_more=-1)
