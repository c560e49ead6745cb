"""What the vfs makes up itself: `.atoll`, `user.atoll.*`, the root of a subdirectory, a read-only volume."""

from __future__ import annotations

import asyncio
import errno as E
import os
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from client.vfs.accesslog import AccessLog
from client.vfs.vfs import Vfs
from client.vfs.virtual import VirtualFile
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Ino, SetAttr
from tests.client.vfs.volumes import BLOCK_BYTES, INLINE_BYTES, ROOT, SMALL, Place, VfsVolume


async def refused(call: Awaitable[Any]) -> int:
    with pytest.raises(FsError) as error:
        await call
    return error.value.errno


async def names(vfs: Vfs, ino: Ino) -> list[bytes]:
    fh = await vfs.opendir(ino)
    found = [entry.name for _, entry in await vfs.readdir(fh, 0)]
    await vfs.releasedir(fh)
    return found


def test_virtual_files_are_found_by_name_and_not_listed_in_the_root(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            opens = 0

            def content() -> bytes:
                nonlocal opens
                opens += 1
                return b"opened %d times\n" % opens

            files = [VirtualFile(b"stats", content)]
            vfs = Vfs(volume.meta, volume.chunks, log=structlog.get_logger(), options=SMALL, virtual_files=files)
            async with vfs:
                directory = await vfs.lookup(ROOT_INO, b".atoll")
                assert directory.is_dir
                assert directory.ino > 1 << 63
                assert b".atoll" not in await names(vfs, ROOT_INO)
                assert await names(vfs, directory.ino) == [b".", b"..", b"stats", b"accesslog"]
                assert (await vfs.lookup(directory.ino, b"..")).ino == ROOT_INO
                stats = await vfs.lookup(directory.ino, b"stats")
                assert (await vfs.getattr(stats.ino)) == stats
                for number in (b"1", b"2"):
                    handle = await vfs.open(ROOT, stats.ino, os.O_RDONLY)
                    assert handle.direct_io
                    assert await vfs.read(handle.fh, 0, 100) == b"opened " + number + b" times\n"
                    assert await vfs.read(handle.fh, 7, 1) == number
                    await vfs.release(handle.fh)
                assert await refused(vfs.open(ROOT, stats.ino, os.O_WRONLY)) == E.EACCES
                assert await refused(vfs.lookup(directory.ino, b"none")) == E.ENOENT
                assert await refused(vfs.mkdir(ROOT, directory.ino, b"new", mode=0o755)) == E.EPERM
                assert await refused(vfs.unlink(ROOT, directory.ino, b"stats")) == E.EPERM
                assert await refused(vfs.mkdir(ROOT, ROOT_INO, b".atoll", mode=0o755)) == E.EPERM
                assert await refused(vfs.rename(ROOT, ROOT_INO, b".atoll", ROOT_INO, b"b")) == E.EPERM
                assert await refused(vfs.link(ROOT, stats.ino, ROOT_INO, b"b")) == E.EPERM
                assert await refused(vfs.setattr(ROOT, stats.ino, SetAttr(mode=0o777))) == E.EPERM
                assert await refused(vfs.getxattr(stats.ino, b"user.a")) == E.ENODATA
                assert await vfs.listxattr(stats.ino) == []

    asyncio.run(scenario())


def test_the_access_log_has_a_line_for_each_request_while_it_is_read() -> None:
    async def scenario() -> None:
        log = AccessLog()
        reader = log.open()
        for number in range(3):
            log.record("LOOKUP", f"1,{number}", uid=1, gid=2, pid=3, answer="OK", duration_ns=1500)
        lines = (await reader.read(10_000)).decode().splitlines()
        assert len(lines) == 3
        assert lines[2].endswith(" [1,2,3] LOOKUP (1,2): OK <0.000002>")
        log.record("READ", "x" * 100, uid=1, gid=2, pid=3, answer="OK", duration_ns=1)
        assert len(await reader.read(50)) == 50, "a line longer than the read is cut"
        late = asyncio.ensure_future(reader.read(10_000))
        await asyncio.sleep(0)
        log.record("OPEN", "7", uid=1, gid=2, pid=3, answer="OK", duration_ns=1)
        assert b"OPEN (7)" in await late, "a reader that waits is woken"
        reader.close()
        assert not log.readers

    asyncio.run(scenario())


def test_a_reader_of_the_access_log_that_does_not_read_loses_the_oldest_lines_and_is_told() -> None:
    async def scenario() -> None:
        log = AccessLog()
        reader = log.open()
        for number in range(20_000):
            log.record("LOOKUP", f"{number}", uid=0, gid=0, pid=0, answer="OK", duration_ns=1)
        first = (await reader.read(4096)).splitlines()
        assert first[0] == b"# %d lines lost" % (20_000 - 16_384)
        assert b"LOOKUP (3616)" in first[1]

    asyncio.run(scenario())


async def durability(volume: VfsVolume, ino: Ino) -> bytes:
    return await volume.vfs.getxattr(ino, b"user.atoll.durability")


def test_the_durability_of_a_file_is_told_by_an_attribute_that_is_not_listed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            vfs = volume.vfs
            handle = await vfs.create(ROOT, ROOT_INO, b"file", mode=0o644, flags=os.O_RDWR)
            ino = handle.inode.ino
            assert await durability(volume, ino) == b"inline"
            await vfs.write(handle.fh, 0, b"x" * INLINE_BYTES)
            assert await durability(volume, ino) == b"dirty"
            await vfs.fsync(handle.fh)
            assert await durability(volume, ino) == b"inline"
            await vfs.write(handle.fh, 0, b"x" * BLOCK_BYTES)
            await vfs.fsync(handle.fh)
            assert await durability(volume, ino) == b"object"
            await vfs.release(handle.fh)
            assert await durability(volume, ino) == b"object"
            assert await vfs.getxattr(ino, b"user.atoll.inode") == b"%d" % ino
            assert await vfs.getxattr(ino, b"user.atoll.slices") == b"1"
            assert await vfs.listxattr(ino) == []
            for name in (b"user.atoll.durability", b"user.atoll.other"):
                assert await refused(vfs.setxattr(ROOT, ino, name, b"x")) == E.EPERM
                assert await refused(vfs.removexattr(ROOT, ino, name)) == E.EPERM
            assert await refused(vfs.getxattr(ino, b"user.atoll.other")) == E.ENODATA
            assert await refused(vfs.getxattr(ROOT_INO, b"user.atoll.durability")) == E.ENODATA

    asyncio.run(scenario())


def test_a_capability_is_seen_as_soon_as_it_is_set_although_its_absence_was_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            vfs, name = volume.vfs, b"security.capability"
            handle = await vfs.create(ROOT, ROOT_INO, b"file", mode=0o755, flags=os.O_RDWR)
            ino = handle.inode.ino
            for _ in range(2):
                assert await refused(vfs.getxattr(ino, name)) == E.ENODATA
            await vfs.setxattr(ROOT, ino, name, b"cap")
            assert await vfs.getxattr(ino, name) == b"cap"
            await vfs.removexattr(ROOT, ino, name)
            assert await refused(vfs.getxattr(ino, name)) == E.ENODATA
            await vfs.release(handle.fh)

    asyncio.run(scenario())


def test_nothing_above_the_directory_that_is_mounted_can_be_reached_by_name(tmp_path: Path) -> None:
    async def scenario() -> None:
        place = Place(tmp_path)
        async with place.opened() as volume:
            top = await volume.vfs.mkdir(ROOT, ROOT_INO, b"top", mode=0o755)
            sub = await volume.vfs.mkdir(ROOT, top.ino, b"sub", mode=0o755)
        async with place.opened(options=replace(SMALL, root=sub.ino)) as volume:
            vfs = volume.vfs
            assert vfs.root == sub.ino
            assert (await vfs.lookup(vfs.root, b"..")).ino == sub.ino
            fh = await vfs.opendir(vfs.root)
            assert {entry.inode.ino for _, entry in await vfs.readdir(fh, 0)} == {sub.ino}
            assert (await vfs.lookup(vfs.root, b".atoll")).is_dir

    asyncio.run(scenario())


def test_a_read_only_vfs_refuses_every_change(tmp_path: Path) -> None:
    async def scenario() -> None:
        place = Place(tmp_path)
        async with place.opened() as volume:
            handle = await volume.vfs.create(ROOT, ROOT_INO, b"file", mode=0o644, flags=os.O_RDWR)
            await volume.vfs.write(handle.fh, 0, b"content")
            await volume.vfs.release(handle.fh)
        async with place.opened(options=replace(SMALL, read_only=True)) as volume:
            vfs, ino = volume.vfs, handle.inode.ino
            for change in (
                vfs.mkdir(ROOT, ROOT_INO, b"a", mode=0o755),
                vfs.mknod(ROOT, ROOT_INO, b"a", mode=0o100644),
                vfs.symlink(ROOT, ROOT_INO, b"a", b"b"),
                vfs.link(ROOT, ino, ROOT_INO, b"a"),
                vfs.unlink(ROOT, ROOT_INO, b"file"),
                vfs.rmdir(ROOT, ROOT_INO, b"file"),
                vfs.rename(ROOT, ROOT_INO, b"file", ROOT_INO, b"b"),
                vfs.setattr(ROOT, ino, SetAttr(mode=0)),
                vfs.setxattr(ROOT, ino, b"user.a", b""),
                vfs.removexattr(ROOT, ino, b"user.a"),
                vfs.create(ROOT, ROOT_INO, b"b", mode=0o644, flags=os.O_RDWR),
                vfs.open(ROOT, ino, os.O_WRONLY),
                vfs.open(ROOT, ino, os.O_RDONLY | os.O_TRUNC),
            ):
                assert await refused(change) == E.EROFS
            handle = await vfs.open(ROOT, ino, os.O_RDONLY)
            assert bytes(await vfs.read(handle.fh, 0, 100)) == b"content"
            await vfs.release(handle.fh)

    asyncio.run(scenario())


def test_a_volume_without_limits_shows_a_large_number_as_free(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            space = await volume.vfs.statfs()
            assert space.total_bytes - space.used_bytes == 1 << 50
            assert space.total_inodes - space.used_inodes == 1 << 32

    asyncio.run(scenario())
