"""A vfs whose session the service has ended: what was written is lost, who wrote it hears of that once, the rest goes on."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from chunkstore.geometry import KIB
from metasvc.errors import FsError
from metasvc.model import ROOT_INO
from metasvc.server.connection import Connection
from tests.client.vfs.remote import ROOT, mounted


@pytest.mark.parametrize("size", [KIB, 200 * KIB])
async def test_each_descriptor_hears_once_of_what_was_lost(tmp_path: Path, size: int) -> None:
    async with mounted(tmp_path) as mount:
        vfs = mount.vfs
        one = await vfs.create(ROOT, ROOT_INO, b"file", mode=0o644, flags=os.O_RDWR)
        await vfs.write(one.fh, 0, b"kept")
        await vfs.fsync(one.fh)
        other = await vfs.open(ROOT, one.inode.ino, os.O_RDWR)
        await vfs.write(one.fh, 4, b"x" * size)
        await mount.lose_session()
        for fh in (one.fh, other.fh):
            with pytest.raises(FsError) as told:
                await vfs.fsync(fh)
            assert told.value.errno == errno.ESTALE
            await vfs.fsync(fh)
        # The file is as it was last committed, for the kernel and for others, and can be written again.
        assert (await vfs.getattr(one.inode.ino)).size_bytes == 4
        assert bytes(await vfs.read(one.fh, 0, 100)) == b"kept"
        later = await vfs.open(ROOT, one.inode.ino, os.O_RDWR)
        await vfs.write(later.fh, 4, b" and more")
        for handle in (later, one, other):
            await vfs.flush(handle.fh)
            await vfs.release(handle.fh)
        assert (await mount.client.meta.getattr(one.inode.ino)).size_bytes == 13
        assert vfs.metrics.lost_bytes == size


async def test_what_is_written_after_the_loss_is_kept(tmp_path: Path) -> None:
    async with mounted(tmp_path) as mount:
        vfs = mount.vfs
        handle = await vfs.create(ROOT, ROOT_INO, b"file", mode=0o644, flags=os.O_RDWR)
        await vfs.write(handle.fh, 0, b"a" * 250 * KIB)
        await mount.lose_session()
        # It begins another slice, in the new session.
        await vfs.write(handle.fh, 250 * KIB, b"b" * 100 * KIB)
        with pytest.raises(FsError):
            await vfs.fsync(handle.fh)
        await vfs.fsync(handle.fh)
        content = bytes(await vfs.read(handle.fh, 0, 1 << 20))
        assert content == bytes(250 * KIB) + b"b" * 100 * KIB
        await vfs.release(handle.fh)


async def test_a_commit_whose_answer_was_lost_with_the_session_keeps_its_objects(tmp_path: Path) -> None:
    async with mounted(tmp_path) as mount:
        vfs, volume = mount.vfs, await mount.volume()
        handle = await vfs.create(ROOT, ROOT_INO, b"file", mode=0o644, flags=os.O_RDWR)
        data = os.urandom(200 * KIB)
        await vfs.write(handle.fh, 0, data)
        outlet = volume.sessions[mount.client.connection.session_id].outlet
        assert isinstance(outlet, Connection)
        outlet.send = lambda message, *, may_wait=False: None  # type: ignore[method-assign]
        flushing = asyncio.create_task(vfs.fsync(handle.fh))
        async with asyncio.timeout(20):
            while (await volume.engine.run(lambda tx: tx.inode(handle.inode.ino))).size_bytes == 0:
                await asyncio.sleep(0.01)
        await mount.lose_session()
        with pytest.raises(FsError):
            await flushing
        # It was there all the time, and nobody took its objects away.
        assert sum(1 for path in mount.objects.rglob("*") if path.is_file()) == 4
        assert bytes(await vfs.read(handle.fh, 0, 1 << 20)) == data
        await vfs.release(handle.fh)
