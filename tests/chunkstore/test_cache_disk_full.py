"""A cache disk that is full: reads and writes are right and go on, without a cache if need be. Needs root for its mounts."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from chunkstore.errors import CacheFull
from chunkstore.geometry import KIB, MIB, SliceId
from chunkstore.slices import ChunkStore, Durability
from tests.chunkstore.stores import Workshop, append, content, settled, written


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 6 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "atoll-test", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path: Path) -> None:
    """Take all space that is left."""
    with open(path / "filler", "wb") as file:
        try:
            while True:
                os.write(file.fileno(), bytes(64 * KIB))
        except OSError:
            pass


async def test_reads_go_past_a_full_cache(tmp_path: Path, small_disk: Path) -> None:
    workshop = Workshop(tmp_path)
    datas = {number: content(size, salt=number) for number, size in enumerate([64_000, 3 * MIB, 9 * MIB], start=1)}
    async with workshop.opened() as store:
        infos = [await written(store, number, data) for number, data in datas.items()]
    async with workshop.opened(cache_dir=small_disk) as store:
        fill(small_disk)
        for _ in range(2):
            for info in infos:
                assert await store.read(info, 0, info.length) == datas[info.slice_id]
                assert await store.read(info, 5_000, 9_000) == datas[info.slice_id][5_000:9_000]
            await settled(store)
        assert store.stats()["cache_disk_errors_total"] > 0
        (small_disk / "filler").unlink()


async def test_a_cache_that_is_too_small_for_the_work_is_right_at_every_moment(
    tmp_path: Path, small_disk: Path
) -> None:
    # The limit is beyond what the disk has, so that ENOSPC comes before eviction does.
    workshop = Workshop(tmp_path, cache_dir=small_disk, cache_limit_bytes=1 << 40, free_ratio_floor=0.0)
    config = replace(workshop.config)
    async with ChunkStore(config, bucket=workshop.bucket) as store:
        infos = [await written(store, n, content(n * 700_000, salt=n)) for n in range(1, 9)]

        async def read(lane: int) -> None:
            for turn in range(12):
                info = infos[(turn * 5 + lane) % len(infos)]
                start = (turn * 999_983) % info.length
                end = min(info.length, start + 300_000)
                assert await store.read(info, start, end) == content(info.length, salt=info.slice_id)[start:end]

        await asyncio.gather(*[read(lane) for lane in range(4)])


async def test_object_writes_go_on_from_memory(tmp_path: Path, small_disk: Path) -> None:
    workshop = Workshop(tmp_path, cache_dir=small_disk, block_bytes=512 * KIB, write_memory_bytes=4 * MIB)
    data = content(20 * MIB)
    async with workshop.opened() as store:
        fill(small_disk)
        writer = store.writer(SliceId(1))
        for start in range(0, len(data), 1 * MIB):
            await append(writer, data[start : start + 1 * MIB])
            low = max(0, start - 2 * MIB)
            assert await writer.read(low, start + 1 * MIB) == data[low : start + 1 * MIB]
        info = (await writer.seal()).info
        assert store.stats()["write_memory_bytes"] == 0
    async with workshop.opened(cache_dir=tmp_path / "other") as store:
        assert await store.read(info, 0, len(data)) == data


@pytest.mark.parametrize("length", [64 * KIB, 3 * MIB])
async def test_local_becomes_object_for_what_the_disk_does_not_take(
    tmp_path: Path, small_disk: Path, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    workshop = Workshop(tmp_path, cache_dir=small_disk, block_bytes=1 * MIB, durability=Durability.LOCAL)
    async with workshop.opened() as store:
        # Not known to the store, which measured free space at its start.
        fill(small_disk)
        info = await written(store, 1, content(length))
        assert not store.is_staged(info.slice_id)
        assert len(await workshop.bucket.keys()) == -(-length // MIB)
        assert any("to the bucket at once" in record.message for record in caplog.records)
        assert await store.read(info, 0, length) == content(length)
        assert os.listdir(small_disk / workshop.config.volume_uuid / "staged") == []


async def test_only_idle_writers_beyond_memory_and_disk_are_refused_and_can_still_be_sealed(
    tmp_path: Path, small_disk: Path
) -> None:
    workshop = Workshop(tmp_path, cache_dir=small_disk, block_bytes=512 * KIB, write_memory_bytes=1 * MIB)
    async with workshop.opened() as store:
        fill(small_disk)
        writers = [store.writer(SliceId(number)) for number in range(8)]
        errors = await asyncio.gather(
            *[append(writer, content(100_000, salt=writer.slice_id + 1), step=10_000) for writer in writers],
            return_exceptions=True,
        )
        refused = [error for error in errors if error is not None]
        assert all(isinstance(error, CacheFull) and "--cache-dir" in str(error) for error in refused)
        assert 0 < len(refused) < 8
        for writer in writers:
            length = writer.length
            sealed = await writer.seal()
            expected = content(100_000, salt=writer.slice_id + 1)[:length]
            got = sealed.inline if sealed.inline is not None else await store.read(sealed.info, 0, length)
            assert got == expected
        assert store.stats()["write_memory_bytes"] == 0
