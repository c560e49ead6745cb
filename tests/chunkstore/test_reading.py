"""What is fetched from the bucket for a read, how often, and what happens when it is not what was written."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from pathlib import Path

import pytest

from chunkstore.block import Codec, header_size
from chunkstore.errors import AtollError, BucketUnavailable, ObjectCorrupt, ObjectMissing
from chunkstore.geometry import FRAME_BYTES, KIB, MIB, SliceId
from chunkstore.images.disk import Disk
from chunkstore.slices import ChunkStore, SliceInfo
from tests.chunkstore.stores import Workshop, content, settled, unavailable, written

DATA = content(5 * MIB)


async def uncached(store: ChunkStore, data: bytes = DATA) -> SliceInfo:
    """Write a slice and forget its image."""
    info = await written(store, 1, data)
    await settled(store)
    store.forget(info.slice_id)
    await settled(store)
    return info


async def test_readers_of_one_block_share_one_request(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store, DATA[:64_000])
        workshop.bucket.open_gets.clear()
        readers = [asyncio.create_task(store.read(info, start, start + 1000)) for start in range(0, 50_000, 1000)]
        await workshop.bucket.until(lambda: workshop.bucket.waiting_gets == 1)
        workshop.bucket.open_gets.set()
        for number, data in enumerate(await asyncio.gather(*readers)):
            assert data == DATA[number * 1000 : number * 1000 + 1000]
        assert len(workshop.bucket.gets) == 1


async def test_a_cancelled_reader_disturbs_no_other_and_what_it_asked_for_is_kept(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store)
        workshop.bucket.open_gets.clear()
        first = asyncio.create_task(store.read(info, 0, MIB))
        second = asyncio.create_task(store.read(info, MIB, 2 * MIB))
        await workshop.bucket.until(lambda: workshop.bucket.waiting_gets == 1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        workshop.bucket.open_gets.set()
        assert await second == DATA[MIB : 2 * MIB]
        await settled(store)
        assert await store.read(info, 0, MIB) == DATA[:MIB]
        assert len(workshop.bucket.gets) == 1


@pytest.mark.parametrize(("codec", "requests"), [("zstd:1", 2), ("none", 2)])
async def test_a_random_read_fetches_the_header_and_its_frames_only(tmp_path: Path, codec: str, requests: int) -> None:
    workshop = Workshop(tmp_path, codec=Codec.parse(codec), block_bytes=4 * MIB)
    async with workshop.opened() as store:
        info = await uncached(store, os.urandom(1) + DATA[1:])
        workshop.bucket.got_bytes = 0
        start = 3 * MIB + 77
        assert await store.read(info, start, start + 4096) == DATA[start : start + 4096]
        assert len(workshop.bucket.gets) == requests
        assert workshop.bucket.got_bytes <= header_size(4 * MIB) + FRAME_BYTES
        await settled(store)
        assert await store.read(info, start + 4096, start + 8192) == DATA[start + 4096 : start + 8192]
        assert len(workshop.bucket.gets) == requests, "the frame is in the image now"


async def test_header_and_frames_of_a_slice_that_was_seen_to_be_raw_are_asked_for_at_once(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=4 * MIB)
    # Two blocks that do not compress, two that do.
    data = os.urandom(8 * MIB) + bytes(8 * MIB)
    async with workshop.opened() as store:
        info = await uncached(store, data)
        assert await store.read(info, MIB, MIB + 4096) == data[MIB : MIB + 4096]
        workshop.bucket.open_gets.clear()
        for start in (5 * MIB, 9 * MIB):
            reader = asyncio.create_task(store.read(info, start, start + 4096))
            await workshop.bucket.until(lambda: workshop.bucket.waiting_gets == 2)
            workshop.bucket.open_gets.set()
            assert await reader == data[start : start + 4096]
            workshop.bucket.open_gets.clear()
        # The guess was wrong for the third block; nothing is guessed of this slice until a block is seen to be raw again.
        reader = asyncio.create_task(store.read(info, 13 * MIB, 13 * MIB + 4096))
        await workshop.bucket.until(lambda: workshop.bucket.waiting_gets >= 1)
        for _ in range(20):
            await asyncio.sleep(0)
        assert workshop.bucket.waiting_gets == 1
        workshop.bucket.open_gets.set()
        assert await reader == data[13 * MIB : 13 * MIB + 4096]


async def test_after_some_pieces_of_a_block_the_rest_comes_at_once(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=4 * MIB)
    async with workshop.opened() as store:
        info = await uncached(store)
        for number in (3, 13, 8, 1, 15, 6):
            start = number * FRAME_BYTES + 100
            assert await store.read(info, start, start + 100) == DATA[start : start + 100]
            await settled(store)
        whole = [get for get in workshop.bucket.gets if get[1:] == (None, None)]
        # One header, a piece each for three reads, then the block.
        assert len(workshop.bucket.gets) == 5
        assert len(whole) == 1


async def test_a_sequential_reader_fetches_each_block_once_and_whole(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store)
        for start in range(0, len(DATA), 128 * KIB):
            end = min(start + 128 * KIB, len(DATA))
            assert (store.try_read(info, start, end) or await store.read(info, start, end)) == DATA[start:end]
        assert [get[1:] for get in workshop.bucket.gets] == [(None, None)] * 3


async def test_a_look_at_the_first_bytes_of_a_big_slice_does_not_fetch_the_block(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store)
        workshop.bucket.got_bytes = 0
        assert await store.read(info, 0, 16 * KIB) == DATA[: 16 * KIB]
        assert workshop.bucket.got_bytes < 2 * FRAME_BYTES


async def test_readers_that_want_different_frames_of_a_block_all_get_theirs(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=4 * MIB)
    async with workshop.opened() as store:
        info = await uncached(store)

        async def read(start: int) -> None:
            assert await store.read(info, start, start + 300_000) == DATA[start : start + 300_000]

        await asyncio.gather(*[read(start) for start in range(0, 4_600_000, 170_003)])


async def test_prefetch_fetches_whole_blocks_and_stays_within_its_memory(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, read_memory_bytes=6 * MIB)
    async with workshop.opened() as store:
        info = await uncached(store)
        workshop.bucket.open_gets.clear()
        # A quarter of the memory is for readers who wait, so there is no room for the third block.
        assert store.prefetch(info, 0, len(DATA)) == 4 * MIB
        await workshop.bucket.until(lambda: workshop.bucket.waiting_gets == 2)
        assert store.stats()["prefetches_dropped_total"] == 1
        workshop.bucket.open_gets.set()
        await settled(store)
        assert await store.read(info, 0, 4 * MIB) == DATA[: 4 * MIB]
        assert len(workshop.bucket.gets) == 2


async def test_a_prefetch_that_fails_is_silent_and_the_reader_asks_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store)
        workshop.bucket.get_error = unavailable()
        store.prefetch(info, 0, len(DATA))
        await settled(store)
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        workshop.bucket.get_error = None
        assert await store.read(info, 0, len(DATA)) == DATA


@pytest.mark.parametrize("length", [64_000, 5 * MIB])
@pytest.mark.parametrize("start", [0, 40_000])
async def test_an_altered_object_is_an_error_that_names_slice_and_object_never_wrong_bytes(
    tmp_path: Path, length: int, start: int
) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store, DATA[:length])
        path = tmp_path / "bucket" / (await workshop.bucket.keys())[0]
        stored = bytearray(path.read_bytes())
        for position in (3, 20, 50, len(stored) // 7):
            altered = bytearray(stored)
            altered[position] ^= 1
            path.write_bytes(altered)
            [data] = await asyncio.gather(store.read(info, start, start + 100), return_exceptions=True)
            if isinstance(data, BaseException):
                assert isinstance(data, AtollError)
                assert "slice 1: object" in str(data)
                assert "1.0" in str(data)
            else:
                assert data == DATA[start : start + 100], "the altered byte was not among those read"
            store.forget(info.slice_id)
            await settled(store)
        path.write_bytes(stored[:-1])
        with pytest.raises(ObjectCorrupt, match=r"slice 1: object .*1\.0"):
            await store.read(info, 0, info.length if info.length < MIB else 2 * MIB)
        path.unlink()
        with pytest.raises(ObjectMissing, match=r"slice 1: .*1\.0"):
            await store.read(info, start, start + 100)


async def test_an_answer_altered_on_the_way_is_asked_for_again(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store)
        answers: Counter[str] = Counter()

        def alter(key: str, data: bytes) -> bytes:
            answers[key] += 1
            return data[:-1] + bytes([data[-1] ^ 1]) if answers[key] < 3 else data

        workshop.bucket.alter = alter
        assert await store.read(info, 0, len(DATA)) == DATA
        assert store.stats()["fetches_corrupt_total"] == 6


async def test_a_bucket_that_is_away_is_an_error_for_all_who_wait_and_forgotten_when_it_is_back(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store)
        workshop.bucket.get_error = unavailable()
        results = await asyncio.gather(*[store.read(info, 0, MIB) for _ in range(5)], return_exceptions=True)
        assert all(isinstance(result, BucketUnavailable) for result in results)
        assert all("slice 1: object" in str(result) for result in results)
        workshop.bucket.get_error = None
        assert await store.read(info, 0, MIB) == DATA[:MIB]
        await settled(store)
        assert store.stats()["read_memory_bytes"] == 0


async def test_a_slice_deleted_while_it_is_fetched_leaves_no_image(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        for length in (64_000, 5 * MIB):
            info = await uncached(store, DATA[:length])
            workshop.bucket.open_gets.clear()
            reading = asyncio.create_task(store.read(info, 0, 10_000))
            await workshop.bucket.until(lambda: workshop.bucket.waiting_gets == 1)
            deleting = asyncio.create_task(store.delete(info.slice_id, info.length))
            workshop.bucket.open_gets.set()
            await deleting
            await asyncio.gather(reading, return_exceptions=True)
            await settled(store)
            assert workshop.files() == []
            assert store.stats()["read_memory_bytes"] == 0


async def test_closing_the_store_ends_a_read_with_an_error_not_with_silence(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store)
        workshop.bucket.open_gets.clear()
        reading = asyncio.create_task(store.read(info, 0, MIB))
        await workshop.bucket.until(lambda: workshop.bucket.waiting_gets == 1)
    with pytest.raises(BucketUnavailable, match="closed"):
        await reading


async def test_images_that_disappear_are_fetched_again(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, max_open_images=0)
    async with workshop.opened() as store:
        small = await written(store, 1, DATA[:64_000])
        big = await written(store, 2, DATA)
        await settled(store)
    for name in workshop.files():
        (workshop.cache / name).unlink()
    async with workshop.opened() as store:
        assert await store.read(small, 0, 64_000) == DATA[:64_000]
        assert await store.read(big, 0, len(DATA)) == DATA


async def test_a_cache_disk_that_fails_is_a_miss(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store)
        # Directories where the files of this image would be: every open of them fails.
        os.mkdir(workshop.cache / "sides" / "1")
        for _ in range(2):
            assert await store.read(info, MIB, 3 * MIB) == DATA[MIB : 3 * MIB]
            await settled(store)
        assert store.stats()["cache_disk_errors_total"] > 0
        assert len(workshop.bucket.gets) == 2, "what no image takes is kept in memory while there is room"
        assert (await store.read(await written(store, 2, DATA), 0, len(DATA))) == DATA


@pytest.mark.parametrize("size", [4 * KIB, 256 * KIB])
async def test_a_block_that_is_read_in_short_pieces_stays_in_the_page_cache(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    drop_pages = Disk.drop_pages

    def drop(disk: Disk, descriptor: int, offset: int, size_bytes: int) -> None:
        dropped.append(size_bytes)
        drop_pages(disk, descriptor, offset, size_bytes)

    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await uncached(store)
        monkeypatch.setattr(Disk, "drop_pages", drop)
        for start in (0, MIB, MIB + 512 * KIB, 512 * KIB):
            assert await store.read(info, start, start + size) == DATA[start : start + size]
            await settled(store)
        if size == 4 * KIB:
            assert dropped == []
            assert store.try_read(info, 700 * KIB, 704 * KIB) == DATA[700 * KIB : 704 * KIB]
        else:
            assert sum(dropped) >= MIB, "the kernel has them as pages of the mounted file"


async def test_a_read_of_bytes_in_the_page_cache_needs_no_task_switch(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        small = await written(store, 1, DATA[:64_000])
        big = await written(store, 2, DATA)
        await settled(store)
    async with workshop.opened() as store:
        for info in (small, big):
            assert store.try_read(info, 10, 20) is None, "not open yet"
            await store.read(info, 10, 20)
            assert store.try_read(info, 10, 20) == DATA[10:20]
            await store.read(info, 0, info.length)
            assert store.try_read(info, 0, info.length) == DATA[: info.length]
        assert store.try_read(SliceInfo(SliceId(99), 10, bytes(16)), 0, 10) is None
