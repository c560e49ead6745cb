"""``trash list``, ``trash restore``, ``trash empty``: removed names that are kept for a while."""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import AsyncIterator
from typing import Final

from client.admin.asking import Asked
from client.admin.paths import full_path
from client.control.messages import JsonObject, text_of
from metasvc.api import MetaClient
from metasvc.api.admin import MetaAdmin
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Ino, Inode, Trashed, TrashId

PAGE: Final = 1000
PATHS_DEPTH_MAX: Final = 4096
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


async def _all_entries(admin: MetaAdmin) -> AsyncIterator[list[Trashed]]:
    after: TrashId | None = None
    while page := await admin.trash_list(after=after, limit=PAGE):
        after = page[-1].trash_id
        yield page


class _Places:
    """Where removed names lay, also those whose directory lies in the trash itself."""

    def __init__(self, admin: MetaAdmin) -> None:
        self._admin = admin
        self._removed: dict[Ino, tuple[Ino, bytes]] = {}
        self._paths: dict[Ino, bytes | None] = {ROOT_INO: b""}

    async def load(self) -> None:
        """Look through the trash twice; only the directories in which something was removed are kept here."""
        parents: set[Ino] = set()
        async for page in _all_entries(self._admin):
            parents.update(entry.parent for entry in page)
        async for page in _all_entries(self._admin):
            self._removed.update((entry.ino, (entry.parent, entry.name)) for entry in page if entry.ino in parents)

    async def directory(self, ino: Ino) -> bytes | None:
        """Return the path of a directory, in the trash or not; None if it is gone for good."""
        names: list[bytes] = []
        at = ino
        while at not in self._paths:
            if at in self._removed and len(names) < PATHS_DEPTH_MAX:
                at, name = self._removed[at]
                names.append(name)
            else:
                paths = await self._admin.paths_of(at, limit=1)
                self._paths[at] = paths[0].rstrip(b"/") if paths else None
        above = self._paths[at]
        found = None if above is None else b"/".join([above, *reversed(names)])
        self._paths[ino] = found
        return found


async def list_trash(asked: Asked) -> JsonObject:
    """List what is in the trash and was removed at or below a directory, oldest first, in pages of 1,000."""
    target = asked.params.target("target")
    asked.params.done()
    below = full_path(asked.volume, target).rstrip(b"/")
    admin = asked.volume.admin
    places = _Places(admin)
    await places.load()
    count = 0
    async for page in _all_entries(admin):
        inodes = await asked.volume.meta.getattr_many([entry.ino for entry in page])
        rows = []
        for entry, inode in zip(page, inodes, strict=True):
            directory = await places.directory(entry.parent)
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
        # None: its directory is gone for good. One that lies in the trash too is brought back first.
        "path": None if path is None else text_of(path),
        "name": text_of(entry.name),
        "type": "unknown" if inode is None else type_name(inode.mode),
        "inode": entry.ino,
        "size_bytes": 0 if inode is None else inode.size_bytes,
        "uid": entry.uid,
        "deleted_ns": entry.deleted_ns,
    }


async def restore(asked: Asked) -> JsonObject:
    """Put entries back under their names, one by one; the first that cannot be is the error, those before it are back.

    With a directory comes back what was removed below it, the newest of each name; what cannot (its name is taken, somebody
    else removed it) stays in the trash and is counted.
    """
    ids = asked.params.integers("trash_ids")
    asked.params.done()
    admin, meta = asked.volume.admin, asked.volume.meta
    # Before anything comes back: an entry that does so with something below it is no error later.
    inos: dict[int, Ino] = {}
    for wanted in ids:
        inos.update((row.trash_id, row.ino) for row in await admin.trash_list(after=TrashId(wanted - 1), limit=1))
    below: dict[Ino, list[tuple[TrashId, Ino]]] | None = None
    restored: list[JsonObject] = []
    done: set[int] = set()
    left = 0
    for wanted in ids:
        waiting = [wanted]
        while waiting:
            trash_id = waiting.pop()
            if trash_id in done:
                continue
            try:
                path = await admin.trash_restore(asked.caller(), TrashId(trash_id))
            except FsError as error:
                inode = await _named(meta, inos.get(trash_id)) if error.errno == errno.ENOENT else None
                if inode is None and trash_id == wanted:
                    raise FsError(error.errno, _remedy(error.errno, trash_id, done=len(restored))) from error
                if inode is None:
                    left += 1
                    continue
            else:
                restored.append({"trash_id": trash_id, "path": text_of(path)})
                await _tell_kernel(asked, path)
                asked.progress("restoring", len(restored), unit="entries")
                inode = await _named(meta, inos.get(trash_id))
            done.add(trash_id)
            if inode is not None and inode.is_dir:
                if below is None:
                    below = await _entries_by_directory(admin)
                # Taken from the end: the newest first.
                waiting += [entry_id for entry_id, _ in below.get(inode.ino, ())]
                inos.update(below.get(inode.ino, ()))
    return {"restored": restored, "left_entries": left}


async def _entries_by_directory(admin: MetaAdmin) -> dict[Ino, list[tuple[TrashId, Ino]]]:
    """Return id and inode of all entries by the directory that they were removed from, oldest first."""
    found: dict[Ino, list[tuple[TrashId, Ino]]] = {}
    async for page in _all_entries(admin):
        for entry in page:
            found.setdefault(entry.parent, []).append((entry.trash_id, entry.ino))
    return found


async def _named(meta: MetaClient, ino: Ino | None) -> Inode | None:
    """Return an inode that has a name again."""
    if ino is None:
        return None
    (inode,) = await meta.getattr_many([ino])
    return inode if inode is not None and inode.nlink > 0 else None


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
