"""The mounts of this machine, as the kernel tells them, and which of them are ours.

Owns reading /proc/self/mountinfo (proc(5)) and answering: which volume lies under this path? Must not know volumes.
A mount of ours has the type ``fuse.atoll`` and its volume's address as its source.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

FSTYPE: Final = "fuse.atoll"
MOUNTINFO: Final = "/proc/self/mountinfo"

_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_MOUNT_ID: Final = re.compile(r"^mnt_id:\s*(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    mount_id: int
    mountpoint: str
    root: str
    """The directory of the file system that is mounted here: ``/`` unless it is a bind mount of a part."""
    fstype: str
    source: str
    read_only: bool
    device: str
    """``major:minor``: equal for all mounts of one file system."""

    @property
    def is_ours(self) -> bool:
        return self.fstype == FSTYPE


_UNLISTED: Final = Mount(mount_id=-1, mountpoint="/", root="/", fstype="", source="", read_only=False, device="")


@dataclass(frozen=True, slots=True)
class Place:
    """An existing file, as a mount and a path on it."""

    mount: Mount
    path: bytes
    """Absolute within the mounted file system."""


def _unescape(field: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), field)


def parse_mountinfo(text: str) -> list[Mount]:
    """Return the mounts of a mountinfo, in its order; lines that have another form are left out."""
    mounts = []
    # Not splitlines(): it also splits at characters that names may hold.
    for line in text.split("\n"):
        left, separator, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if not separator or len(before) < 6 or len(after) < 2 or not before[0].isdigit():
            continue
        mounts.append(
            Mount(
                mount_id=int(before[0]),
                mountpoint=_unescape(before[4]),
                root=_unescape(before[3]),
                fstype=_unescape(after[0]),
                source=_unescape(after[1]),
                read_only="ro" in before[5].split(","),
                device=before[2],
            )
        )
    return mounts


def read_mounts() -> list[Mount]:
    """Return the mounts that this process sees. Touches none of them: dead and stuck ones do not block."""
    with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return parse_mountinfo(file.read())


def mounts_at(mountpoint: str, mounts: Sequence[Mount]) -> list[Mount]:
    """Return the mounts exactly at an absolute path; the last one is on top."""
    return [mount for mount in mounts if mount.mountpoint == mountpoint]


def place_of(path: str, *, follow: bool = True) -> Place:
    """Return the mount that an existing path lies on, and its path there; OSError as open(2) gives it.

    The kernel walks the path and says which mount it ended on, so that bind mounts, mounts over mounts and symbolic links
    need no rules here. ``follow`` false takes a symbolic link at the end as itself.
    """
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as info:
            match = _MOUNT_ID.search(info.read())
        real = os.readlink(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    mount_id = int(match[1]) if match else -1
    for mount in read_mounts():
        if mount.mount_id == mount_id:
            return Place(mount, _inner_path(real, mount))
    # In a chroot into a plain directory the kernel does not list the mount that the root lies on. Ours it would list.
    return Place(_UNLISTED, os.fsencode(real))


def _inner_path(real: str, mount: Mount) -> bytes:
    below = os.path.relpath(real, mount.mountpoint)
    return os.fsencode(os.path.normpath(mount.root if below == "." else os.path.join(mount.root, below)))


def is_dead(mountpoint: str) -> bool:
    """Return whether the daemon behind a mount point is gone ("Transport endpoint is not connected")."""
    try:
        # Not stat(): the kernel may answer that from its cache of attributes, dead or not.
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False
