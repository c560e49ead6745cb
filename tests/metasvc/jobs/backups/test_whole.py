"""Files are written, replaced and removed, backups made, garbage deleted, all at once: protected backups stay whole."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import structlog

from chunkstore.buckets.directory import DirectoryStore
from chunkstore.geometry import KIB, block_count, block_key
from client.vfs.vfs import Vfs
from metasvc.engine.load import load
from metasvc.errors import FsError
from metasvc.jobs.backups import BackupPolicy, Backups, Manifest, Shelf, read_backup
from metasvc.jobs.backups.making import make_backup
from metasvc.jobs.collecting import delete_objects
from metasvc.jobs.schedule import Jobs
from metasvc.model import ROOT_INO, Garbage, SliceKind
from metasvc.server.volumes import Volume
from metasvc.store.memory import MemoryStore
from metasvc.store.tables import SLICE
from tests.metasvc.jobs.places import BLOCK_BYTES, NEVER, ROOT, Place, write

WINDOW_S = 2
ROUNDS = 8
ROUND_S = 0.7


async def objects_of(bucket: DirectoryStore, made: Manifest) -> set[str]:
    """Return the keys of the objects that a backup names."""
    store = MemoryStore()
    await load(store, read_backup(bucket, made), tenant="local", name="default", address="test")
    volume = await store.open_volume("local", "default")
    rows = [row for row in await volume.scan(SLICE, after=None, limit=100_000) if row[3] == SliceKind.BLOCKS]
    return {block_key(made.uuid, row[0], index) for row in rows for index in range(block_count(row[1], BLOCK_BYTES))}


async def work(vfs: Vfs, rng: random.Random) -> None:
    """Write, replace and remove files until cancelled."""
    for number in range(10**9):
        name = b"f%d" % rng.randrange(12)
        try:
            await vfs.unlink(ROOT, ROOT_INO, name)
        except FsError:
            pass
        if rng.random() < 0.7:
            await write(vfs, name, *(os.urandom(rng.randrange(3, 100) * KIB) for _ in range(rng.randrange(1, 3))))
        if number % 5 == 0:
            await asyncio.sleep(0)


async def test_protected_backups_name_only_what_is_there(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    place = Place(tmp_path)
    async with place.served(NEVER, trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        volume = await service.volume()
        bucket = DirectoryStore(str(place.bucket))
        shelf = Shelf(bucket, volume.format.uuid)
        deleted = backed_up = 0

        async def delete(rows: object) -> None:
            nonlocal deleted
            some = [row for row in rows if isinstance(row, Garbage)]  # type: ignore[attr-defined]
            deleted += len(some)
            await delete_objects(bucket, volume.format, some)

        async def back_up() -> None:
            nonlocal backed_up
            while True:
                await make_backup(shelf, volume.admin.dump, window_s=WINDOW_S, check_owned=volume.engine.owner.check)
                backed_up += 1
                await asyncio.sleep(rng.random() * 0.5)

        async def collect() -> None:
            jobs = jobs_of(volume, shelf, delete)
            while True:
                await jobs.collect()
                await asyncio.sleep(rng.random() * 0.1)
                if rng.random() < 0.2:
                    # The volume has another owner, who looks what backups there are.
                    jobs = jobs_of(volume, shelf, delete)

        for _ in range(ROUNDS):
            tasks = [asyncio.create_task(each) for each in (work(vfs, rng), back_up(), collect())]
            await asyncio.sleep(ROUND_S)
            for task in tasks:
                if task.done():
                    task.result()
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            known = await shelf.manifests()
            protected = [each for each in known if each.kept_until_ns >= time.time_ns()] + known[-1:]
            there = {info.key async for info in bucket.list(f"{volume.format.uuid}/")}
            for made in protected:
                assert await objects_of(bucket, made) <= there, made.name
        assert deleted > 10, "the test is about garbage that goes"
        assert backed_up > 5
        await bucket.close()


def jobs_of(volume: Volume, shelf: Shelf, delete: object) -> Jobs:
    """Return the jobs of the owner, of which this test runs one itself."""

    async def own_shelf() -> Shelf:
        return shelf

    backups = Backups(
        own_shelf,
        volume.admin.dump,
        policy=BackupPolicy(every_s=1.0, window_s=WINDOW_S, clocks_apart_s=0.0),
        check_owned=volume.engine.owner.check,
        log=structlog.get_logger(),
    )
    log = structlog.get_logger()
    return Jobs(volume.admin, lambda: volume.format, delete, None, log, NEVER, backups=backups)  # type: ignore[arg-type]
