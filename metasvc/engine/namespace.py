"""Names: lookup, create, link, unlink, rename. Rules of POSIX as functions on a Tx.

Sources: POSIX.1-2017 (System Interfaces), man 2 rename/unlink/link/mkdir, and the Linux VFS where POSIX leaves
a choice. Permission bits are the kernel's business (see metasvc.api); everything else is here, once.

Invariants: a directory's ``size_bytes`` is its number of entries, its ``nlink`` 2 + subdirectories; a file's
``nlink`` its number of names; ``parent`` of an inode with exactly one name is the directory of it, else 0 and
the Link rows say which directories have how many of its names.
"""

from __future__ import annotations

import errno as E
import stat

from metasvc.engine import accounts, acl, content, trash
from metasvc.engine.dentries import add_name, drop_name
from metasvc.engine.tx import Tx, refuse
from metasvc.model import (
    IN_TRASH,
    LINK_MAX,
    NAME_MAX_BYTES,
    ROOT_INO,
    SYMLINK_MAX_BYTES,
    Caller,
    Dentry,
    Ino,
    Inode,
    Link,
    RenameFlags,
    Xattr,
)
from metasvc.store.tables import CHUNK, DENTRY, INODE, LINK, QUOTA, XATTR

SYMLINK_TARGET = b"\0target"
"""The xattr row that holds a symlink's target. No system call can name it: xattr names have no NUL."""


def check_name(name: bytes) -> None:
    """Refuse what cannot be a name. ENAMETOOLONG, ENOENT (empty), EINVAL (slash or NUL)."""
    if len(name) > NAME_MAX_BYTES:
        refuse(E.ENAMETOOLONG)
    if not name:
        refuse(E.ENOENT)
    if b"/" in name or b"\0" in name:
        refuse(E.EINVAL)


# -- reading ------------------------------------------------------------------------------------------


def lookup(tx: Tx, parent: Ino, name: bytes) -> Inode:
    """Return the inode of a name. ENOENT, ENOTDIR, ENAMETOOLONG."""
    if len(name) > NAME_MAX_BYTES:
        refuse(E.ENAMETOOLONG)
    directory = tx.directory(parent)
    if name == b".":
        return directory
    if name == b"..":
        return tx.inode(directory.parent) if directory.nlink else directory
    dentry = tx.dentry(parent, name)
    if dentry is None:
        refuse(E.ENOENT)
    return tx.inode(dentry.ino)


def resolve(tx: Tx, start: Ino, path: tuple[bytes, ...]) -> list[Inode]:
    """Walk components without following symlinks; the inode of each."""
    found: list[Inode] = []
    ino = start
    for name in path:
        inode = lookup(tx, ino, name)
        found.append(inode)
        ino = inode.ino
    return found


def readlink(tx: Tx, ino: Ino) -> bytes:
    """Return the target of a symlink. EINVAL."""
    if not tx.inode(ino).is_symlink:
        refuse(E.EINVAL)
    row = tx.get(XATTR, (ino, SYMLINK_TARGET))
    return bytes(row.value)


# -- creating -----------------------------------------------------------------------------------------


def make(
    tx: Tx, caller: Caller, parent: Ino, name: bytes, *, mode: int, rdev: int = 0, target: bytes | None = None
) -> Inode:
    """Make an inode with a name: file, directory, symlink or special file."""
    check_name(name)
    if name in (b".", b".."):
        refuse(E.EEXIST)
    tx.require([(INODE, parent), (DENTRY, (parent, name))])
    directory = tx.directory(parent)
    if tx.dentry(parent, name) is not None:
        refuse(E.EEXIST)
    if directory.nlink == 0:
        refuse(E.ENOENT)  # removed, and still somebody's working directory
    is_dir, is_symlink = stat.S_ISDIR(mode), stat.S_ISLNK(mode)
    if is_dir and directory.nlink >= LINK_MAX:
        refuse(E.EMLINK)
    if target is not None and not 0 < len(target) <= SYMLINK_MAX_BYTES:
        refuse(E.ENAMETOOLONG if target else E.ENOENT)
    accounts.check_room(tx, accounts.quotas_above(tx, parent), bytes_more=0, inodes_more=1)

    ino = tx.around.new_ino(tx)
    gid = caller.gid
    if directory.mode & stat.S_ISGID:
        gid = directory.gid
        if is_dir:
            mode |= stat.S_ISGID
    if is_symlink:
        mode = stat.S_IFLNK | 0o777
    else:
        mode = _inherit_acl(tx, directory, ino, mode, umask=caller.umask, is_dir=is_dir)
    inode = Inode(
        ino=ino,
        mode=mode,
        nlink=2 if is_dir else 1,
        uid=caller.uid,
        gid=gid,
        rdev=rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
        size_bytes=len(target) if target is not None else 0,
        atime_ns=tx.now_ns,
        mtime_ns=tx.now_ns,
        ctime_ns=tx.now_ns,
        parent=parent,
        child_bytes=0,
        map_version=0,
        size_epoch=0,
    )
    tx.new_inode(inode)
    if target is not None:
        tx.put(XATTR, Xattr(ino, SYMLINK_TARGET, target))
    add_name(tx, tx.inode(parent), name, inode)
    accounts.charge_volume(tx, bytes_more=0, inodes_more=1)
    return inode


