"""Commit to volume tenant/volume of the store at a URL until killed: `commit_to_url.py URL TTL-S [BYTES]`.

Batch n sets the length of 50 slices to n, their data to BYTES bytes (a multiple of 8, 80 if not given) made of n, and adds the
counter ``batch-n``. When its commit returned, the line ``n`` is printed. When the volume has another owner, the line ``fenced``
is, and the program ends. It never renews: an owner that does not know that its time is over.
"""

from __future__ import annotations

import asyncio
import sys

from chunkstore.geometry import SliceId
from metasvc.errors import Fenced
from metasvc.model import Counter, Slice
from metasvc.store.open import open_store
from metasvc.store.tables import COUNTER, SLICE, Batch, Row

SLICES = 50


def tell(text: str) -> None:
    """Print a line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def main(url: str, ttl_s: float, data_bytes: int) -> None:
    """Take the volume over and commit."""
    store = await open_store(url)
    volume = await store.open_volume("tenant", "volume")
    owner = await volume.acquire(nonce="of the program", address="program", ttl_s=ttl_s)
    number = owner.last_batch
    while True:
        number += 1
        data = number.to_bytes(8, "little") * (data_bytes // 8)
        slices: list[Row] = [Slice(SliceId(slice_id), number, 1, 0, data) for slice_id in range(SLICES)]
        try:
            await volume.commit(
                owner, number, Batch({SLICE: slices, COUNTER: [Counter(f"batch-{number}", number)]}, {})
            )
        except Fenced:
            tell("fenced")
            return
        tell(str(number))


asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 80))
