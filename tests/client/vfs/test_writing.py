"""What is written: when it is committed, in what order, what a failure leaves behind, where space runs out."""

from __future__ import annotations

import asyncio
import errno as E
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from chunkstore.errors import BucketUnavailable
from chunkstore.geometry import KIB, MAX_FILE_BYTES
from client.vfs.vfs import Handle
from metasvc.errors import FsError
from metasvc.model import ROOT_INO, SetAttr
from tests.client.vfs.volumes import BLOCK_BYTES, ROOT, SMALL, Place, VfsVolume

GIB = 1 << 30


async def create(volume: VfsVolume, name: bytes = b"file") -> Handle:
    return await volume.vfs.create(ROOT, ROOT_INO, name, mode=0o644, flags=os.O_RDWR | os.O_EXCL)


async def read_all(volume: VfsVolume, fh: int) -> bytes:
    return bytes(await volume.vfs.read(fh, 0, 1 << 30))


def test_closing_a_file_that_was_not_written_commits_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            before = await volume.meta.getattr(handle.inode.ino)
            await volume.vfs.flush(handle.fh)
            await volume.vfs.fsync(handle.fh)
            await volume.vfs.release(handle.fh)
            assert await volume.meta.getattr(handle.inode.ino) == before

    asyncio.run(scenario())