def _inherit_acl(tx: Tx, directory: Inode, ino: Ino, mode: int, *, umask: int, is_dir: bool) -> int:
    default = tx.get(XATTR, (directory.ino, acl.DEFAULT))
    if default is None:
        return mode & ~umask
    entries = acl.parse(default.value)
    access, mode = acl.inherit(entries, mode)
    if not acl.is_minimal(access):
        tx.put(XATTR, Xattr(ino, acl.ACCESS, acl.pack(access)))
    if is_dir:
        tx.put(XATTR, Xattr(ino, acl.DEFAULT, default.value))
    return mode


def link(tx: Tx, ino: Ino, parent: Ino, name: bytes) -> Inode:
    """Give an inode another name. EEXIST, EPERM (directory), EMLINK, ENOENT (no name left), EDQUOT."""
    check_name(name)
    tx.require([(INODE, parent), (INODE, ino), (DENTRY, (parent, name))])
    inode = tx.inode(ino)
    directory = tx.directory(parent)
    if inode.is_dir:
        refuse(E.EPERM)
    if name in (b".", b"..") or tx.dentry(parent, name) is not None:
        refuse(E.EEXIST)
    if inode.nlink == 0 or directory.nlink == 0:
        refuse(E.ENOENT)
    if inode.nlink >= LINK_MAX:
        refuse(E.EMLINK)
    accounts.check_room(
        tx, accounts.quotas_above(tx, parent), bytes_more=inode.space_bytes, inodes_more=1, volume=False
    )
    _link_more(tx, inode, parent)
    inode = inode._replace(nlink=inode.nlink + 1, parent=Ino(0), ctime_ns=tx.ctime_ns(inode))
    tx.put(INODE, inode)
    add_name(tx, tx.inode(parent), name, inode)
    return inode


def _link_more(tx: Tx, inode: Inode, parent: Ino) -> None:
    """Note one more name in a directory, for an inode that has or will have several."""
    if inode.parent:
        tx.put(LINK, Link(inode.ino, inode.parent, 1 + (inode.parent == parent)))
        if inode.parent != parent:
            tx.put(LINK, Link(inode.ino, parent, 1))
        return
    have = tx.get(LINK, (inode.ino, parent))
    tx.put(LINK, Link(inode.ino, parent, (have.names if have else 0) + 1))


def _link_less(tx: Tx, inode: Inode, parent: Ino) -> Inode:
    """Note one name less in a directory; the inode with nlink and parent put right (not stored)."""
    if inode.nlink <= 1:
        return inode._replace(nlink=0, parent=Ino(0))
    links = tx.group(LINK, inode.ino)
    have = links[parent]
    if inode.nlink == 2:
        for other in links:
            tx.delete(LINK, (inode.ino, other))
        remaining = parent if have.names == 2 else next(other for other in links if other != parent)
        return inode._replace(nlink=1, parent=Ino(remaining))
    if have.names == 1:
        tx.delete(LINK, (inode.ino, parent))
    else:
        tx.put(LINK, have._replace(names=have.names - 1))
    return inode._replace(nlink=inode.nlink - 1)


# -- removing -----------------------------------------------------------------------------------------


