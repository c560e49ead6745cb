"""Commit to volume tenant/volume of a SQLite database until killed: `commit_forever.py DATABASE BYTES [JOURNAL-AFTER]`.

Batch n sets the length of 50 slices to n, their data to BYTES bytes (a multiple of 8) made of n, and adds the counter
``batch-n``. When its commit returned, the line ``n`` is printed.
"""

from __future__ import annotations

import asyncio
import sys

from chunkstore.geometry import SliceId
from metasvc.model import Counter, Slice
from metasvc.store.sqlite import SqliteStore
from metasvc.store.tables import COUNTER, SLICE, Batch, Row

SLICES = 50


async def main(path: str, data_bytes: int, journal_after: int) -> None:
    """Take the volume over and commit."""
    # Halves of a few batches, so that all that can be under way is under way when the end comes.
    store = await SqliteStore.open(path, journal_after=journal_after, half_bytes=1 << 18)
    volume = await store.open_volume("tenant", "volume")
    owner = await volume.acquire(nonce="of the program", address="program", ttl_s=3600)
    number = owner.last_batch
    while True:
        number += 1
        data = number.to_bytes(8, "little") * (data_bytes // 8)
        slices: list[Row] = [Slice(SliceId(slice_id), number, 1, 0, data) for slice_id in range(SLICES)]
        await volume.commit(owner, number, Batch({SLICE: slices, COUNTER: [Counter(f"batch-{number}", number)]}, {}))
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1 << 30))
