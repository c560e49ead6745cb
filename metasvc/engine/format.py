"""The first rows of a new volume."""

from __future__ import annotations

import stat

from metasvc.engine.accounts import USED_INODES
from metasvc.model import FIRST_INO, ROOT_INO, Counter, Inode, VolumeFormat
from metasvc.store.tables import COUNTER, INODE, Batch

NEXT_INO = "next_ino"
NEXT_SLICE = "next_slice"


def first_rows(volume_format: VolumeFormat, *, uid: int = 0, gid: int = 0, mode: int = 0o755) -> Batch:
    """Return the rows that a volume begins with: an empty root directory and its counters."""
    now_ns = volume_format.created_ns
    root = Inode(
        ino=ROOT_INO,
        mode=stat.S_IFDIR | mode,
        nlink=2,
        uid=uid,
        gid=gid,
        rdev=0,
        size_bytes=0,
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        parent=ROOT_INO,
        child_bytes=0,
        map_version=0,
        size_epoch=0,
    )
    counters = [Counter(USED_INODES, 1), Counter(NEXT_INO, FIRST_INO), Counter(NEXT_SLICE, 1)]
    return Batch({INODE: [root], COUNTER: list(counters)}, {})
