"""The cache stays within its limit by giving up what was used longest ago, and never what is in use or not uploaded."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from chunkstore.geometry import KIB, MIB
from chunkstore.images.disk import Disk, Space
from chunkstore.images.image import Image
from chunkstore.slices import ChunkStore, Durability, SliceInfo
from tests.chunkstore.stores import Workshop, content, settled, unavailable, written

T = TypeVar("T")


async def looked(store: ChunkStore) -> None:
    """Let the evictor look at what is there now."""
    await settled(store)
    await store._evictor.look()
    await settled(store)


async def test_it_keeps_to_the_limit_and_gives_up_the_oldest(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, cache_limit_bytes=1 * MIB)
    async with workshop.opened() as store:
        infos = []
        for number in range(1, 31):
            infos.append(await written(store, number, content(64 * KIB, salt=number)))
            await looked(store)
            # The first is used all the time.
            assert await store.read(infos[0], 0, 100) == content(64 * KIB)[:100]
        assert store.stats()["cache_bytes"] <= 1 * MIB
        kept = {int(name.partition("-")[0], 16) for name in workshop.images()}
        assert 10 <= len(kept) <= 16
        assert 1 in kept
        assert kept - {1} == set(range(31 - len(kept) + 1, 31))
        assert workshop.bucket.gets == []
        for number, info in enumerate(infos, start=1):
            assert await store.read(info, 0, info.length) == content(64 * KIB, salt=number)


async def test_a_slice_bigger_than_the_cache_keeps_what_was_read_last(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, cache_limit_bytes=80 * MIB, block_bytes=4 * MIB)
    data = content(100 * MIB)
    async with workshop.opened() as store:
        info = await written(store, 1, data)
        await looked(store)
        assert store.stats()["cache_bytes"] <= 80 * MIB
        store.forget(info.slice_id)
        await settled(store)
        for start in range(0, len(data), 4 * MIB):
            assert await store.read(info, start, start + 4 * MIB) == data[start : start + 4 * MIB]
            await looked(store)
        path = workshop.cache / "images" / workshop.images()[0]
        assert os.stat(path).st_blocks * 512 <= 80 * MIB
        assert store.stats()["cache_bytes"] <= 80 * MIB
        workshop.bucket.gets.clear()
        for start in range(40 * MIB, len(data), 4 * MIB):
            assert await store.read(info, start, start + 4 * MIB) == data[start : start + 4 * MIB]
        assert workshop.bucket.gets == [], "the later blocks are still here"
        assert await store.read(info, 0, 100) == data[:100]
        assert len(workshop.bucket.gets) > 0
    async with workshop.opened() as store:
        for start in range(0, len(data), 10_000_000):
            assert await store.read(info, start, start + 70_000) == data[start : start + 70_000]


async def test_an_image_that_the_kernel_has_had_is_unlinked_never_punched(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=4 * MIB)
    data = content(70 * MIB)
    async with workshop.opened() as store:
        info = await written(store, 1, data)
        await settled(store)
        image = store._cache.opened.get(info.slice_id)
        assert image is not None
        image.is_handed_out = True
        with (workshop.cache / "images" / workshop.images()[0]).open("rb") as file:
            await store._evictor.evict(8 * MIB)
            assert workshop.images() == []
            assert file.read() == data


async def test_staged_slices_are_never_evicted(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, durability=Durability.LOCAL, cache_limit_bytes=2 * MIB)
    workshop.bucket.put_error = unavailable()
    async with workshop.opened() as store:
        infos = [await written(store, number, content(500_000, salt=number)) for number in range(1, 4)]
        await store._evictor.look()
        await store._evictor.evict(1 << 40)
        for number, info in enumerate(infos, start=1):
            assert await store.read(info, 0, 500_000) == content(500_000, salt=number)
        assert len(os.listdir(workshop.cache / "staged")) == 3


class SlowDisk(Disk):
    """Hold reads of images at their beginning until they may go on."""

    def __init__(self) -> None:
        self.may_read = threading.Event()
        self.may_read.set()
        self.reading = threading.Semaphore(0)

    def pread(self, descriptor: int, size_bytes: int, offset: int) -> bytes:
        self.reading.release()
        assert self.may_read.wait(20)
        return super().pread(descriptor, size_bytes, offset)

    def try_pread(self, descriptor: int, buffer: bytearray, offset: int) -> int:
        return -1


async def test_a_read_under_way_gets_its_bytes_whatever_is_evicted(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=4 * MIB)
    data = content(70 * MIB)
    disk = SlowDisk()
    store = ChunkStore(workshop.config, bucket=workshop.bucket, disk=disk)
    async with store:
        info = await written(store, 1, data)
        await settled(store)
        image = store._cache.opened.get(info.slice_id)
        assert image is not None
        disk.may_read.clear()
        while disk.reading.acquire(blocking=False):
            pass
        reading = asyncio.create_task(store.read(info, 0, 4 * MIB))
        await asyncio.to_thread(disk.reading.acquire)
        # Pinned: nothing of it may be punched.
        assert await store._cache.punch(image, [0]) == 0
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert await store._cache.punch(image, [0]) == 0, "the thread goes on although its reader was cancelled"
        reading = asyncio.create_task(store.read(info, 0, 4 * MIB))
        await asyncio.to_thread(disk.reading.acquire)
        # Not even unlinking takes the bytes from it.
        store.forget(info.slice_id)
        disk.may_read.set()
        assert await reading == data[: 4 * MIB]
        await settled(store)
        assert workshop.files() == []


async def test_a_block_fetched_while_it_is_punched_is_not_lost(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=4 * MIB)
    data = content(12 * MIB)
    may_punch, punching = threading.Event(), threading.Event()

    class SlowPunch(Disk):
        def punch(self, descriptor: int, offset: int, size_bytes: int) -> None:
            punching.set()
            assert may_punch.wait(20)
            super().punch(descriptor, offset, size_bytes)

    async with ChunkStore(workshop.config, bucket=workshop.bucket, disk=SlowPunch()) as store:
        info = await written(store, 1, data)
        await settled(store)
        image = store._cache.opened.get(info.slice_id)
        assert image is not None
        evicting = asyncio.create_task(store._cache.punch(image, [1]))
        await asyncio.to_thread(punching.wait, 20)
        assert store.try_read(info, 4 * MIB, 4 * MIB + 10) is None, "not readable from the first step on"
        assert await store.read(info, 4 * MIB, 8 * MIB) == data[4 * MIB : 8 * MIB]
        assert len(workshop.bucket.gets) == 1
        may_punch.set()
        assert await evicting == 4 * MIB
        await settled(store)
        assert await store.read(info, 0, len(data)) == data
        assert len(workshop.bucket.gets) == 1, "kept after the punch"


async def test_a_punch_between_a_write_and_its_marks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seen once as zeros: the thread that wrote the frames had ended, the coroutine that marks them had not resumed.
    workshop = Workshop(tmp_path, block_bytes=4 * MIB)
    data = content(12 * MIB)
    async with workshop.opened() as store:
        info = await written(store, 1, data)
        store.forget(info.slice_id)
        await settled(store)
        start = store._cache.opened.start
        punches: list[asyncio.Task[int]] = []

        def start_and_punch(image: Image, call: Callable[..., T], *args: object) -> asyncio.Future[T]:
            job = start(image, call, *args)
            if call == store._cache._write_frames:
                punch = store._cache.punch
                job.add_done_callback(lambda _: punches.append(asyncio.ensure_future(punch(image, [0, 1, 2]))))
            return job

        monkeypatch.setattr(store._cache.opened, "start", start_and_punch)
        for _ in range(2):
            assert await store.read(info, 0, len(data)) == data
            await asyncio.gather(*punches)
            await settled(store)
        assert len(punches) >= 3


async def test_the_floor_of_free_space_counts_as_well(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    total = 100 * MIB
    used_by_others = 0

    class SmallDisk(Disk):
        def space(self, path: str) -> Space:
            mine = sum(os.stat(os.path.join(path, name)).st_size for name in os.listdir(path))
            return Space(total, total - used_by_others - mine)

    async with ChunkStore(workshop.config, bucket=workshop.bucket, disk=SmallDisk()) as store:
        infos: list[SliceInfo] = [await written(store, n, content(1 * MIB, salt=n)) for n in range(1, 11)]
        await looked(store)
        assert len(workshop.images()) == 10
        assert store.stats()["cache_limit_bytes"] == 80 * MIB
        used_by_others = 85 * MIB
        store._evictor._looked_at = float("-inf")
        await looked(store)
        assert 2 <= len(workshop.images()) <= 5
        for number, info in enumerate(infos, start=1):
            assert await store.read(info, 0, info.length) == content(1 * MIB, salt=number)


async def test_what_an_earlier_process_left_is_counted_and_evicted_first(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        old = [await written(store, number, content(100_000, salt=number)) for number in range(1, 11)]
        big = await written(store, 11, content(5 * MIB))
        await settled(store)
        before = store.stats()["cache_bytes"]
    async with workshop.opened() as store:
        # It may have ended already.
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task.get_name() == "index the cache"))
        assert abs(store.stats()["cache_bytes"] - before) <= 64 * KIB
        new = await written(store, 20, content(100_000, salt=20))
        await settled(store)
        # Used now, so no longer the oldest.
        assert await store.read(old[0], 0, 10) == content(100_000)[:10]
        await store._evictor.evict(9 * 100_000 + 5 * MIB)
        await settled(store)
        kept = {int(name.partition("-")[0], 16) for name in workshop.images()}
        assert kept == {old[0].slice_id, new.slice_id}
        assert big.slice_id not in kept
