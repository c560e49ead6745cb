"""Packs: small files are gathered under programs that write, remove and read them, and nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from chunkstore.block import Codec
from chunkstore.buckets.directory import DirectoryStore
from chunkstore.geometry import KIB, MIB, SliceId
from chunkstore.slices import ChunkStore, ChunkStoreConfig
from client.vfs.vfs import Vfs
from metasvc.engine import EngineSession, packing
from metasvc.engine.packing import Packing
from metasvc.errors import StoreError
from metasvc.jobs import packing as jobs_packing
from metasvc.jobs.packing import pack_small, repack
from metasvc.model import ROOT_INO, Ino, SetAttr, Slice, SliceKind
from metasvc.server.volumes import Volume
from metasvc.store.tables import PACK, PACKABLE
from tests.metasvc.jobs.places import BLOCK_BYTES, NEVER, ROOT, Place, read, write


@contextlib.asynccontextmanager
async def packer(place: Place, volume: Volume) -> AsyncIterator[tuple[Packing, EngineSession, ChunkStore]]:
    """Open what the job opens."""
    form = volume.format
    cache_dir = place.path / f"packer{len(list(place.path.iterdir()))}"
    cache_dir.mkdir()
    config = ChunkStoreConfig(
        volume_uuid=form.uuid,
        cache_dir=cache_dir,
        codec=Codec.parse(form.compression),
        block_bytes=form.block_bytes,
        inline_limit_bytes=form.inline_limit_bytes,
        free_ratio_floor=0.0,
    )
    async with (
        await EngineSession.begin(volume.engine, host="packer", pid=1) as meta,
        ChunkStore(config, bucket=DirectoryStore(str(place.bucket))) as chunks,
    ):
        yield Packing(volume.engine), meta, chunks


async def pack(place: Place, volume: Volume, *, least_bytes: int = MIB) -> int:
    async with packer(place, volume) as (packs, meta, chunks):
        return await pack_small(packs, meta, chunks, age_s=0.0, least_bytes=least_bytes)


async def kinds(volume: Volume) -> dict[SliceKind, int]:
    rows = await volume.admin.live_slices(after=None, limit=5000)
    return {kind: sum(row.kind == kind for row in rows) for kind in SliceKind}


async def content(vfs: Vfs, name: bytes, *, parent: Ino = ROOT_INO) -> bytes:
    inode = await vfs.lookup(parent, name)
    handle = await vfs.open(ROOT, inode.ino, os.O_RDONLY)
    try:
        return await read(vfs, handle.fh)
    finally:
        await vfs.release(handle.fh)


async def test_small_files_are_gathered_and_read_the_same_everywhere(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    place = Place(tmp_path)
    files = {b"f%04d" % number: rng.randbytes(rng.randint(1, 2 * KIB)) for number in range(1500)}
    async with place.served(NEVER) as service, place.mounted(service, "one") as vfs:
        for name, data in files.items():
            await write(vfs, name, data)
        volume = await service.volume()
        before = {name: await vfs.lookup(ROOT_INO, name) for name in files}
        held = await vfs.open(ROOT, before[b"f0007"].ino, os.O_RDONLY)
        assert await kinds(volume) == {SliceKind.INLINE: 1500, SliceKind.BLOCKS: 0}
        assert await pack(place, volume) > 1000
        left = await kinds(volume)
        assert left[SliceKind.BLOCKS] in (1, 2)
        assert left[SliceKind.INLINE] < 800, "less than a MiB"
        assert place.objects() == sum(-(-row.length // BLOCK_BYTES) for row in await blocks(volume))
        assert await read(vfs, held.fh) == files[b"f0007"], "with the map of before"
        await vfs.release(held.fh)
        versions: Counter[int] = Counter()
        async with place.mounted(service, "two") as other:
            for name, data in files.items():
                assert await content(other, name) == data
                inode = await other.lookup(ROOT_INO, name)
                old = before[name]
                assert (inode.size_bytes, inode.mtime_ns, inode.ctime_ns) == (
                    old.size_bytes,
                    old.mtime_ns,
                    old.ctime_ns,
                )
                versions[inode.map_version - old.map_version] += 1
        assert versions[1] == 1500 - left[SliceKind.INLINE]
        assert sum(versions.values()) == 1500
        assert await pack(place, volume) == 0, "nothing is left to gain"


async def blocks(volume: Volume) -> list[Slice]:
    rows = await volume.admin.live_slices(after=None, limit=5000)
    return [row for row in rows if row.kind == SliceKind.BLOCKS]


@pytest.mark.timeout(120)
async def test_packing_beside_writers_loses_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    place = Place(tmp_path)
    model: dict[bytes, bytes] = {}
    async with place.served(NEVER, trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        volume = await service.volume()
        done = asyncio.Event()

        async def keep_packing() -> int:
            moved = 0
            async with packer(place, volume) as (packs, meta, chunks):
                while not done.is_set():
                    moved += await pack_small(packs, meta, chunks, age_s=0.0, least_bytes=64 * KIB)
                    moved += await repack(packs, meta, chunks)
                    await asyncio.sleep(0.01)
            return moved

        working = asyncio.create_task(keep_packing())
        for number in range(3000):
            name = b"f%03d" % rng.randrange(900)
            what = rng.randrange(10)
            if name not in model or what < 5:
                if name in model:
                    await vfs.unlink(ROOT, ROOT_INO, name)
                model[name] = rng.randbytes(rng.randint(1, 2 * KIB))
                await write(vfs, name, model[name])
            elif what == 5:
                await vfs.unlink(ROOT, ROOT_INO, name)
                del model[name]
            else:
                inode = await vfs.lookup(ROOT_INO, name)
                handle = await vfs.open(ROOT, inode.ino, os.O_RDWR)
                data = bytearray(model[name])
                if what == 6:
                    size = rng.randint(0, len(data))
                    await vfs.setattr(ROOT, inode.ino, SetAttr(size_bytes=size))
                    del data[size:]
                elif what == 7:
                    assert await read(vfs, handle.fh) == model[name]
                else:
                    at = rng.randint(0, len(data))
                    more = rng.randbytes(rng.randint(1, 500))
                    await vfs.write(handle.fh, at, more)
                    data[at : at + len(more)] = more
                    await vfs.flush(handle.fh)
                await vfs.release(handle.fh)
                model[name] = bytes(data)
            if number % 100 == 0:
                await asyncio.sleep(0.01)
        done.set()
        assert await working > 0
        async with place.mounted(service, "two") as other:
            for name, expected in model.items():
                assert await content(other, name) == expected
        assert (await kinds(volume))[SliceKind.BLOCKS] > 0


@pytest.mark.parametrize("operations", [0, 1, 2])
async def test_what_is_cut_off_is_done_again(tmp_path: Path, operations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a kill: the object is there, and so many of the operations that name it were durable."""
    monkeypatch.setattr(packing, "MOVES_AT_ONCE", 100)
    place = Place(tmp_path)
    files = {b"f%04d" % number: os.urandom(2 * KIB) for number in range(900)}
    async with place.served(NEVER) as service, place.mounted(service, "one") as vfs:
        for name, data in files.items():
            await write(vfs, name, data)
        volume = await service.volume()
        async with packer(place, volume) as (packs, meta, chunks):
            run, left = volume.engine.run, operations

            async def cut(rule: object, *args: object, **options: object) -> object:
                nonlocal left
                if rule is packing.move_refs:
                    if left == 0:
                        raise StoreError("killed")
                    left -= 1
                return await run(rule, *args, **options)  # type: ignore[arg-type]

            volume.engine.run = cut  # type: ignore[method-assign]
            with pytest.raises(StoreError):
                await pack_small(packs, meta, chunks, age_s=0.0)
            volume.engine.run = run  # type: ignore[method-assign]
            assert (await kinds(volume))[SliceKind.INLINE] == 900 - 100 * operations
            assert [problem async for problem in volume.admin.check(repair=False)] == []
            for name, data in files.items():
                assert await content(vfs, name) == data
            assert await pack_small(packs, meta, chunks, age_s=0.0) >= 500
        async with place.mounted(service, "two") as other:
            for name, data in files.items():
                assert await content(other, name) == data


