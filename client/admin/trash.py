"""``trash list``, ``trash restore``, ``trash empty``: removed names that are kept for a while."""

from __future__ import annotations

import errno
import stat
import time
from typing import Final

from client.admin.asking import Asked
from client.admin.paths import full_path
from client.control.messages import JsonObject, text_of
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Ino, Inode, Trashed, TrashId

PAGE: Final = 1000
_TYPES: Final = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character-device",
    stat.S_IFBLK: "block-device",
}


def type_name(mode: int) -> str:
    """Return the word for a file type."""
    return _TYPES.get(stat.S_IFMT(mode), "unknown")


async def list_trash(asked: Asked) -> JsonObject:
    """List what is in the trash and was removed at or below a directory, oldest first, in pages of 1,000."""
    target = asked.params.target("target")
    asked.params.done()
    below = full_path(asked.volume, target).rstrip(b"/")
    admin = asked.volume.admin
    directories: dict[Ino, bytes | None] = {}
    after: TrashId | None = None
    count = 0
    while page := await admin.trash_list(after=after, limit=PAGE):
        after = page[-1].trash_id
        inodes = await asked.volume.meta.getattr_many([entry.ino for entry in page])
        rows = []
        for entry, inode in zip(page, inodes, strict=True):
            if entry.parent not in directories:
                paths = await admin.paths_of(entry.parent, limit=1) if entry.parent != ROOT_INO else [b""]
                directories[entry.parent] = paths[0].rstrip(b"/") if paths else None
            directory = directories[entry.parent]
            path = None if directory is None else directory + b"/" + entry.name
            if below and (path is None or not path.startswith(below + b"/")):
                continue
            rows.append(_row(entry, inode, path))
        count += await asked.items("entries", rows)
        asked.progress("listing the trash", count, unit="entries")
    return {"entries": []}


def _row(entry: Trashed, inode: Inode | None, path: bytes | None) -> JsonObject:
    return {
        "trash_id": entry.trash_id,
        # None: its directory lies in the trash too; restoring brings that back first.
        "path": None if path is None else text_of(path),
        "name": text_of(entry.name),
        "type": "unknown" if inode is None else type_name(inode.mode),
        "inode": entry.ino,
        "size_bytes": 0 if inode is None else inode.size_bytes,
        "uid": entry.uid,
        "deleted_ns": entry.deleted_ns,
    }


async def restore(asked: Asked) -> JsonObject:
    """Put entries back under their names, one by one; the first that cannot be is the error, those before it are back."""
    ids = asked.params.integers("trash_ids")
    asked.params.done()
    restored: list[JsonObject] = []
    for trash_id in ids:
        try:
            path = await asked.volume.admin.trash_restore(asked.caller(), TrashId(trash_id))
        except FsError as error:
            raise FsError(error.errno, _remedy(error.errno, trash_id, done=len(restored))) from error
        restored.append({"trash_id": trash_id, "path": text_of(path)})
        await _tell_kernel(asked, path)
    return {"restored": restored}


def _remedy(number: int, trash_id: int, *, done: int) -> str:
    before = f" ({done} restored before it)" if done else ""
    what = f"entry {trash_id} of the trash{before}"
    if number == errno.EEXIST:
        return f"{what}: rename or remove what has its name now"
    if number == errno.ENOENT:
        return f"{what}: look at `atoll trash list`"
    if number in (errno.EPERM, errno.EACCES):
        return f"{what}: ask as the user who removed it, or as root"
    return what


async def _tell_kernel(asked: Asked, path: bytes) -> None:
    """Let the mount's kernel forget that the names of a restored path were absent."""
    mounting = asked.volume.mounting
    if mounting is None:
        return
    parent = ROOT_INO
    for name in path.split(b"/"):
        if name:
            mounting.entry_changed(parent, name)
            parent = (await asked.volume.meta.lookup(parent, name)).ino


async def empty(asked: Asked) -> JsonObject:
    """Remove for good what was removed longer ago than ``older_than_s``. The bytes go with the next garbage collection."""
    older_than_s = asked.params.number("older_than_s") or 0.0
    asked.params.done()
    before_ns = time.time_ns() - int(older_than_s * 1e9)
    removed = 0
    while count := await asked.volume.admin.trash_expire(before_ns=before_ns, limit=PAGE):
        removed += count
        asked.progress("emptying the trash", removed, unit="entries")
    return {"removed_entries": removed}
