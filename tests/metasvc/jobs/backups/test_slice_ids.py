"""The lowest slice id of which there can be no object, on random buckets and with things between that are no blocks."""

from __future__ import annotations

import random
from pathlib import Path

from chunkstore.buckets.directory import DirectoryStore
from chunkstore.geometry import SliceId, block_key
from metasvc.jobs.backups.slice_ids import first_free_slice

UUID = "11111111-2222-3333-4444-555555555555"


async def test_it_is_above_every_object_whatever_the_order_of_names(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(30):
        (tmp_path / str(number)).mkdir()
        bucket = DirectoryStore(str(tmp_path / str(number)))
        ids = [SliceId(rng.randrange(1, 1 << rng.randrange(2, 53))) for _ in range(rng.randrange(1, 12))]
        for slice_id in ids:
            await bucket.put(block_key(UUID, slice_id, rng.randrange(20)), b"x")
        await bucket.put(block_key("other" + UUID, SliceId(1 << 52), 0), b"x")
        found = await first_free_slice(bucket, UUID)
        assert max(ids) < found <= max(ids) + (1 << 20)
        await bucket.close()


async def test_an_empty_bucket_and_foreign_objects_do_no_harm(tmp_path: Path) -> None:
    bucket = DirectoryStore(str(tmp_path))
    assert await first_free_slice(bucket, UUID) == 1
    for key in ("top", "zz/zz", "fffffffffffff/1.0", "0f/3.0", "G/1", "~/~", "~~/~~~"):
        await bucket.put(f"{UUID}/{key}", b"x")
    assert await first_free_slice(bucket, UUID) == 1
    await bucket.put(block_key(UUID, SliceId(5 << 20), 3), b"x")
    assert await first_free_slice(bucket, UUID) == 6 << 20
    await bucket.close()
