"""Work on whole trees, in steps small enough not to hold up others: add up, clone, remove for good.

Each step is one operation of the engine; between steps the volume may change. What each promises is said there.
"""

from __future__ import annotations

import errno as E
import stat
from collections.abc import AsyncIterator

from metasvc.engine import accounts, chunkmap, content, trash
from metasvc.engine.dentries import add_name
from metasvc.engine.engine import Engine
from metasvc.engine.namespace import check_name
from metasvc.engine.tx import Tx, refuse
from metasvc.model import (
    IN_TRASH,
    ROOT_INO,
    Caller,
    Dentry,
    Ino,
    Inode,
    Quota,
    Trashed,
    TrashId,
    Usage,
    unpack_refs,
)
from metasvc.store.tables import CHUNK, DENTRY, INODE, QUOTA, TRASHED, XATTR

PAGE = 1000
CLONE_GRACE_NS = 24 * 3600 * 10**9
"""An unfinished clone expires so much later than other trash: by then whoever made it is gone."""
CLONE_STEP = 50
"""Entries cloned in one operation: an operation of 50 takes about 2 ms of the event loop."""


async def walk(engine: Engine, top: Ino) -> AsyncIterator[tuple[Inode, list[tuple[Dentry, Inode]]]]:
    """Yield pages of the directories of a tree, each directory after the page that names it."""
    directories = [top]
    while directories:
        ino = directories.pop()
        inode: Inode | None = await engine.run(lambda tx, ino=ino: tx.get(INODE, ino))
        if inode is None:
            continue
        after: bytes | None = None
        end = False
        while not end:
            page, end = await engine.rows.scan_dir(ino, after=after, limit=PAGE)
            entries = [(dentry, child) for dentry, child in page if child is not None]
            yield inode, entries
            directories += [dentry.ino for dentry, child in entries if child.is_dir]
            after = page[-1][0].name if page else None


async def usage(engine: Engine, top: Ino) -> Usage:
    """Add up a file, or what lies below a directory (itself counted as a directory)."""
    inode: Inode = await engine.run(Tx.inode, top)
    if not inode.is_dir:
        return Usage(1, 0, inode.size_bytes, inode.space_bytes)
    files = directories = size_bytes = space_bytes = 0
    directories = 1
    async for _, entries in walk(engine, top):
        for _, child in entries:
            if child.is_dir:
                directories += 1
            else:
                files += 1
                size_bytes += child.size_bytes if child.is_file else 0
                space_bytes += child.space_bytes
    return Usage(files, directories, size_bytes, space_bytes)


# -- cloning ------------------------------------------------------------------------------------------


async def clone(engine: Engine, caller: Caller, source: Ino, parent: Ino, name: bytes) -> Usage:
    """Copy a file or tree by sharing its slices. EEXIST, EINVAL (into itself), EDQUOT, ENOSPC.

    The copy grows in the trash, where a crash leaves it to be removed, and moves to its name at the end.
    It shows each directory as it was when its pages were read; the whole is no snapshot of a moving tree.
    """
    check_name(name)
    top: Inode = await engine.run(_clone_begin, caller, source, parent, name)
    trash_id, copy = await engine.run(_clone_top, caller, source, name)
    total = Usage(0 if top.is_dir else 1, 1 if top.is_dir else 0, 0 if top.is_dir else top.size_bytes, top.space_bytes)
    try:
        copies: dict[Ino, Ino] = {source: copy}
        if top.is_dir:
            async for directory, entries in walk(engine, source):
                for first in range(0, len(entries), CLONE_STEP):
                    step = entries[first : first + CLONE_STEP]
                    made: list[tuple[Ino, Inode]] = await engine.run(_clone_entries, copies[directory.ino], step)
                    for original, child in made:
                        if child.is_dir:
                            copies[original] = child.ino
                    total = Usage(
                        total.files + sum(not child.is_dir for _, child in made),
                        total.directories + sum(child.is_dir for _, child in made),
                        total.size_bytes + sum(child.size_bytes for _, child in made if child.is_file),
                        total.space_bytes + sum(child.space_bytes for _, child in made),
                    )
        await engine.run(_clone_end, caller, trash_id, parent, name, total)
    except BaseException:
        if engine.failure is None:
            await expire_tree(engine, trash_id)
        raise
    return total


