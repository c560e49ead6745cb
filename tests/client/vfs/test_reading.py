"""What is read: fetched ahead, fetched again where a slice was replaced, and never wrong."""

from __future__ import annotations

import asyncio
import errno as E
import os
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from chunkstore.errors import AtollError
from chunkstore.geometry import KIB, MIB
from client.vfs.reading import ReadAhead
from metasvc.model import ROOT_INO, Ino, SliceKind, SliceRef, WrittenSlice
from tests.client.vfs.volumes import BLOCK_BYTES, ROOT, Place, VfsVolume

REQUEST = 128 * KIB
SIZE = 1024 * MIB


def test_sequential_reading_fetches_ahead_in_growing_steps_and_never_twice() -> None:
    ahead = ReadAhead(8 * MIB)
    asked: list[tuple[int, int]] = []
    for start in range(0, 64 * MIB, REQUEST):
        advice = ahead.advise(start, start + REQUEST, SIZE)
        if advice is not None:
            asked.append(advice)
    assert asked[0][0] == REQUEST
    for (_, end), (start, _) in pairwise(asked):
        assert start == end, "without gaps, without overlaps"
    widths = [end - start for start, end in asked]
    assert max(widths) <= 8 * MIB
    assert len(asked) < 64 * MIB / REQUEST / 8, "a few large steps"
    assert asked[-1][1] > 64 * MIB + 3 * MIB


def test_requests_of_one_kernel_read_ahead_may_come_in_any_order() -> None:
    ahead = ReadAhead(8 * MIB)
    covered = 0
    for group in range(0, 32 * MIB, 8 * REQUEST):
        order = list(range(group, group + 8 * REQUEST, REQUEST))
        random.Random(group).shuffle(order)
        for start in order:
            advice = ahead.advise(start, start + REQUEST, SIZE)
            if advice is not None:
                covered = max(covered, advice[1])
    assert covered > 32 * MIB


def test_what_was_advised_and_found_no_room_is_advised_again() -> None:
    ahead = ReadAhead(8 * MIB)
    begun = 0
    for start in range(0, 32 * MIB, REQUEST):
        advice = ahead.advise(start, start + REQUEST, SIZE)
        if advice is not None:
            assert advice[0] == max(begun, start + REQUEST), "nothing between what was begun and this"
            # There is room for a third of what is asked, and now and then for nothing.
            begun = advice[0] + (advice[1] - advice[0]) // 3 if start // REQUEST % 4 else advice[0]
            ahead.stopped(begun)
    assert begun > 32 * MIB


def test_random_reading_fetches_nothing_ahead() -> None:
    ahead = ReadAhead(8 * MIB)
    rng = random.Random(1)
    ahead.advise(SIZE // 2, SIZE // 2 + 4096, SIZE)
    advices = [ahead.advise(start, start + 4096, SIZE) for start in (rng.randrange(SIZE) for _ in range(200))]
    assert sum(advice is not None for advice in advices) <= 4, "only where chance made two neighbours"


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=60), st.integers(1, 48))
def test_advice_lies_behind_what_is_read_within_the_window_and_the_file(
    reads: list[tuple[int, int]], size: int
) -> None:
    ahead = ReadAhead(4 * MIB)
    for start, length in reads:
        if start >= size:
            continue
        end = min(size, start + length) * MIB
        advice = ahead.advise(start * MIB, end, size * MIB)
        if advice is not None:
            assert end <= advice[0] < advice[1] <= min(size * MIB, end + 4 * MIB)


def test_a_window_of_zero_turns_it_off() -> None:
    assert ReadAhead(0).advise(0, REQUEST, SIZE) is None


async def written(volume: VfsVolume, data: bytes) -> Ino:
    handle = await volume.vfs.create(ROOT, ROOT_INO, b"file", mode=0o644, flags=os.O_RDWR)
    await volume.vfs.write(handle.fh, 0, data)
    await volume.vfs.flush(handle.fh)
    await volume.vfs.release(handle.fh)
    return handle.inode.ino


