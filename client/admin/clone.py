"""``clone``: a copy of a file or tree that shares all its bytes with the original."""

from __future__ import annotations

import errno

from client.address import shown
from client.admin.asking import Asked
from client.admin.paths import find, find_parent
from client.control.messages import JsonObject, text_of
from metasvc.errors import FsError


async def clone(asked: Asked) -> JsonObject:
    """Clone one path to another, which must be free; written data that the mount still holds back go along."""
    source_target = asked.params.target("source")
    target = asked.params.target("target")
    asked.params.done()
    source = await find(asked.volume, source_target)
    parent, name = await find_parent(asked.volume, target)
    path = parent.path.rstrip(b"/") + b"/" + name
    if asked.volume.mounting is not None:
        await asked.volume.mounting.flush()
    asked.progress(f"cloning {shown(source.path)}")
    try:
        usage = await asked.volume.admin.clone(asked.caller(), source.inode.ino, parent.inode.ino, name)
    except FsError as error:
        raise FsError(error.errno, _remedy(error.errno, shown(path))) from error
    if asked.volume.mounting is not None:
        asked.volume.mounting.entry_changed(parent.inode.ino, name)
    return {
        "source": text_of(source.path),
        "path": text_of(path),
        "files": usage.files,
        "directories": usage.directories,
        "size_bytes": usage.size_bytes,
        "space_bytes": usage.space_bytes,
    }


def _remedy(number: int, path: str) -> str:
    if number == errno.EEXIST:
        return f"{path}: choose a name that is free"
    if number == errno.EINVAL:
        return f"{path}: a tree cannot be cloned into itself; choose a place outside of it"
    if number in (errno.EDQUOT, errno.ENOSPC):
        return f"{path}: raise the quota (`atoll quota set`) or remove something"
    return path