def _require_for_removal(tx: Tx, dentry: Dentry) -> Inode:
    """Return the inode behind a name, with all rows at hand that its removal may need."""
    ino = dentry.ino
    tx.require([(INODE, ino)], [(XATTR, ino), (CHUNK, ino), (LINK, ino)])
    return tx.inode(ino)


def unlink(tx: Tx, caller: Caller, parent: Ino, name: bytes) -> Inode:
    """Remove a name that is no directory. ENOENT, EISDIR. Returns the inode as it was left."""
    if len(name) > NAME_MAX_BYTES:
        refuse(E.ENAMETOOLONG)
    tx.require([(INODE, parent), (DENTRY, (parent, name))])
    directory = tx.directory(parent)
    if name in (b".", b".."):
        refuse(E.EISDIR)
    dentry = tx.dentry(parent, name)
    if dentry is None:
        refuse(E.ENOENT)
    inode = _require_for_removal(tx, dentry)
    if inode.is_dir:
        refuse(E.EISDIR)
    drop_name(tx, directory, name, inode)
    return _let_go(tx, caller, inode, parent, name)


def _let_go(tx: Tx, caller: Caller, inode: Inode, parent: Ino, name: bytes) -> Inode:
    """Account for a name that an inode just lost: fewer links, or trash, or removal."""
    left = _link_less(tx, inode, parent)._replace(ctime_ns=tx.ctime_ns(inode))
    if left.nlink:
        tx.put(INODE, left)
    elif tx.around.format.trash_days > 0:
        tx.put(INODE, left._replace(parent=IN_TRASH))
        trash.add(tx, caller, left, parent, name)
    else:
        content.remove_or_sustain(tx, left)
    return left


def rmdir(tx: Tx, caller: Caller, parent: Ino, name: bytes) -> Inode:
    """Remove an empty directory. ENOENT, ENOTDIR, ENOTEMPTY, EINVAL, EBUSY (the root)."""
    if len(name) > NAME_MAX_BYTES:
        refuse(E.ENAMETOOLONG)
    tx.require([(INODE, parent), (DENTRY, (parent, name))])
    directory = tx.directory(parent)
    if name == b".":
        refuse(E.EINVAL)
    if name == b"..":
        refuse(E.ENOTEMPTY)
    dentry = tx.dentry(parent, name)
    if dentry is None:
        refuse(E.ENOENT)
    inode = _require_for_removal(tx, dentry)
    if not inode.is_dir:
        refuse(E.ENOTDIR)
    if inode.size_bytes:
        refuse(E.ENOTEMPTY)
    drop_name(tx, directory, name, inode)
    return _let_go_directory(tx, caller, inode, parent, name)


def _let_go_directory(tx: Tx, caller: Caller, inode: Inode, parent: Ino, name: bytes) -> Inode:
    if tx.quota(inode.ino) is not None:
        tx.delete(QUOTA, inode.ino)
    left = inode._replace(nlink=0, parent=Ino(0), ctime_ns=tx.ctime_ns(inode))
    if tx.around.format.trash_days > 0:
        tx.put(INODE, left._replace(parent=IN_TRASH))
        trash.add(tx, caller, left, parent, name)
    else:
        content.remove_or_sustain(tx, left)
    return left


# -- renaming -----------------------------------------------------------------------------------------


