"""Attributes and extended attributes: chmod, chown, utimens, truncate, xattrs, ACLs. Rules on a Tx."""

from __future__ import annotations

import errno as E
import stat
from typing import Final

from metasvc.engine import acl, content
from metasvc.engine.namespace import SYMLINK_TARGET
from metasvc.engine.tx import Tx, refuse
from metasvc.model import XATTR_NAME_MAX_BYTES, XATTR_VALUE_MAX_BYTES, Caller, Ino, Inode, SetAttr, Xattr
from metasvc.store.tables import INODE, XATTR

XATTR_CREATE: Final = 1
XATTR_REPLACE: Final = 2
_NAMESPACES: Final = (b"user.", b"trusted.", b"security.")
_ACLS: Final = (acl.ACCESS, acl.DEFAULT)


def setattr(tx: Tx, caller: Caller, ino: Ino, changes: SetAttr) -> Inode:  # noqa: A001 - the name of the system call
    """Change attributes. ENOENT, EISDIR/EINVAL (length of no file), EFBIG, EDQUOT, ENOSPC."""
    inode = tx.inode(ino)
    mtime_ns = inode.mtime_ns
    mode = inode.mode
    if changes.size_bytes is not None:
        inode = content.regular(tx, ino)
        if changes.size_bytes != inode.size_bytes:
            inode = content.resize(tx, inode, changes.size_bytes)
        mtime_ns = tx.now_ns
        if caller.uid:
            mode = content.without_setid(mode)
    owner_changes = changes.uid is not None or changes.gid is not None
    if owner_changes and changes.mode is None and not inode.is_dir:
        mode = content.without_setid(mode)
    if changes.mode is not None:
        mode = stat.S_IFMT(mode) | (changes.mode & 0o7777)
        _chmod_acl(tx, ino, mode)
    if changes.mtime_now:
        mtime_ns = tx.now_ns
    elif changes.mtime_ns is not None:
        mtime_ns = changes.mtime_ns
    atime_ns = inode.atime_ns
    if changes.atime_now:
        atime_ns = tx.now_ns
    elif changes.atime_ns is not None:
        atime_ns = changes.atime_ns
    inode = inode._replace(
        mode=mode,
        uid=inode.uid if changes.uid is None else changes.uid,
        gid=inode.gid if changes.gid is None else changes.gid,
        atime_ns=atime_ns,
        mtime_ns=mtime_ns,
        ctime_ns=tx.ctime_ns(inode),
    )
    tx.put(INODE, inode)
    return inode


def _chmod_acl(tx: Tx, ino: Ino, mode: int) -> None:
    row: Xattr | None = tx.get(XATTR, (ino, acl.ACCESS))
    if row is not None:
        tx.put(XATTR, row._replace(value=acl.pack(acl.chmod(acl.parse(row.value), mode))))


def getxattr(tx: Tx, ino: Ino, name: bytes) -> bytes:
    """Return a value. ENODATA, ENOENT."""
    tx.require([(INODE, ino)], [(XATTR, ino)])
    tx.inode(ino)
    row = tx.get(XATTR, (ino, name))
    if row is None:
        refuse(E.ENODATA)
    return bytes(row.value)


def listxattr(tx: Tx, ino: Ino) -> list[bytes]:
    """Return the names of all attributes, sorted."""
    tx.require([(INODE, ino)], [(XATTR, ino)])
    tx.inode(ino)
    return sorted(name for name in tx.group(XATTR, ino) if name != SYMLINK_TARGET)


def setxattr(tx: Tx, ino: Ino, name: bytes, value: bytes, flags: int) -> None:
    """Set a value. EEXIST, ENODATA, ERANGE, E2BIG, EOPNOTSUPP, EINVAL; EPERM for user.* of no file or directory."""
    inode = tx.inode(ino)
    if not name or len(name) > XATTR_NAME_MAX_BYTES or b"\0" in name:
        refuse(E.ERANGE)
    if len(value) > XATTR_VALUE_MAX_BYTES:
        refuse(E.E2BIG)
    if name not in _ACLS and not name.startswith(_NAMESPACES):
        refuse(E.EOPNOTSUPP)
    if name.startswith(b"user.") and not (inode.is_file or inode.is_dir):
        refuse(E.EPERM)
    row = tx.get(XATTR, (ino, name))
    if flags & XATTR_CREATE and row is not None:
        refuse(E.EEXIST)
    if flags & XATTR_REPLACE and row is None:
        refuse(E.ENODATA)
    mode = inode.mode
    if name in _ACLS:
        entries = acl.parse(value)
        if name == acl.DEFAULT and not inode.is_dir:
            refuse(E.EACCES)
        if inode.is_symlink:
            refuse(E.EOPNOTSUPP)
        if name == acl.ACCESS and entries:
            mode = mode & ~0o777 | acl.mode_of(entries)
        if not entries or (name == acl.ACCESS and acl.is_minimal(entries)):
            tx.delete(XATTR, (ino, name))
        else:
            tx.put(XATTR, Xattr(ino, name, acl.pack(entries)))
    else:
        tx.put(XATTR, Xattr(ino, name, value))
    tx.put(INODE, inode._replace(mode=mode, ctime_ns=tx.ctime_ns(inode)))


def removexattr(tx: Tx, ino: Ino, name: bytes) -> None:
    """Remove an attribute. ENODATA."""
    inode = tx.inode(ino)
    if tx.get(XATTR, (ino, name)) is None or name == SYMLINK_TARGET:
        refuse(E.ENODATA)
    tx.delete(XATTR, (ino, name))
    tx.put(INODE, inode._replace(ctime_ns=tx.ctime_ns(inode)))
