"""Walking several names in one trip."""

from __future__ import annotations

import errno as E
import os
from pathlib import Path

import pytest

from chunkstore.errors import AtollError
from metasvc.model import ROOT_INO
from tests.client.vfs.volumes import ROOT, Place


async def test_a_walk_answers_every_inode_on_its_way_as_applications_see_them(tmp_path: Path) -> None:
    async with Place(tmp_path).opened() as volume:
        vfs = volume.vfs
        directory = await vfs.mkdir(ROOT, ROOT_INO, b"d", mode=0o755)
        handle = await vfs.create(ROOT, directory.ino, b"file", mode=0o644, flags=os.O_WRONLY)
        await vfs.write(handle.fh, 0, b"not flushed")
        await vfs.symlink(ROOT, ROOT_INO, b"link", b"d")
        found = await vfs.resolve([b"d", b"file"])
        assert [inode.ino for inode in found] == [ROOT_INO, directory.ino, handle.inode.ino]
        assert found[-1].size_bytes == len(b"not flushed")
        assert [inode.ino for inode in await vfs.resolve([])] == [ROOT_INO]
        assert (await vfs.resolve([b"link"]))[-1].is_symlink
        for names, errno in [
            ([b"missing"], E.ENOENT),
            ([b"missing", b"below"], E.ENOENT),
            ([b"d", b"file", b"below"], E.ENOTDIR),
            ([b"link", b"file"], E.ENOTDIR),
            ([b".atoll", b"stats"], E.ENOENT),
        ]:
            with pytest.raises(AtollError) as refused:
                await vfs.resolve(names)
            assert refused.value.errno == errno
        await vfs.release(handle.fh)
