"""Slices written, sealed, read and deleted through the facade, on real images and a real directory as bucket."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from chunkstore.errors import BucketUnavailable
from chunkstore.geometry import KIB, MIB, SliceId
from chunkstore.slices import ChunkStore, Durability, SliceInfo
from tests.chunkstore.stores import Workshop, append, content, sealed_slice, settled, unavailable, written

LENGTHS = [
    0,
    1,
    4 * KIB,
    4 * KIB + 1,
    64 * KIB,
    64 * KIB + 1,
    256 * KIB,
    700_001,
    1 * MIB,
    1 * MIB + 1,
    2 * MIB - 1,
    2 * MIB,
    2 * MIB + 1,
    5 * MIB + 77,
]


async def check_everywhere(store: ChunkStore, info: SliceInfo, data: bytes) -> None:
    """Read a slice whole, and in ranges at and across every kind of limit."""
    length = len(data)
    assert await store.read(info, 0, length) == data
    edges = {0, 1, length - 1, length, 64 * KIB, 256 * KIB, MIB, 2 * MIB, 2 * MIB + 256 * KIB, length // 2}
    for start in sorted(edge for edge in edges if edge < length):
        for size in (1, 4096, 256 * KIB + 1):
            end = min(start + size, length)
            got = store.try_read(info, start, end)
            assert got is None or got == data[start:end]
            assert await store.read(info, start, end) == data[start:end]


@pytest.mark.parametrize("durability", list(Durability))
@pytest.mark.parametrize("block_bytes", [64 * KIB, 2 * MIB])
async def test_a_slice_of_any_length_reads_as_written_now_later_and_from_the_bucket(
    tmp_path: Path, durability: Durability, block_bytes: int
) -> None:
    workshop = Workshop(tmp_path, durability=durability, block_bytes=block_bytes)
    kept: list[tuple[SliceInfo, bytes]] = []
    async with workshop.opened() as store:
        for number, length in enumerate(LENGTHS, start=1):
            data = content(length, salt=number)
            writer = store.writer(SliceId(number))
            await append(writer, data)
            assert writer.length == length
            assert await writer.read(0, length) == data
            sealed = await writer.seal()
            assert await writer.read(0, length) == data
            if length <= workshop.config.inline_limit_bytes:
                assert sealed.inline == data
                continue
            kept.append((sealed.info, data))
            await check_everywhere(store, sealed.info, data)
        await store.drain()
        assert not any(store.is_staged(info.slice_id) for info, _ in kept)
    for boot_id in (None, "00000000-0000-0000-0000-000000000007"):
        workshop.bucket.gets.clear()
        async with workshop.opened(boot_id=boot_id) as store:
            for info, data in kept:
                await check_everywhere(store, info, data)
        assert workshop.bucket.gets == [], "what was written here is read from here"
    async with workshop.opened(cache_dir=tmp_path / "empty") as store:
        for info, data in kept:
            await check_everywhere(store, info, data)


async def test_a_short_slice_comes_back_inline_and_makes_neither_object_nor_file(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        assert (await sealed_slice(store, 1, b"")).inline == b""
        sealed = await sealed_slice(store, 2, content(4 * KIB))
        assert sealed.inline == content(4 * KIB)
        assert sealed.digests == b""
        assert store.stats()["write_memory_bytes"] == 0
        await settled(store)
        assert workshop.files() == []
        assert await workshop.bucket.keys() == []


async def test_a_small_slice_costs_one_put_and_its_image_comes_after_the_reply(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await written(store, 1, content(64 * KIB))
        assert len(workshop.bucket.puts) == 1
        assert store.try_read(info, 5, 4096) == content(64 * KIB)[5:4096], "readable before it is written"
        await settled(store)
        assert len(workshop.images()) == 1
        assert workshop.bucket.gets == []


async def test_a_full_block_is_uploaded_before_the_slice_is_sealed(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        await append(writer, content(2 * MIB + 1))
        await workshop.bucket.until(lambda: workshop.bucket.requests["put"] == 1)
        assert writer.mutable_from == 2 * MIB
        await writer.seal()
        assert len(workshop.bucket.puts) == 2


async def test_only_the_last_incomplete_block_can_be_overwritten(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        data = bytearray(content(2 * MIB + 10_000))
        await append(writer, data)
        assert writer.overwrite(2 * MIB + 5, b"changed") is None
        data[2 * MIB + 5 : 2 * MIB + 12] = b"changed"
        for offset, size in ((2 * MIB - 1, 2), (2 * MIB + 9_999, 2), (0, 1)):
            with pytest.raises(ValueError, match="only"):
                writer.overwrite(offset, bytes(size))
        assert await writer.read(0, len(data)) == data
        info = (await writer.seal()).info
        assert await store.read(info, 0, len(data)) == data


async def test_a_sealed_slice_is_frozen_and_seals_again_to_the_same(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        await append(writer, content(10_000))
        sealed = await writer.seal()
        assert writer.is_frozen
        assert await writer.seal() == sealed
        with pytest.raises(RuntimeError):
            writer.append(b"more")
        with pytest.raises(RuntimeError):
            writer.overwrite(0, b"other")


@pytest.mark.parametrize("length", [64 * KIB, 2 * MIB, 5 * MIB + 1])
async def test_a_seal_that_failed_can_be_repeated_and_sends_nothing_twice(tmp_path: Path, length: int) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        writer = store.writer(SliceId(0xABC))
        await append(writer, content(length)[: length // 2])
        # What was full until now arrives; the rest does not.
        await settled(store)
        sent = list(workshop.bucket.puts)
        workshop.bucket.put_error = unavailable()
        await append(writer, content(length)[length // 2 :])
        for _ in range(2):
            with pytest.raises(BucketUnavailable, match=r"slice 2748: object .*/abc\.\d"):
                await writer.seal()
            assert await writer.read(0, length) == content(length)
        workshop.bucket.put_error = None
        info = (await writer.seal()).info
        for key in sent:
            assert workshop.bucket.puts.count(key) == 1
        assert await store.read(info, 0, length) == content(length)
        assert store.stats()["write_memory_bytes"] == 0


async def test_a_cancelled_seal_goes_on_and_the_next_one_finds_its_result(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    workshop.bucket.open_puts.clear()
    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        await append(writer, content(100_000))
        sealing = asyncio.create_task(writer.seal())
        await workshop.bucket.until(lambda: workshop.bucket.waiting_puts == 1)
        sealing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sealing
        workshop.bucket.open_puts.set()
        info = (await writer.seal()).info
        assert len(workshop.bucket.puts) == 1
        assert await store.read(info, 0, 100_000) == content(100_000)


async def test_append_waits_while_memory_for_written_data_is_at_its_bound(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=256 * KIB, write_memory_bytes=1 * MIB)
    workshop.bucket.open_puts.clear()
    data = content(3 * MIB)
    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        appending = asyncio.create_task(append(writer, data, step=64 * KIB))
        await workshop.bucket.until(lambda: workshop.bucket.waiting_puts == 4)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not appending.done()
        assert store.stats()["write_memory_bytes"] <= 1 * MIB
        assert writer.length <= 1 * MIB
        workshop.bucket.open_puts.set()
        await appending
        info = (await writer.seal()).info
        assert await store.read(info, 0, len(data)) == data


async def test_many_idle_tails_go_to_disk_and_stay_writable_and_readable(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=256 * KIB, write_memory_bytes=512 * KIB)
    async with workshop.opened() as store:
        writers = [store.writer(SliceId(number)) for number in range(12)]
        datas = [bytearray(content(300_000, salt=number + 1)) for number in range(12)]
        for start in range(0, 300_000, 50_000):
            for writer, data in zip(writers, datas, strict=True):
                await append(writer, data[start : start + 50_000])
                assert (
                    await writer.read(max(0, start - 70_000), start + 50_000)
                    == (data[max(0, start - 70_000) : start + 50_000])
                )
                assert store.stats()["write_memory_bytes"] <= 512 * KIB
        assert sum(1 for writer in writers if writer._is_spilled) > 3, "the case that is meant"
        for writer, data in zip(writers, datas, strict=True):
            if (wait := writer.overwrite(290_000, b"rewritten")) is not None:
                await wait
            data[290_000:290_009] = b"rewritten"
        for writer, data in zip(writers, datas, strict=True):
            info = (await writer.seal()).info
            assert await store.read(info, 0, 300_000) == data
        assert store.stats()["write_memory_bytes"] == 0


async def test_a_spilled_slice_within_the_inline_limit_is_inline_all_the_same(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, block_bytes=64 * KIB, inline_limit_bytes=32 * KIB, write_memory_bytes=64 * KIB)
    async with workshop.opened() as store:
        hog = store.writer(SliceId(1))
        await append(hog, content(30_000))
        writer = store.writer(SliceId(2))
        await append(writer, content(20_000), step=5_000)
        assert writer._is_spilled
        assert (await writer.seal()).inline == content(20_000)
        await settled(store)
        assert workshop.files() == []


async def test_discard_leaves_neither_objects_nor_files_nor_memory(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        await append(writer, content(5 * MIB))
        await workshop.bucket.until(lambda: workshop.bucket.requests["put"] == 2)
        await writer.discard()
        await writer.discard()
        await settled(store)
        assert await workshop.bucket.keys() == []
        assert store.stats()["write_memory_bytes"] == 0
        with pytest.raises(RuntimeError):
            await writer.seal()
    assert workshop.files() == []


async def test_discard_waits_for_a_put_under_way_before_it_deletes(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    workshop.bucket.open_puts.clear()
    async with workshop.opened() as store:
        writer = store.writer(SliceId(1))
        await append(writer, content(2 * MIB))
        await workshop.bucket.until(lambda: workshop.bucket.waiting_puts == 1)
        await writer.discard()
        for _ in range(20):
            await asyncio.sleep(0)
        assert workshop.bucket.requests["delete"] == 0
        workshop.bucket.open_puts.set()
        await settled(store)
        assert workshop.bucket.requests["delete"] == 1
        assert await workshop.bucket.keys() == []


async def test_delete_removes_objects_and_image(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        small = await written(store, 1, content(50_000))
        big = await written(store, 2, content(5 * MIB))
        other = await written(store, 3, content(50_000))
        await settled(store)
        await store.delete(small.slice_id, small.length)
        await store.delete(big.slice_id, big.length)
        await store.delete(big.slice_id, big.length)
        await settled(store)
        assert len(workshop.files()) == 1
        assert len(await workshop.bucket.keys()) == 1
        assert store.try_read(small, 0, 10) is None
        assert await store.read(other, 0, 50_000) == content(50_000)


async def test_many_deletes_take_one_request_per_thousand_objects(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        slices = [(SliceId(number), 2 * MIB + 1) for number in range(1, 601)]
        await store.delete_many(slices)
        assert workshop.bucket.requests["delete"] == 2


async def test_forget_drops_the_image_and_the_next_read_fetches_it_again(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await written(store, 1, content(5 * MIB))
        store.forget(info.slice_id)
        assert store.try_read(info, 0, 10) is None
        await settled(store)
        assert workshop.files() == []
        assert await store.read(info, 0, 5 * MIB) == content(5 * MIB)
        assert workshop.bucket.requests["get"] == 3


async def test_a_second_store_on_the_same_cache_is_refused_and_names_the_first(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened():
        with pytest.raises(Exception, match=f"in use by process {os.getpid()}") as caught:
            async with workshop.opened():
                pass
        assert getattr(caught.value, "code", None) == "cache-locked"
    async with workshop.opened():
        pass


async def test_open_descriptors_of_images_are_bounded(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, max_open_images=40)
    async with workshop.opened() as store:
        infos = [await written(store, number, content(5_000, salt=number)) for number in range(1, 151)]
        await settled(store)
        before = len(os.listdir("/proc/self/fd"))
        for turn in range(3):

            async def read(infos: list[SliceInfo], turn: int) -> None:
                for info in infos:
                    assert await store.read(info, turn, 5_000) == content(5_000, salt=info.slice_id)[turn:]

            await asyncio.gather(*[read(infos[lane::5], turn) for lane in range(5)])
        await settled(store)
        assert store.stats()["cache_open_descriptors"] <= 40
        assert len(os.listdir("/proc/self/fd")) - before <= 40
        assert workshop.bucket.gets == []


async def test_a_read_beyond_the_slice_is_refused(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path)
    async with workshop.opened() as store:
        info = await written(store, 1, content(5_000))
        store.forget(info.slice_id)
        for start, end in ((0, 5_001), (5_000, 5_000), (-1, 3)):
            with pytest.raises(ValueError, match="slice 1"):
                await store.read(info, start, end)
