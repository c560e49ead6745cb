"""One file, written here and by another client: what the second one made of it is seen, at the next open at the latest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client.vfs.vfs import Handle
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, Commit, Ino, Inode, SetAttr, SliceKind, SliceRef, WrittenSlice
from tests.client.vfs.volumes import ROOT, Place, VfsVolume


async def create(volume: VfsVolume, data: bytes = b"0123456789") -> Handle:
    """Make a file of some bytes and leave it open."""
    handle = await volume.vfs.create(ROOT, ROOT_INO, b"file", mode=0o644, flags=os.O_RDWR)
    await volume.vfs.write(handle.fh, 0, data)
    await volume.vfs.flush(handle.fh)
    return handle


async def elsewhere(volume: VfsVolume, ino: Ino, offset: int, data: bytes, *, later_ns: int = 0) -> Inode:
    """Write and close as another client does, whose clock is ahead by this much."""
    (slice_id,) = await volume.meta.allocate_slices(1)
    refs = (SliceRef(offset, slice_id, 0, len(data)),)  # type: ignore[arg-type]
    written = WrittenSlice(slice_id, len(data), SliceKind.INLINE, data, refs)  # type: ignore[arg-type]
    inode = await volume.meta.getattr(ino)
    change = Commit(
        slices=(written,),
        end=offset + len(data),
        size_epoch=inode.size_epoch,
        mtime_ns=volume.clock.wall_ns() + later_ns,
    )
    return await volume.meta.commit(ROOT, ino, change)


async def reopened(volume: VfsVolume, handle: Handle) -> Handle:
    """Close a file and open it again."""
    await volume.vfs.flush(handle.fh)
    await volume.vfs.release(handle.fh)
    return await volume.vfs.open(ROOT, handle.inode.ino, os.O_RDWR)


@pytest.mark.parametrize("own", [1, 2])
async def test_pages_from_before_another_write_are_not_kept_because_of_own_ones(tmp_path: Path, own: int) -> None:
    async with Place(tmp_path).opened() as volume:
        handle = await create(volume)
        handle = await reopened(volume, handle)
        assert handle.keep_cache, "nobody else wrote"
        await elsewhere(volume, handle.inode.ino, 0, b"abc")
        for _ in range(own):
            await volume.vfs.flush(handle.fh)
            await volume.vfs.write(handle.fh, 8, b"XY")
        if own == 1:
            assert bytes(await volume.vfs.read(handle.fh, 0, 10)) == b"01234567XY", (
                "the old bytes are in the kernel now"
            )
        handle = await reopened(volume, handle)
        assert not handle.keep_cache
        assert bytes(await volume.vfs.read(handle.fh, 0, 10)) == b"abc34567XY"
        handle = await reopened(volume, handle)
        assert handle.keep_cache, "what was read since the last open is good"
        await volume.vfs.release(handle.fh)


async def test_pages_are_not_kept_where_another_handle_is_open_meanwhile(tmp_path: Path) -> None:
    async with Place(tmp_path).opened() as volume:
        handle = await create(volume)
        other = await volume.vfs.open(ROOT, handle.inode.ino, os.O_RDWR)
        assert other.keep_cache
        await elsewhere(volume, handle.inode.ino, 0, b"abc")
        await volume.vfs.write(handle.fh, 8, b"XY")
        await volume.vfs.flush(handle.fh)
        third = await volume.vfs.open(ROOT, handle.inode.ino, os.O_RDWR)
        assert not third.keep_cache, "the commit made a version of which the kernel has no pages"
        for each in (handle, other, third):
            await volume.vfs.release(each.fh)


@pytest.mark.parametrize("later_s", [0, -3600])
async def test_older_attributes_of_an_open_file_are_not_shown(tmp_path: Path, later_s: int) -> None:
    async with Place(tmp_path).opened() as volume:
        handle = await create(volume)
        old = await volume.meta.getattr(handle.inode.ino)
        await elsewhere(volume, handle.inode.ino, 10, b"more", later_ns=later_s * 10**9)
        other = await volume.vfs.open(ROOT, handle.inode.ino, os.O_RDONLY)
        shown = volume.vfs._shown(old)
        assert (shown.size_bytes, shown.mtime_ns) == (14, other.inode.mtime_ns)
        await volume.meta.setattr(ROOT, handle.inode.ino, SetAttr(mode=0o600))
        assert volume.vfs._shown(await volume.meta.getattr(handle.inode.ino)).mode & 0o777 == 0o600
        for each in (handle, other):
            await volume.vfs.release(each.fh)


async def test_an_open_beside_unflushed_bytes_sees_what_another_appended(tmp_path: Path) -> None:
    async with Place(tmp_path).opened() as volume:
        handle = await create(volume)
        await volume.vfs.write(handle.fh, 0, b"XYZ")
        await elsewhere(volume, handle.inode.ino, 10, b"more")
        other = await volume.vfs.open(ROOT, handle.inode.ino, os.O_RDWR)
        assert other.inode.size_bytes == 14
        assert bytes(await volume.vfs.read(other.fh, 0, 100)) == b"XYZ3456789more"
        await volume.vfs.write(other.fh, None, b"!")
        await volume.vfs.flush(other.fh)
        assert bytes(await volume.vfs.read(handle.fh, 0, 100)) == b"XYZ3456789more!"
        for each in (handle, other):
            await volume.vfs.release(each.fh)


async def test_a_clock_that_is_ahead_elsewhere_hides_no_later_change(tmp_path: Path) -> None:
    async with Place(tmp_path).opened() as volume:
        handle = await create(volume)
        ino = handle.inode.ino
        ahead = await elsewhere(volume, ino, 0, b"abc", later_ns=3600 * 10**9)
        await volume.vfs.release((await volume.vfs.open(ROOT, ino, os.O_RDONLY)).fh)
        longer = await volume.meta.setattr(ROOT, ino, SetAttr(size_bytes=100))
        assert longer.ctime_ns >= ahead.ctime_ns
        other = await volume.vfs.open(ROOT, ino, os.O_RDONLY)
        assert other.inode.size_bytes == 100
        for each in (handle, other):
            await volume.vfs.release(each.fh)


@pytest.mark.parametrize("was_applied", [True, False])
async def test_what_is_written_after_a_truncate_of_unknown_outcome_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, was_applied: bool
) -> None:
    async with Place(tmp_path).opened() as volume:
        handle = await create(volume)
        await volume.vfs.write(handle.fh, 6, b"before")
        setattr_ = volume.meta.setattr

        async def lost(*arguments: object) -> Inode:
            if was_applied:
                await setattr_(*arguments)  # type: ignore[arg-type]
            raise FsError(5, "the answer was lost")

        with monkeypatch.context() as patch:
            patch.setattr(volume.meta, "setattr", lost)
            with pytest.raises(FsError):
                await volume.vfs.setattr(ROOT, handle.inode.ino, SetAttr(size_bytes=3))
        await volume.vfs.write(handle.fh, 7, b"after")
        await volume.vfs.fsync(handle.fh)
        expected = b"012\0\0\0\0after" if was_applied else b"012345bafter"
        assert bytes(await volume.vfs.read(handle.fh, 0, 100)) == expected
        handle = await reopened(volume, handle)
        assert bytes(await volume.vfs.read(handle.fh, 0, 100)) == expected
        await volume.vfs.release(handle.fh)


async def test_a_slice_whose_commit_may_have_been_made_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(8000)
    async with Place(tmp_path).opened() as volume:
        handle = await create(volume)
        await volume.vfs.write(handle.fh, 0, data)
        commit = volume.meta.commit

        async def lost(*arguments: object) -> Inode:
            await commit(*arguments)  # type: ignore[arg-type]
            raise FsError(5, "the answer was lost")

        with monkeypatch.context() as patch:
            patch.setattr(volume.meta, "commit", lost)
            with pytest.raises(FsError):
                await volume.vfs.fsync(handle.fh)
        await volume.admin.clone(ROOT, handle.inode.ino, ROOT_INO, b"clone")
        await volume.vfs.setattr(ROOT, handle.inode.ino, SetAttr(size_bytes=0))
        clone = await volume.vfs.lookup(ROOT_INO, b"clone")
        found = await volume.meta.read_map(clone.ino, start=0, end=1)
        for slice_id in found.slices:
            volume.chunks.forget(slice_id)
        other = await volume.vfs.open(ROOT, clone.ino, os.O_RDONLY)
        assert bytes(await volume.vfs.read(other.fh, 0, 10_000)) == data
        for each in (handle, other):
            await volume.vfs.release(each.fh)
