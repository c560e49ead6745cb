"""How many operations a vfs asks of its service: round trips are what a call costs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from chunkstore.geometry import KIB, MAX_FILE_BYTES
from metasvc.errors import FsError
from metasvc.model import ROOT_INO
from tests.client.vfs.remote import ROOT, Mounted, mounted


async def create(mount: Mounted, name: bytes, data: bytes) -> None:
    """Do what open(O_CREAT), write(2) and close(2) are for a FUSE file system."""
    vfs = mount.vfs
    handle = await vfs.create(ROOT, ROOT_INO, name, mode=0o644, flags=os.O_RDWR)
    with pytest.raises(FsError) as told:
        await vfs.getxattr(handle.inode.ino, b"security.capability")
    assert told.value.errno == errno.ENODATA
    await vfs.write(handle.fh, 0, data)
    await vfs.flush(handle.fh)
    await vfs.release(handle.fh)


async def test_a_small_file_is_three_operations(tmp_path: Path) -> None:
    async with mounted(tmp_path) as mount:
        await create(mount, b"first", b"x")  # takes slice ids
        before = mount.client.connection.requests
        await create(mount, b"second", b"x" * KIB)
        assert mount.client.connection.requests - before == 3, "create, commit, release"


async def test_where_there_is_a_limit_room_is_asked_for(tmp_path: Path) -> None:
    async with mounted(tmp_path, capacity_bytes=64 * KIB) as mount:
        await create(mount, b"first", b"x" * 40 * KIB)
        with pytest.raises(FsError) as told:
            await create(mount, b"second", b"x" * 40 * KIB)
        assert told.value.errno == errno.ENOSPC


async def test_a_capability_that_another_sets_is_seen_after_a_second_at_most(tmp_path: Path) -> None:
    async with mounted(tmp_path) as mount:
        vfs, meta = mount.vfs, mount.client.meta
        handle = await vfs.create(ROOT, ROOT_INO, b"file", mode=0o755, flags=os.O_RDWR)
        ino = handle.inode.ino
        value = b"\1\0\0\2" + bytes(16)
        await vfs.setxattr(ROOT, ino, b"security.capability", value)
        assert await vfs.getxattr(ino, b"security.capability") == value, "its own change is seen at once"
        await vfs.removexattr(ROOT, ino, b"security.capability")
        with pytest.raises(FsError):
            await vfs.getxattr(ino, b"security.capability")
        await meta.setxattr(ROOT, ino, b"security.capability", value, flags=0)
        with pytest.raises(FsError):
            await vfs.getxattr(ino, b"security.capability")
        file = vfs._files.get(ino)
        assert file is not None
        assert file.no_capability_until_s <= vfs._clock.monotonic_s() + vfs.options.attr_timeout_s
        file.no_capability_until_s = vfs._clock.monotonic_s()
        assert await vfs.getxattr(ino, b"security.capability") == value
        await vfs.release(handle.fh)


async def test_only_a_file_that_was_made_is_new(tmp_path: Path) -> None:
    async with mounted(tmp_path) as mount:
        meta = mount.client.meta
        made = await meta.create(ROOT, ROOT_INO, b"file", mode=0o644, exclusive=False)
        again = await meta.create(ROOT, ROOT_INO, b"file", mode=0o644, exclusive=False)
        opened = await meta.open(made.inode.ino)
        assert (made.is_new, again.is_new, opened.is_new) == (True, False, False)
        assert {each.promised_end for each in (made, again, opened)} == {MAX_FILE_BYTES}
        for _ in range(3):
            await meta.release(made.inode.ino)
        await mount.client.admin.quota_set(ROOT_INO, max_bytes=1 << 20, max_inodes=None)
        assert (await meta.open(made.inode.ino)).promised_end == 0
        await meta.release(made.inode.ino)
