"""A loss of power at any moment: what `local` acknowledged is there, and no image ever gives wrong bytes."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from shutil import rmtree

import pytest

from chunkstore.errors import AtollError
from chunkstore.geometry import KIB, MIB
from chunkstore.slices import ChunkStore, Durability, SliceInfo
from tests.chunkstore.images.power_loss import RecordingDisk
from tests.chunkstore.stores import OTHER_BOOT, Workshop, content, settled, unavailable, written

LENGTHS = [5 * KIB, 64 * KIB, 300 * KIB, 1 * MIB + 1, 2 * MIB + 70_000, 9 * KIB, 1 * MIB + 100_000]
CRASHES = 30


@pytest.mark.parametrize("durability", list(Durability))
async def test_at_any_moment(tmp_path: Path, durability: Durability, seed: int) -> None:
    choose = random.Random(seed)
    workshop = Workshop(tmp_path, block_bytes=1 * MIB, durability=durability)
    disk = RecordingDisk()
    acknowledged: list[tuple[int, SliceInfo]] = []
    is_local = durability is Durability.LOCAL
    if is_local:
        # Never uploaded, so that what is read later comes from the staged images and from nowhere else.
        workshop.bucket.put_error = unavailable()
    store = ChunkStore(workshop.config, bucket=workshop.bucket, disk=disk)
    await store.__aenter__()

    async def write(number: int, length: int) -> None:
        info = await written(store, number, content(length, salt=number))
        acknowledged.append((len(disk.record), info))

    for turn in range(3):
        await asyncio.gather(*[write(turn * 100 + n, length) for n, length in enumerate(LENGTHS, start=1)])
    if not is_local:
        # Read in pieces into empty images, evicted and read again, so that side files change in every way.
        await settled(store)
        for _, info in acknowledged:
            store.forget(info.slice_id)
        for _ in range(40):
            _, info = choose.choice(acknowledged)
            start = choose.randrange(info.length)
            await store.read(info, start, min(info.length, start + 70_000))
            image = store._cache.opened.get(info.slice_id)
            if image is not None and image.layout.block_count > 1 and choose.random() < 0.3:
                await store._cache.punch(image, [choose.randrange(image.layout.block_count)])
        await settled(store)
    await workshop.kill(store)

    for crash in range(CRASHES):
        moment = choose.randint(0, len(disk.record))
        cache_dir = tmp_path / f"after-{crash}"
        left = cache_dir / workshop.config.volume_uuid
        disk.play(moment).write_out(str(workshop.cache), left, choose)
        if left.exists() and not (left / "format").exists():
            # The power went before the directory was made; whoever comes next finds nothing worth keeping.
            assert all(at > moment for at, _ in acknowledged)
        config = replace(workshop.config, cache_dir=cache_dir)
        async with ChunkStore(config, bucket=workshop.bucket, boot_id=OTHER_BOOT) as after:
            await after.recover()
            for at, info in acknowledged:
                expected = content(info.length, salt=info.slice_id)
                start = choose.randrange(info.length)
                end = min(info.length, start + choose.choice([1, 5000, 400_000]))
                try:
                    assert await after.read(info, start, end) == expected[start:end]
                    assert await after.read(info, 0, info.length) == expected
                except AtollError:
                    assert is_local, "the bucket has it"
                    assert at > moment, f"slice {info.slice_id} was acknowledged (crash {crash} of seed {seed})"
        rmtree(cache_dir)