def _clone_begin(tx: Tx, caller: Caller, source: Ino, parent: Ino, name: bytes) -> Inode:
    inode = tx.inode(source)
    directory = tx.directory(parent)
    if directory.nlink == 0:
        refuse(E.ENOENT)
    if tx.dentry(parent, name) is not None:
        refuse(E.EEXIST)
    ino = parent
    while inode.is_dir:
        if ino == source:
            refuse(E.EINVAL, "a tree cannot be cloned into itself")
        if ino in (ROOT_INO, 0, IN_TRASH):
            break
        ino = tx.inode(ino).parent
    return inode


def _copy_inode(tx: Tx, source: Inode, parent: Ino) -> Inode:
    """Make a copy of an inode with its xattrs and references, with no name yet. ENOSPC."""
    accounts.check_room(tx, [], bytes_more=source.space_bytes, inodes_more=1)
    tx.require([], [(XATTR, source.ino), (CHUNK, source.ino)])
    ino = tx.around.new_ino(tx)
    copy = source._replace(
        ino=ino,
        nlink=2 if source.is_dir else 1,
        parent=parent,
        ctime_ns=tx.now_ns,
        size_bytes=0 if source.is_dir else source.size_bytes,
        child_bytes=0,
        map_version=0,
        size_epoch=0,
    )
    tx.new_inode(copy)
    for xattr in tx.group(XATTR, source.ino).values():
        tx.put(XATTR, xattr._replace(ino=ino))
    delta: dict[int, int] = {}
    for chunk in tx.group(CHUNK, source.ino).values():
        tx.put(CHUNK, chunk._replace(ino=ino))
        chunkmap.count_slices(unpack_refs(chunk.refs), delta, +1)
    content.settle(tx, delta)
    accounts.charge_volume(tx, bytes_more=copy.space_bytes, inodes_more=1)
    return copy


def _clone_top(tx: Tx, caller: Caller, source: Ino, name: bytes) -> tuple[TrashId, Ino]:
    copy = _copy_inode(tx, tx.inode(source), IN_TRASH)
    return trash.add(tx, Caller(), copy, IN_TRASH, name, later_ns=CLONE_GRACE_NS), copy.ino


def _clone_entries(tx: Tx, directory: Ino, entries: list[tuple[Dentry, Inode]]) -> list[tuple[Ino, Inode]]:
    tx.require(
        [
            *((INODE, dentry.ino) for dentry, _ in entries),
            *((DENTRY, (directory, dentry.name)) for dentry, _ in entries),
        ],
        [(table, dentry.ino) for dentry, _ in entries for table in (XATTR, CHUNK)],
    )
    made = []
    for dentry, _ in entries:
        source: Inode | None = tx.get(INODE, dentry.ino)
        if source is None or tx.dentry(directory, dentry.name) is not None:
            continue  # removed since the page was read; or the directory was moved, and met before
        copy = _copy_inode(tx, source, directory)
        parent = tx.inode(directory)
        add_name(tx, parent, dentry.name, copy)
        # add_name is a change of the directory; the copy keeps the times of its original.
        tx.put(INODE, tx.inode(directory)._replace(mtime_ns=parent.mtime_ns))
        made.append((source.ino, copy))
    return made


def _clone_end(tx: Tx, caller: Caller, trash_id: TrashId, parent: Ino, name: bytes, total: Usage) -> None:
    row: Trashed = trash.get(tx, trash_id)
    directory = tx.directory(parent)
    if directory.nlink == 0:
        refuse(E.ENOENT)
    if tx.dentry(parent, name) is not None:
        refuse(E.EEXIST)
    inode = tx.inode(row.ino)
    below = total.files + total.directories - 1
    quotas = accounts.quotas_above(tx, parent)
    accounts.check_room(tx, quotas, bytes_more=total.space_bytes, inodes_more=below + 1, volume=False)
    trash.forget(tx, row, inode)
    tx.put(INODE, inode._replace(parent=parent))
    add_name(tx, directory, name, inode)
    if inode.is_dir:
        accounts.charge_tree(tx, parent, bytes_more=total.space_bytes, inodes_more=below)


