"""From a path of a request to an inode.

Owns the walk: component by component, symbolic links followed within the volume only.
"""

from __future__ import annotations

import errno
from typing import Final, NamedTuple

from client.address import components, shown
from client.admin.asking import Target
from client.volume import OpenVolume
from metasvc.errors import FsError
from metasvc.model import NAME_MAX_BYTES, Ino, Inode

MAX_LINKS: Final = 40
"""As Linux."""


class Found(NamedTuple):
    """What a path led to."""

    inode: Inode
    path: bytes
    """Absolute in the volume, free of symbolic links."""


class _At(NamedTuple):
    ino: Ino
    name: bytes


def full_path(volume: OpenVolume, target: Target) -> bytes:
    """Return the path from the volume's root: a mount of a subdirectory counts from there."""
    if target.in_mount and volume.mounting is not None:
        return volume.mounting.subdir.rstrip(b"/") + target.path
    return target.path


async def find(volume: OpenVolume, target: Target) -> Found:
    """Return what a path names. ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG, each with the path in its message."""
    path = full_path(volume, target)
    try:
        return await _walk(volume, path, follow=target.follow)
    except FsError as error:
        raise FsError(error.errno, f"{shown(path)}: check the path in the volume") from error


async def find_parent(volume: OpenVolume, target: Target) -> tuple[Found, bytes]:
    """Return the directory that a path's last name is, or is to be, in, and that name. EINVAL for the root."""
    path = full_path(volume, target)
    *above, name = components(path) or [b""]
    if not name:
        raise FsError(errno.EINVAL, "the root has no name: give a path below it")
    if len(name) > NAME_MAX_BYTES:
        raise FsError(errno.ENAMETOOLONG, f"names have at most {NAME_MAX_BYTES} bytes: choose a shorter one")
    directory = await find(volume, Target(b"/" + b"/".join(above), in_mount=False, follow=True))
    if not directory.inode.is_dir:
        raise FsError(errno.ENOTDIR, f"{shown(directory.path)}: give a path in a directory")
    return directory, name


async def _walk(volume: OpenVolume, path: bytes, *, follow: bool) -> Found:
    meta = volume.meta
    trail: list[_At] = []
    inode = await meta.getattr(meta.root)
    todo = list(reversed(path.split(b"/")))
    links = 0
    while todo:
        name = todo.pop()
        if name in (b"", b"."):
            continue
        if not inode.is_dir:
            raise FsError(errno.ENOTDIR)
        if name == b"..":
            if trail:
                trail.pop()
            inode = await meta.getattr(trail[-1].ino if trail else meta.root)
            continue
        child = await meta.lookup(inode.ino, name)
        if child.is_symlink and (follow or any(part not in (b"", b".") for part in todo)):
            links += 1
            if links > MAX_LINKS:
                raise FsError(errno.ELOOP)
            goal = await meta.readlink(child.ino)
            if goal.startswith(b"/"):
                # On a mount it leads out into the node's own files; here there are none.
                raise FsError(errno.ENOENT, f"symbolic link to {shown(goal)}")
            todo.extend(reversed(goal.split(b"/")))
            continue
        trail.append(_At(child.ino, name))
        inode = child
    return Found(inode, b"/" + b"/".join(at.name for at in trail))