def rename(
    tx: Tx, caller: Caller, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, flags: RenameFlags
) -> None:
    """Rename as renameat2(2), with NOREPLACE and EXCHANGE."""
    check_name(name)
    check_name(new_name)
    if flags not in (RenameFlags.NONE, RenameFlags.NOREPLACE, RenameFlags.EXCHANGE):
        refuse(E.EINVAL)
    tx.require([(INODE, parent), (INODE, new_parent), (DENTRY, (parent, name)), (DENTRY, (new_parent, new_name))])
    tx.directory(parent)
    target_dir = tx.directory(new_parent)
    if name in (b".", b"..") or new_name in (b".", b".."):
        refuse(E.EBUSY)
    source = tx.dentry(parent, name)
    if source is None:
        refuse(E.ENOENT)
    existing = tx.dentry(new_parent, new_name)
    victim: Inode | None = None
    if existing is not None and flags & RenameFlags.NOREPLACE:
        refuse(E.EEXIST)
    if existing is None and flags & RenameFlags.EXCHANGE:
        refuse(E.ENOENT)
    if target_dir.nlink == 0:
        refuse(E.ENOENT)
    moved = tx.inode(source.ino)
    if moved.is_dir and _is_below(tx, new_parent, moved.ino):
        refuse(E.EINVAL)
    if flags & RenameFlags.EXCHANGE:
        assert existing is not None
        _exchange(tx, source, existing)
        return
    if existing is not None:
        if existing.ino == source.ino:
            return  # two names of one file: POSIX says nothing happens
        victim = _require_for_removal(tx, existing)
        if victim.is_dir:
            if not moved.is_dir:
                refuse(E.EISDIR)
            if victim.size_bytes:
                refuse(E.ENOTEMPTY)
        elif moved.is_dir:
            refuse(E.ENOTDIR)
    elif moved.is_dir and parent != new_parent and target_dir.nlink >= LINK_MAX:
        refuse(E.EMLINK)
    _check_quota_move(tx, moved, parent, new_parent)

    if victim is not None:
        drop_name(tx, tx.inode(new_parent), new_name, victim)
        if victim.is_dir:
            _let_go_directory(tx, caller, victim, new_parent, new_name)
        else:
            _let_go(tx, caller, victim, new_parent, new_name)
    _move(tx, source, new_parent, new_name)


def _is_below(tx: Tx, ino: Ino, ancestor: Ino) -> bool:
    """Return whether a directory is another one or lies below it."""
    while ino != ancestor:
        if ino in (ROOT_INO, 0, IN_TRASH):
            return False
        ino = tx.inode(ino).parent
    return True


def _check_quota_move(tx: Tx, moved: Inode, parent: Ino, new_parent: Ino) -> None:
    """Refuse what quotas forbid. EXDEV (a directory between quotas, as XFS and ext4 projects), EDQUOT."""
    if parent == new_parent or not tx.quotas_exist():
        return
    before = {quota.ino for quota in accounts.quotas_above(tx, parent)}
    after = accounts.quotas_above(tx, new_parent)
    if moved.is_dir and before != {quota.ino for quota in after}:
        refuse(E.EXDEV, "directories do not move between quotas")
    entered = [quota for quota in after if quota.ino not in before]
    accounts.check_room(tx, entered, bytes_more=moved.space_bytes, inodes_more=1, volume=False)


def _move(tx: Tx, source: Dentry, new_parent: Ino, new_name: bytes) -> None:
    """Move a name to a place that is free."""
    moved = tx.inode(source.ino)
    drop_name(tx, tx.inode(source.parent), source.name, moved)
    add_name(tx, tx.inode(new_parent), new_name, moved)
    _reparent(tx, tx.inode(moved.ino), source.parent, new_parent)


def _reparent(tx: Tx, inode: Inode, parent: Ino, new_parent: Ino) -> None:
    """Write down that one name of an inode went from a directory to another."""
    if inode.parent:
        tx.put(INODE, inode._replace(parent=new_parent, ctime_ns=tx.ctime_ns(inode)))
        return
    if parent != new_parent:
        have = tx.get(LINK, (inode.ino, parent))
        if have.names == 1:
            tx.delete(LINK, (inode.ino, parent))
        else:
            tx.put(LINK, have._replace(names=have.names - 1))
        there = tx.get(LINK, (inode.ino, new_parent))
        tx.put(LINK, Link(inode.ino, new_parent, (there.names if there else 0) + 1))
    tx.put(INODE, inode._replace(ctime_ns=tx.ctime_ns(inode)))


def _exchange(tx: Tx, first: Dentry, second: Dentry) -> None:
    """Swap two names that both exist."""
    if first.ino == second.ino:
        return
    one, two = tx.inode(first.ino), tx.inode(second.ino)
    if two.is_dir and _is_below(tx, first.parent, two.ino):
        refuse(E.EINVAL)
    _check_quota_move(tx, one, first.parent, second.parent)
    _check_quota_move(tx, two, second.parent, first.parent)
    drop_name(tx, tx.inode(first.parent), first.name, one)
    drop_name(tx, tx.inode(second.parent), second.name, two)
    add_name(tx, tx.inode(second.parent), second.name, one)
    add_name(tx, tx.inode(first.parent), first.name, two)
    _reparent(tx, tx.inode(one.ino), first.parent, second.parent)
    _reparent(tx, tx.inode(two.ino), second.parent, first.parent)