# -- removing for good --------------------------------------------------------------------------------


async def expire_tree(engine: Engine, trash_id: TrashId) -> bool:
    """Remove an entry of the trash for good, with what lies below it; False if it was gone already.

    An entry with anything below it is an unfinished clone; its directories are emptied from the bottom. It may be restored, or
    finished, between any two steps: each looks whether it is in the trash still, in the rule that removes something.
    """
    top: Inode | None = await engine.run(_unfinished, trash_id)
    if top is not None:
        directories: list[Ino] = []
        async for directory, _ in walk(engine, top.ino):
            if not directories or directories[-1] != directory.ino:
                directories.append(directory.ino)
        for ino in reversed(directories):
            page, _ = await engine.rows.scan_dir(ino, after=None, limit=PAGE)
            while page:
                if not await engine.run(_remove_names, trash_id, ino, [dentry for dentry, _ in page]):
                    return False
                page, _ = await engine.rows.scan_dir(ino, after=None, limit=PAGE)
    expired: bool = await engine.run(trash.expire, trash_id)
    return expired


def _unfinished(tx: Tx, trash_id: TrashId) -> Inode | None:
    """Return the top of an entry with anything below it; None if there is nothing below, or no such entry."""
    row: Trashed | None = tx.get(TRASHED, trash_id)
    inode: Inode | None = None if row is None else tx.get(INODE, row.ino)
    if inode is None or not inode.is_dir or not inode.size_bytes or inode.parent != IN_TRASH:
        return None
    return inode


def _remove_names(tx: Tx, trash_id: TrashId, directory: Ino, dentries: list[Dentry]) -> bool:
    """Remove names below an entry of the trash for good; False if it is not there any more: then they are somebody's."""
    if tx.get(TRASHED, trash_id) is None:
        return False
    tx.require(
        [(INODE, dentry.ino) for dentry in dentries],
        [(table, dentry.ino) for dentry in dentries for table in (XATTR, CHUNK)],
    )
    for dentry in dentries:
        if tx.dentry(directory, dentry.name) is None:
            continue
        inode: Inode | None = tx.get(INODE, dentry.ino)
        tx.delete(DENTRY, (directory, dentry.name))
        parent = tx.inode(directory)
        space = inode.space_bytes if inode is not None else 0
        is_dir = dentry.type == stat.S_IFDIR
        tx.put(
            INODE,
            parent._replace(
                size_bytes=parent.size_bytes - 1, nlink=parent.nlink - is_dir, child_bytes=parent.child_bytes - space
            ),
        )
        if inode is not None:
            content.remove(tx, inode)
    return True


# -- quotas -------------------------------------------------------------------------------------------


async def count_for_quota(engine: Engine, ino: Ino) -> Usage:
    """Add up what a new quota on a directory uses now. The caller holds back changes."""
    total = await usage(engine, ino)
    return Usage(total.files, total.directories - 1, total.size_bytes, total.space_bytes)


def set_quota(tx: Tx, ino: Ino, max_bytes: int | None, max_inodes: int | None, used: Usage | None) -> None:
    """Put a quota row: new with what is used, or with other limits. ENOENT (the quota was removed at this moment)."""
    tx.directory(ino)
    have = tx.quota(ino)
    if have is None:
        if used is None:
            refuse(E.ENOENT, "the quota was removed at this moment")
        have = Quota(ino, 0, 0, used.space_bytes, used.files + used.directories)
    tx.put(
        QUOTA,
        have._replace(
            max_bytes=have.max_bytes if max_bytes is None else max_bytes,
            max_inodes=have.max_inodes if max_inodes is None else max_inodes,
        ),
    )
