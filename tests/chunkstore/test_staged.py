"""Durability `local`: sealed here, uploaded later, also by the next process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from chunkstore.errors import BucketUnavailable
from chunkstore.geometry import KIB, MIB
from chunkstore.slices import ChunkStore, Durability, SliceInfo
from tests.chunkstore.stores import OTHER_BOOT, Workshop, content, sealed_slice, settled, unavailable, written

LENGTHS = [5 * KIB, 64 * KIB, 1 * MIB + 1, 2 * MIB, 5 * MIB + 3]


async def staged_slices(store: ChunkStore) -> list[tuple[SliceInfo, bytes]]:
    """Write a slice of each length."""
    found = []
    for number, length in enumerate(LENGTHS, start=1):
        data = content(length, salt=number)
        found.append((await written(store, number, data), data))
    return found


async def test_a_seal_returns_without_the_bucket_and_drain_brings_all_there(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, durability=Durability.LOCAL)
    workshop.bucket.open_puts.clear()
    async with workshop.opened() as store:
        slices = await staged_slices(store)
        assert await workshop.bucket.keys() == []
        assert store.pending_bytes == sum(LENGTHS)
        for info, data in slices:
            assert store.is_staged(info.slice_id)
            assert await store.read(info, 0, info.length) == data
        seen: list[int] = []
        workshop.bucket.open_puts.set()
        await store.drain(progress=seen.append, timeout_s=30)
        assert store.pending_bytes == 0
        assert seen[-1] == 0
        assert seen == sorted(seen, reverse=True)
        await settled(store)
        assert len(workshop.images()) == len(LENGTHS), "the staged image is the cached one now"
    async with workshop.opened(cache_dir=tmp_path / "empty") as store:
        for info, data in slices:
            assert await store.read(info, 0, info.length) == data


@pytest.mark.parametrize("boot_id", [None, OTHER_BOOT])
async def test_the_next_process_finds_and_uploads_what_is_staged(tmp_path: Path, boot_id: str | None) -> None:
    workshop = Workshop(tmp_path, durability=Durability.LOCAL)
    workshop.bucket.put_error = unavailable()
    async with workshop.opened() as store:
        slices = await staged_slices(store)
        await workshop.kill(store)
    workshop.bucket.put_error = None
    workshop.bucket.open_puts.clear()
    async with workshop.opened(boot_id=boot_id) as store:
        assert store.pending_bytes == sum(LENGTHS)
        for info, data in slices:
            assert await store.read(info, 0, info.length) == data
        assert workshop.bucket.gets == []
        workshop.bucket.open_puts.set()
        await store.drain(timeout_s=30)
    async with workshop.opened(cache_dir=tmp_path / "empty") as store:
        for info, data in slices:
            assert await store.read(info, 0, info.length) == data


async def test_drain_says_what_is_left_when_its_time_is_over_and_nothing_is_lost(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, durability=Durability.LOCAL)
    workshop.bucket.put_error = unavailable()
    async with workshop.opened() as store:
        info = await written(store, 1, content(100_000))
        with pytest.raises(BucketUnavailable, match=r"1 slices with 100000 bytes are not uploaded.*staged"):
            await store.drain(timeout_s=0.05)
        assert store.is_staged(info.slice_id)
        workshop.bucket.put_error = None
        await store.drain(timeout_s=30)
        assert not store.is_staged(info.slice_id)


async def test_a_staged_slice_that_is_deleted_leaves_nothing_and_sends_nothing(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, durability=Durability.LOCAL)
    workshop.bucket.put_error = unavailable()
    async with workshop.opened() as store:
        slices = await staged_slices(store)
        await store.delete_many([(info.slice_id, info.length) for info, _ in slices])
        workshop.bucket.put_error = None
        await store.drain(timeout_s=30)
        await settled(store)
        assert store.pending_bytes == 0
        assert workshop.files() == []
        assert await workshop.bucket.keys() == []


async def test_a_delete_waits_for_the_put_under_way(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, durability=Durability.LOCAL)
    workshop.bucket.open_puts.clear()
    async with workshop.opened() as store:
        info = await written(store, 1, content(100_000))
        await workshop.bucket.until(lambda: workshop.bucket.waiting_puts == 1)
        deleting = asyncio.create_task(store.delete(info.slice_id, info.length))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not deleting.done()
        workshop.bucket.open_puts.set()
        await deleting
        assert await workshop.bucket.keys() == []


@pytest.mark.parametrize("length", [64 * KIB, 5 * MIB])
async def test_a_damaged_staged_image_is_set_aside_and_never_uploaded(
    tmp_path: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    workshop = Workshop(tmp_path, durability=Durability.LOCAL)
    workshop.bucket.put_error = unavailable()
    async with workshop.opened() as store:
        await written(store, 1, content(length))
        good = await written(store, 2, content(length, salt=2))
    path = next((workshop.cache / "staged").glob("1-*"))
    altered = bytearray(path.read_bytes())
    altered[length // 2] ^= 1
    path.write_bytes(altered)
    workshop.bucket.put_error = None
    async with workshop.opened() as store:
        await store.drain(timeout_s=30)
        assert store.stats()["staged_lost_total"] == 1
        assert {key.rpartition("/")[2].partition(".")[0] for key in await workshop.bucket.keys()} == {"2"}
        assert (workshop.cache / "damaged" / path.name).read_bytes() == altered
        assert any("staged slice 1 is lost" in record.message for record in caplog.records)
        assert await store.read(good, 0, length) == content(length, salt=2)


async def test_a_slice_for_which_there_is_no_room_goes_to_the_bucket_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workshop = Workshop(tmp_path, durability=Durability.LOCAL, cache_limit_bytes=1 * MIB)
    async with workshop.opened() as store:
        workshop.bucket.open_puts.clear()
        staged = await written(store, 1, content(600_000))
        writing = asyncio.create_task(sealed_slice(store, 2, content(600_000, salt=2)))
        await workshop.bucket.until(lambda: any("/2.0" in key for key in workshop.bucket.puts))
        assert not writing.done()
        workshop.bucket.open_puts.set()
        sent = (await writing).info
        assert not store.is_staged(sent.slice_id)
        assert [r for r in caplog.records if r.levelno == logging.WARNING and "to the bucket at once" in r.message]
        for info, salt in ((staged, 1), (sent, 2)):
            assert await store.read(info, 0, 600_000) == content(600_000, salt=salt)


async def test_many_seals_at_once_are_all_durable(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, durability=Durability.LOCAL)
    workshop.bucket.put_error = unavailable()
    async with workshop.opened() as store:
        infos = await asyncio.gather(*[written(store, n, content(10_000, salt=n)) for n in range(1, 41)])
        await workshop.kill(store)
    async with workshop.opened(boot_id=OTHER_BOOT) as store:
        for info in infos:
            assert await store.read(info, 0, 10_000) == content(10_000, salt=info.slice_id)