def test_a_slice_that_a_compaction_replaced_under_an_open_file_is_found_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        place = Place(tmp_path)
        data = random.randbytes(2 * BLOCK_BYTES)
        async with place.opened() as volume:
            ino = await written(volume, data)
        async with place.opened(fresh_cache=True) as volume:
            handle = await volume.vfs.open(ROOT, ino, os.O_RDONLY)
            old = await volume.meta.read_map(ino, start=0, end=1)
            writer = volume.chunks.writer((await volume.meta.allocate_slices(1))[0])  # type: ignore[arg-type]
            if (waits := writer.append(data)) is not None:
                await waits
            sealed = await writer.seal()
            refs = (SliceRef(0, sealed.slice_id, 0, sealed.length),)
            compacted = WrittenSlice(sealed.slice_id, sealed.length, SliceKind.BLOCKS, sealed.digests, refs)
            assert await volume.admin.replace_refs(ino, 0, expected=old.refs, written=[compacted])
            for row in old.slices.values():
                await volume.chunks.delete(row.slice_id, row.length)
            assert bytes(await volume.vfs.read(handle.fh, 0, len(data))) == data
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_a_damaged_object_is_an_error_and_one_log_line_and_never_wrong_bytes(tmp_path: Path, damage: str) -> None:
    async def scenario() -> None:
        place = Place(tmp_path)
        data = random.randbytes(3 * BLOCK_BYTES)
        async with place.opened() as volume:
            ino = await written(volume, data)
            victim = volume.objects(tmp_path)[1]
        match damage:
            case "missing":
                victim.unlink()
            case "truncated":
                os.truncate(victim, victim.stat().st_size // 2)
            case _:
                stored = bytearray(victim.read_bytes())
                stored[-100] ^= 1
                victim.write_bytes(stored)
        async with place.opened(fresh_cache=True) as volume:
            handle = await volume.vfs.open(ROOT, ino, os.O_RDONLY)
            key = "/".join(victim.parts[-3:])
            start = int(victim.suffix[1:]) * BLOCK_BYTES
            with capture_logs() as logs, pytest.raises(AtollError) as failed:
                await volume.vfs.read(handle.fh, start, BLOCK_BYTES)
            assert failed.value.errno == E.EIO
            errors = [line for line in logs if line["log_level"] == "error"]
            assert len(errors) == 1
            assert errors[0]["inode"] == ino
            assert errors[0]["volume"] == "test"
            assert key in errors[0]["error"]
            assert "slice" in errors[0]["error"]
            for other in range(3):
                if other * BLOCK_BYTES != start:
                    piece = slice(other * BLOCK_BYTES, (other + 1) * BLOCK_BYTES)
                    assert bytes(await volume.vfs.read(handle.fh, piece.start, BLOCK_BYTES)) == data[piece]
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_an_unreachable_bucket_is_an_error_while_it_lasts(tmp_path: Path) -> None:
    async def scenario() -> None:
        place = Place(tmp_path)
        data = random.randbytes(BLOCK_BYTES)
        async with place.opened() as volume:
            ino = await written(volume, data)
        async with place.opened(fresh_cache=True) as volume:
            handle = await volume.vfs.open(ROOT, ino, os.O_RDONLY)
            volume.bucket.gets_fail = True
            with pytest.raises(AtollError) as failed:
                await volume.vfs.read(handle.fh, 0, 10)
            assert failed.value.errno == E.EIO
            volume.bucket.gets_fail = False
            assert bytes(await volume.vfs.read(handle.fh, 0, BLOCK_BYTES)) == data
            await volume.vfs.release(handle.fh)

    asyncio.run(scenario())


def test_pages_of_a_kernel_are_good_until_something_else_changed_the_file(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            vfs = volume.vfs
            ino = await written(volume, b"x" * 100)

            async def open_and_close() -> bool:
                handle = await vfs.open(ROOT, ino, os.O_RDONLY)
                await vfs.release(handle.fh)
                return handle.keep_cache

            assert await open_and_close(), "written through this kernel"
            assert await open_and_close()
            await volume.meta.punch(ROOT, ino, start=0, end=10)
            assert not await open_and_close(), "changed past it"
            assert await open_and_close()
            vfs.inode_changed(ino)
            assert not await open_and_close(), "said to be changed"

    asyncio.run(scenario())