async def test_a_pack_that_is_wanted_by_nobody_before_it_is_whole_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MOVES_AT_ONCE", 100)
    place = Place(tmp_path)
    files = {b"f%04d" % number: os.urandom(2 * KIB) for number in range(700)}
    async with place.served(NEVER, trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        for name, data in files.items():
            await write(vfs, name, data)
        volume = await service.volume()
        async with packer(place, volume) as (packs, meta, chunks):
            run, operations = volume.engine.run, 0

            async def removing(rule: object, *args: object, **options: object) -> object:
                nonlocal operations
                found = await run(rule, *args, **options)  # type: ignore[arg-type]
                if rule is packing.move_refs:
                    operations += 1
                    if operations == 1:
                        for name in list(files)[:100]:
                            await vfs.unlink(ROOT, ROOT_INO, name)
                            del files[name]
                return found

            volume.engine.run = removing  # type: ignore[method-assign]
            assert await pack_small(packs, meta, chunks, age_s=0.0) == 100 + 600
            assert operations == 7 + 6, "none of the later ones found the pack; then another was made"
            volume.engine.run = run  # type: ignore[method-assign]
        async with place.mounted(service, "two") as other:
            for name, data in files.items():
                assert await content(other, name) == data


async def test_what_is_left_of_a_pack_moves_on_and_its_object_goes(tmp_path: Path) -> None:
    place = Place(tmp_path)
    files = {b"f%04d" % number: os.urandom(2 * KIB) for number in range(700)}
    async with place.served(NEVER, trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        for name, data in files.items():
            await write(vfs, name, data)
        volume = await service.volume()
        await pack(place, volume)
        objects = place.objects()
        for number, name in enumerate(list(files)):
            if number % 4:
                await vfs.unlink(ROOT, ROOT_INO, name)
                del files[name]
        async with packer(place, volume) as (packs, meta, chunks):
            assert await repack(packs, meta, chunks) == len(files)
            assert await repack(packs, meta, chunks) == 0
        engine = volume.engine
        await engine.settled()
        garbage = await volume.admin.garbage(before_ns=1 << 62, limit=10)
        assert len(garbage) == 1
        assert -(-garbage[0].length // BLOCK_BYTES) == objects
        async with place.mounted(service, "two") as other:
            for name, data in files.items():
                assert await content(other, name) == data
        # Hints of what is gone go, too.
        for name in files:
            await vfs.unlink(ROOT, ROOT_INO, name)
        await Packing(engine).sparse(after=None)
        await engine.settled()
        assert await engine.store.scan(PACK, after=None, limit=10) == []
        assert await engine.store.scan(PACKABLE, after=None, limit=10) == []


async def test_a_clone_of_a_small_file_stays_as_it_is(tmp_path: Path) -> None:
    place = Place(tmp_path)
    files = {b"f%04d" % number: os.urandom(2 * KIB) for number in range(600)}
    async with place.served(NEVER, trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        for name, data in files.items():
            await write(vfs, name, data)
        volume = await service.volume()
        source = await vfs.lookup(ROOT_INO, b"f0001")
        await volume.admin.clone(ROOT, source.ino, Ino(ROOT_INO), b"clone")
        await pack(place, volume)
        assert await content(vfs, b"clone") == await content(vfs, b"f0001") == files[b"f0001"]
        await vfs.unlink(ROOT, ROOT_INO, b"f0001")
        assert await content(vfs, b"clone") == files[b"f0001"]


async def test_reading_one_small_file_brings_its_neighbours(tmp_path: Path) -> None:
    place = Place(tmp_path)
    files = {b"f%04d" % number: os.urandom(2 * KIB) for number in range(1024)}
    async with place.served(NEVER) as service, place.mounted(service, "one") as vfs:
        for name, data in files.items():
            await write(vfs, name, data)
        volume = await service.volume()
        assert await pack(place, volume) == 1024
        async with place.mounted(service, "two") as other:
            for name, data in files.items():
                assert await content(other, name) == data
            fetched = other._chunks.stats()["fetches_total"]
        assert fetched <= 2 * (2 * MIB // BLOCK_BYTES), "one or two for each block, not for each file"


@pytest.mark.parametrize("order", ["names", "random"])
async def test_packs_are_there_before_their_files_are_read(
    tmp_path: Path, order: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_packing, "PACK_BYTES", 4 * BLOCK_BYTES)
    place = Place(tmp_path)
    # 128 files to a pack, 100 to a directory: packs begin in the middle of one.
    files = {(number // 100, b"f%04d" % number): os.urandom(2 * KIB) for number in range(640)}
    async with place.served(NEVER) as service, place.mounted(service, "one") as vfs:
        parents = [(await vfs.mkdir(ROOT, ROOT_INO, b"d%d" % number, mode=0o755)).ino for number in range(7)]
        for (number, name), data in files.items():
            await write(vfs, name, data, parent=parents[number])
        assert await pack(place, await service.volume(), least_bytes=4 * BLOCK_BYTES) == 640
        async with place.mounted(service, "two") as other:
            chosen = list(files)
            if order == "random":
                random.Random(seed).shuffle(chosen)
            ahead = other._neighbours
            assert ahead is not None
            async with asyncio.timeout(60):
                while other._chunks.may_have(SliceId(1 << 40)):
                    await asyncio.sleep(0.001)  # until it knows what its cache has
                for number, name in chosen:
                    assert await content(other, name, parent=parents[number]) == files[number, name]
                    while len(ahead._tasks):
                        await asyncio.sleep(0.001)
            stats = other._chunks.stats()
        most = 3 if order == "names" else 10
        assert stats["cache_misses_total"] <= most, "20 blocks in five packs"