def test_a_file_written_in_small_pieces_is_one_slice_and_one_ref(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            for number in range(150):
                await volume.vfs.write(handle.fh, number * KIB, bytes([number]) * KIB)
            await volume.vfs.flush(handle.fh)
            opened = await volume.meta.read_map(handle.inode.ino, start=0, end=1)
            assert len(opened.refs) == len(opened.slices) == 1
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_bytes_that_are_still_mutable_are_replaced_in_place(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            await volume.vfs.write(handle.fh, 0, b"a" * 10_000)
            await volume.vfs.write(handle.fh, 4000, b"b" * 10)
            await volume.vfs.write(handle.fh, 9990, b"c" * 20)
            await volume.vfs.fsync(handle.fh)
            opened = await volume.meta.read_map(handle.inode.ino, start=0, end=1)
            assert len(opened.refs) == 1
            assert next(iter(opened.slices.values())).length == 10_010
            expected = b"a" * 4000 + b"b" * 10 + b"a" * 5980 + b"c" * 20
            assert await read_all(volume, handle.fh) == expected
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_attributes_show_what_is_written_before_it_is_committed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            ino = handle.inode.ino
            volume.clock.now_s += 5
            await volume.vfs.write(handle.fh, 100, b"x")
            shown = await volume.vfs.getattr(ino)
            assert shown.size_bytes == 101
            assert shown.mtime_ns // 10**9 == int(volume.clock.now_s)
            assert (await volume.vfs.lookup(ROOT_INO, b"file")).size_bytes == 101
            assert (await volume.meta.getattr(ino)).size_bytes == 0
            volume.clock.now_s += 50
            await volume.vfs.flush(handle.fh)
            # A flush is no change that shows.
            assert await volume.vfs.getattr(ino) == shown._replace(map_version=1)
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_a_time_that_was_set_stays_although_data_are_committed_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            await volume.vfs.write(handle.fh, 0, b"x" * 10)
            assert (await volume.vfs.setattr(ROOT, handle.inode.ino, SetAttr(mtime_ns=77))).mtime_ns == 77
            await volume.vfs.flush(handle.fh)
            await volume.vfs.release(handle.fh)
            assert (await volume.vfs.getattr(handle.inode.ino)).mtime_ns == 77

    asyncio.run(scenario())


def test_a_flush_that_fails_keeps_the_data_and_the_next_one_brings_them_home(tmp_path: Path) -> None:
    async def scenario() -> None:
        place = Place(tmp_path)
        data = random.randbytes(3 * BLOCK_BYTES + 5)
        async with place.opened() as volume:
            handle = await create(volume)
            volume.bucket.puts_fail = True
            await volume.vfs.write(handle.fh, 0, data)
            for _ in range(2):
                with pytest.raises(BucketUnavailable) as failed:
                    await volume.vfs.fsync(handle.fh)
                assert failed.value.errno == E.EIO
            assert await read_all(volume, handle.fh) == data
            await volume.vfs.write(handle.fh, 10, b"newer")
            with pytest.raises(BucketUnavailable):
                await volume.vfs.flush(handle.fh)
            assert (await volume.meta.getattr(handle.inode.ino)).size_bytes == 0
            volume.bucket.puts_fail = False
            await volume.vfs.fsync(handle.fh)
            assert (await volume.meta.getattr(handle.inode.ino)).size_bytes == len(data)
            await volume.vfs.release(handle.fh)
        async with place.opened(fresh_cache=True) as volume:
            handle = await volume.vfs.open(ROOT, handle.inode.ino, os.O_RDONLY)
            assert await read_all(volume, handle.fh) == data[:10] + b"newer" + data[15:]
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_data_that_failed_at_the_last_close_are_there_for_the_next_open_and_are_tried_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            volume.bucket.puts_fail = True
            await volume.vfs.write(handle.fh, 0, b"z" * 5000)
            await volume.vfs.release(handle.fh)
            handle = await volume.vfs.open(ROOT, handle.inode.ino, os.O_RDONLY)
            assert handle.inode.size_bytes == 5000
            assert await read_all(volume, handle.fh) == b"z" * 5000
            await volume.vfs.release(handle.fh)
            assert await volume.vfs.getxattr(handle.inode.ino, b"user.atoll.durability") == b"dirty"
            volume.bucket.puts_fail = False
            volume.clock.now_s += 100
            await volume.vfs.flush_due()
            assert await volume.vfs.getxattr(handle.inode.ino, b"user.atoll.durability") == b"object"
            assert not volume.engine.sessions_holding(handle.inode.ino), "the releases that were owed"

    asyncio.run(scenario())


def test_what_is_written_after_close_through_a_mapping_is_committed_at_release(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            await volume.vfs.flush(handle.fh)
            await volume.vfs.write(handle.fh, 0, b"stored through a mapping")
            await volume.vfs.release(handle.fh)
            assert (await volume.meta.getattr(handle.inode.ino)).size_bytes == 24

    asyncio.run(scenario())


def test_the_background_flush_takes_what_is_old_and_leaves_what_is_young(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            old, young = await create(volume, b"old"), await create(volume, b"young")
            await volume.vfs.write(old.fh, 0, b"x")
            volume.clock.now_s += SMALL.flush_age_s
            await volume.vfs.write(young.fh, 0, b"x")
            await volume.vfs.flush_due()
            assert (await volume.meta.getattr(old.inode.ino)).size_bytes == 1
            assert (await volume.meta.getattr(young.inode.ino)).size_bytes == 0
            for handle in (old, young):
                await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_what_is_cut_off_before_it_is_committed_never_reaches_the_bucket(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            await volume.vfs.write(handle.fh, 0, b"x" * (BLOCK_BYTES - 1))
            await volume.vfs.setattr(ROOT, handle.inode.ino, SetAttr(size_bytes=0))
            await volume.vfs.fsync(handle.fh)
            assert volume.bucket.puts == 0
            assert await read_all(volume, handle.fh) == b""
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_opening_with_truncation_drops_what_is_not_committed_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            one = await create(volume)
            await volume.vfs.write(one.fh, 0, b"pending")
            flags = os.O_RDWR | os.O_TRUNC
            two = await volume.vfs.create(ROOT, ROOT_INO, b"file", mode=0o644, flags=flags)
            assert two.inode.size_bytes == 0
            assert await read_all(volume, one.fh) == b""
            await volume.vfs.write(one.fh, 2, b"!")
            three = await volume.vfs.open(ROOT, one.inode.ino, flags)
            assert await read_all(volume, two.fh) == b""
            for handle in (one, two, three):
                await volume.vfs.release(handle.fh)
            assert (await volume.meta.getattr(one.inode.ino)).size_bytes == 0

    asyncio.run(scenario())


def test_handles_of_one_file_see_each_other_and_appends_go_to_the_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            one = await create(volume)
            two = await volume.vfs.open(ROOT, one.inode.ino, os.O_RDWR)

            async def append(fh: int, letter: bytes) -> None:
                for _ in range(100):
                    await volume.vfs.write(fh, None, letter * 700)

            await asyncio.gather(append(one.fh, b"1"), append(two.fh, b"2"))
            content = await read_all(volume, one.fh)
            records = {content[at : at + 700] for at in range(0, len(content), 700)}
            assert records == {b"1" * 700, b"2" * 700}
            assert content.count(b"1") == content.count(b"2") == 70_000
            await volume.vfs.release(one.fh)
            assert await read_all(volume, two.fh) == content
            await volume.vfs.release(two.fh)

    asyncio.run(scenario())


def test_a_file_without_a_name_lives_until_it_is_closed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            await volume.vfs.write(handle.fh, 0, b"before")
            await volume.vfs.unlink(ROOT, ROOT_INO, b"file")
            await volume.vfs.write(handle.fh, 6, b" and after" * 1000)
            await volume.vfs.flush(handle.fh)
            assert (await read_all(volume, handle.fh)).startswith(b"before and after")
            await volume.vfs.release(handle.fh)
            with pytest.raises(FsError):
                await volume.vfs.getattr(handle.inode.ino)

    asyncio.run(scenario())


def test_a_full_volume_is_told_by_write_and_never_first_by_close(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path, format_changes={"capacity_bytes": 256 * KIB}).opened() as volume:
            handle = await create(volume)
            written = 0
            with pytest.raises(FsError) as refused:
                while True:
                    written += await volume.vfs.write(handle.fh, written, b"f" * 10_000)
            assert refused.value.errno == E.ENOSPC
            assert 200_000 < written <= 256 * KIB
            await volume.vfs.flush(handle.fh)
            with pytest.raises(FsError) as refused:
                await volume.vfs.fallocate(ROOT, handle.fh, 0, 0, GIB)
            assert refused.value.errno == E.ENOSPC
            with pytest.raises(FsError) as refused:
                await volume.vfs.setattr(ROOT, handle.inode.ino, SetAttr(size_bytes=GIB))
            assert refused.value.errno == E.ENOSPC
            assert (await volume.vfs.getattr(handle.inode.ino)).size_bytes == written
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_sizes_beyond_the_maximum_are_refused(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            for change in (
                volume.vfs.write(handle.fh, MAX_FILE_BYTES - 1, b"xx"),
                volume.vfs.setattr(ROOT, handle.inode.ino, SetAttr(size_bytes=MAX_FILE_BYTES + 1)),
                volume.vfs.fallocate(ROOT, handle.fh, 0, MAX_FILE_BYTES, 1),
            ):
                with pytest.raises(FsError) as refused:
                    await change
                assert refused.value.errno == E.EFBIG
            await volume.vfs.write(handle.fh, MAX_FILE_BYTES - 1, b"x")
            await volume.vfs.flush(handle.fh)
            assert bytes(await volume.vfs.read(handle.fh, MAX_FILE_BYTES - 2, 10)) == b"\0x"
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_maps_longer_than_a_gibibyte_are_loaded_where_they_are_read(tmp_path: Path) -> None:
    async def scenario() -> None:
        place = Place(tmp_path)
        offsets = [0, GIB - 3, 2 * GIB + 5, 3 * GIB - 1, 5 * GIB]
        async with place.opened() as volume:
            handle = await create(volume)
            for offset in offsets:
                await volume.vfs.write(handle.fh, offset, b"%012d" % offset)
            await volume.vfs.flush(handle.fh)
            for offset in offsets:
                assert bytes(await volume.vfs.read(handle.fh, offset, 12)) == b"%012d" % offset
            await volume.vfs.release(handle.fh)
        async with place.opened() as volume:
            handle = await volume.vfs.open(ROOT, handle.inode.ino, os.O_RDWR)
            for offset in reversed(offsets):
                assert bytes(await volume.vfs.read(handle.fh, offset, 12)) == b"%012d" % offset
            assert bytes(await volume.vfs.read(handle.fh, 4 * GIB, 1000)) == bytes(1000)
            # Written into a page of the map that is not loaded, then read.
            await volume.vfs.release(handle.fh)
            handle = await volume.vfs.open(ROOT, handle.inode.ino, os.O_RDWR)
            await volume.vfs.write(handle.fh, 2 * GIB + 7, b"??")
            await volume.vfs.fsync(handle.fh)
            assert bytes(await volume.vfs.read(handle.fh, 2 * GIB + 5, 12)) == b"00??" + (b"%012d" % (2 * GIB + 5))[4:]
            assert await volume.vfs.lseek(handle.fh, GIB + 100, os.SEEK_DATA) == 2 * GIB + 5
            assert await volume.vfs.lseek(handle.fh, 2 * GIB + 5, os.SEEK_HOLE) == 2 * GIB + 17
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_a_cancelled_fsync_commits_once_and_loses_nothing(tmp_path: Path) -> None:
    """Cancelled at each of its awaits in turn: whatever was under way goes on, the next fsync completes it."""

    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            for turns in range(40):
                handle = await create(volume, b"%d" % turns)
                # Inline, so that most turns hit the commit; every other one over a put.
                data = random.randbytes(500 if turns % 2 else BLOCK_BYTES)
                await volume.vfs.write(handle.fh, 0, data)
                fsync = asyncio.ensure_future(volume.vfs.fsync(handle.fh))
                for _ in range(turns):
                    await asyncio.sleep(0)
                fsync.cancel()
                await asyncio.gather(fsync, return_exceptions=True)
                await volume.vfs.write(handle.fh, 5, b"more")
                await volume.vfs.fsync(handle.fh)
                assert await read_all(volume, handle.fh) == data[:5] + b"more" + data[9:]
                await volume.vfs.release(handle.fh)
                assert (await volume.meta.getattr(handle.inode.ino)).size_bytes == len(data)

    asyncio.run(scenario())


def test_an_fsync_waits_for_a_write_that_waits_for_memory(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            # Three times what writers may hold in memory: the write waits for uploads while fsyncs come.
            data = random.randbytes(12 * BLOCK_BYTES)
            for _ in range(5):
                await asyncio.gather(
                    volume.vfs.write(handle.fh, 0, data[:100]),
                    volume.vfs.write(handle.fh, 100, data[100:]),
                    *(volume.vfs.fsync(handle.fh) for _ in range(3)),
                )
                await volume.vfs.fsync(handle.fh)
                assert await read_all(volume, handle.fh) == data
                await volume.vfs.setattr(ROOT, handle.inode.ino, SetAttr(size_bytes=0))
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_what_another_session_changed_is_seen_after_the_next_commit(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            handle = await create(volume)
            await volume.vfs.write(handle.fh, 0, b"x" * 100)
            await volume.vfs.fsync(handle.fh)
            await volume.meta.punch(ROOT, handle.inode.ino, start=10, end=20)
            await volume.vfs.write(handle.fh, 90, b"y")
            await volume.vfs.fsync(handle.fh)
            expected = b"x" * 10 + bytes(10) + b"x" * 70 + b"y" + b"x" * 9
            assert await read_all(volume, handle.fh) == expected
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_writers_readers_flushes_and_opens_at_once_leave_every_region_as_its_writer_left_it(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    region = 40 * KIB

    async def scenario() -> None:
        place = Place(tmp_path)
        async with place.opened(options=replace(SMALL, slice_max_bytes=100 * KIB)) as volume:
            vfs = volume.vfs
            handle = await create(volume)
            ino = handle.inode.ino
            mirrors = [bytearray(region) for _ in range(6)]
            await vfs.write(handle.fh, 0, bytes(region * len(mirrors)))
            running = len(mirrors)

            async def use_region(number: int) -> None:
                nonlocal running
                mine = await vfs.open(ROOT, ino, os.O_RDWR)
                mirror, base = mirrors[number], number * region
                for _ in range(80):
                    start = rng.randrange(region)
                    end = min(region, start + rng.randrange(1, 9000))
                    if rng.random() < 0.6:
                        data = rng.randbytes(end - start)
                        await vfs.write(mine.fh, base + start, data)
                        mirror[start:end] = data
                    assert bytes(await vfs.read(mine.fh, base + start, end - start)) == mirror[start:end]
                    if rng.random() < 0.1:
                        await vfs.fsync(mine.fh)
                    if rng.random() < 0.1:
                        await vfs.release(mine.fh)
                        mine = await vfs.open(ROOT, ino, os.O_RDWR)
                await vfs.release(mine.fh)
                running -= 1

            async def disturb() -> None:
                while running:
                    volume.clock.now_s += 10
                    await vfs.flush_due()
                    await vfs.setattr(ROOT, ino, SetAttr(mtime_ns=5))
                    await vfs.setattr(ROOT, ino, SetAttr(size_bytes=region * len(mirrors)))
                    if rng.random() < 0.3:
                        volume.bucket.puts_fail = not volume.bucket.puts_fail
                    await asyncio.sleep(0)

            async def go_on(work: int) -> None:
                while True:
                    try:
                        await use_region(work)
                    except BucketUnavailable:
                        # Nothing is lost: the region starts again from what it holds.
                        mirrors[work][:] = await vfs.read(handle.fh, work * region, region)
                    else:
                        return

            async with asyncio.TaskGroup() as group:
                for number in range(len(mirrors)):
                    group.create_task(go_on(number))
                group.create_task(disturb())
            volume.bucket.puts_fail = False
            await vfs.fsync(handle.fh)
            expected = b"".join(bytes(mirror) for mirror in mirrors)
            assert await read_all(volume, handle.fh) == expected
            await vfs.release(handle.fh)
        async with place.opened(fresh_cache=True) as volume:
            handle = await volume.vfs.open(ROOT, ino, os.O_RDONLY)
            assert await read_all(volume, handle.fh) == expected
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())
