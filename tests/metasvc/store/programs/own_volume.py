"""Own the volume tenant/volume of a SQLite database: `own_volume.py DATABASE ADDRESS`; print the epoch, wait for the end."""

from __future__ import annotations

import asyncio
import sys

from metasvc.store.sqlite import SqliteStore


async def main(path: str, address: str) -> None:
    """Acquire and hold."""
    store = await SqliteStore.open(path)
    volume = await store.open_volume("tenant", "volume")
    owner = await volume.acquire(nonce="of the program", address=address, ttl_s=3600)
    sys.stdout.write(f"{owner.epoch}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await volume.release(owner)
    await store.close()


asyncio.run(main(sys.argv[1], sys.argv[2]))
