"""The jobs of a service: what clients leave behind goes from the bucket, and what they have open stays readable."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from chunkstore.block import Codec
from chunkstore.buckets.directory import DirectoryStore
from chunkstore.geometry import KIB
from chunkstore.slices import ChunkStore, ChunkStoreConfig
from client.vfs.options import VfsOptions
from client.vfs.vfs import Vfs
from metasvc.engine import first_rows
from metasvc.jobs.schedule import JobRates
from metasvc.jobs.served import ServedJobs
from metasvc.model import ROOT_INO, Caller
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import volume_format
from tests.metasvc.server.served import Served, connected, served

ROOT = Caller()
BLOCK_BYTES = 64 * KIB
FAST = JobRates(garbage_s=0.05, trash_s=0.05, compaction_s=0.05, compaction_pause_s=0)


@dataclass
class Place:
    """Where a volume, its bucket and the caches of its clients lie."""

    path: Path

    @property
    def bucket(self) -> Path:
        return self.path / "objects"

    def objects(self) -> int:
        return sum(1 for path in self.bucket.rglob("*") if path.is_file())

    @contextlib.asynccontextmanager
    async def served(self, rates: JobRates = FAST, **changes: object) -> AsyncIterator[Served]:
        self.bucket.mkdir()
        store = MemoryStore()
        form = volume_format(
            bucket_url=f"file://{self.bucket}", block_bytes=BLOCK_BYTES, inline_limit_bytes=2 * KIB, **changes
        )
        await store.create_volume(form, first_rows(form))
        jobs = ServedJobs(cache_dir=self.path / "serve", env={}, log=structlog.get_logger(), rates=rates)
        async with served(store, name=f"{form.tenant}/{form.name}", work=jobs.run) as service:
            yield service
            volume = await service.volume()
            assert [problem async for problem in volume.admin.check(repair=False)] == []

    @contextlib.asynccontextmanager
    async def mounted(self, service: Served, name: str) -> AsyncIterator[Vfs]:
        async with connected(service) as client:
            form = client.meta.format
            (self.path / name).mkdir()
            config = ChunkStoreConfig(
                volume_uuid=form.uuid,
                cache_dir=self.path / name,
                codec=Codec.parse(form.compression),
                block_bytes=form.block_bytes,
                inline_limit_bytes=form.inline_limit_bytes,
                write_memory_bytes=4 * BLOCK_BYTES,
                free_ratio_floor=0.0,
            )
            async with (
                ChunkStore(config, bucket=DirectoryStore(str(self.bucket))) as chunks,
                Vfs(client.meta, chunks, log=structlog.get_logger(), options=VfsOptions()) as vfs,
            ):
                yield vfs

    async def until_objects(self, count: int) -> None:
        async with asyncio.timeout(30):
            while self.objects() != count:  # noqa: ASYNC110 - a directory has no event
                await asyncio.sleep(0.02)


async def write(vfs: Vfs, name: bytes, *pieces: bytes) -> None:
    """Write a file, each piece with an fsync of its own: a slice for each."""
    handle = await vfs.create(ROOT, ROOT_INO, name, mode=0o644, flags=os.O_RDWR)
    offset = 0
    for piece in pieces:
        await vfs.write(handle.fh, offset, piece)
        await vfs.fsync(handle.fh)
        offset += len(piece)
    await vfs.flush(handle.fh)
    await vfs.release(handle.fh)


async def read(vfs: Vfs, fh: int) -> bytes:
    return bytes(await vfs.read(fh, 0, 1 << 30))


async def test_what_was_removed_goes_from_the_bucket(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.served(trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        await write(vfs, b"kept", os.urandom(100 * KIB))
        await write(vfs, b"gone", os.urandom(300 * KIB))
        assert place.objects() == 7
        await vfs.unlink(ROOT, ROOT_INO, b"gone")
        await place.until_objects(2)
        async with connected(service) as client:
            assert (await client.admin.status()).counters["job_garbage_done_total"] == 5


async def test_trash_goes_when_its_time_is_up(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with place.served(trash_days=0.3 / 86400) as service, place.mounted(service, "one") as vfs:
        await write(vfs, b"gone", os.urandom(300 * KIB))
        await vfs.unlink(ROOT, ROOT_INO, b"gone")
        assert place.objects() == 5
        await place.until_objects(0)


async def test_what_is_open_elsewhere_is_readable_until_it_is_closed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    data = os.urandom(300 * KIB)
    async with (
        place.served(trash_days=0.0) as service,
        place.mounted(service, "one") as writer,
        place.mounted(service, "two") as reader,
    ):
        await write(writer, b"file", data)
        inode = await reader.lookup(ROOT_INO, b"file")
        handle = await reader.open(ROOT, inode.ino, os.O_RDONLY)
        await writer.unlink(ROOT, ROOT_INO, b"file")
        await asyncio.sleep(0.5)
        assert await read(reader, handle.fh) == data
        await reader.release(handle.fh)
        await place.until_objects(0)


async def test_chunks_are_compacted_under_readers_that_hold_the_map_of_before(tmp_path: Path) -> None:
    place = Place(tmp_path)
    pieces = [os.urandom(5 * KIB) for _ in range(60)]
    async with (
        place.served(JobRates(garbage_s=3600, trash_s=3600, compaction_s=3600, compaction_pause_s=0)) as service,
        place.mounted(service, "one") as writer,
        place.mounted(service, "two") as reader,
    ):
        await write(writer, b"file", *pieces)
        handle = await reader.open(ROOT, (await reader.lookup(ROOT_INO, b"file")).ino, os.O_RDONLY)
        volume = await service.volume()
        assert place.objects() == 60
        jobs = ServedJobs(cache_dir=tmp_path / "work", env={}, log=structlog.get_logger(), rates=FAST)
        working = asyncio.create_task(jobs.run(volume))
        await place.until_objects(5)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        assert await read(reader, handle.fh) == b"".join(pieces)
        await reader.release(handle.fh)
        assert [session.mountpoint for session in volume.engine.sessions()] == ["/test", "/test"]


async def test_jobs_without_a_bucket_say_so_and_clients_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metasvc.jobs.schedule.FAILURE_REST_S", 0.1)
    place = Place(tmp_path)
    async with place.served(trash_days=0.0) as service, place.mounted(service, "one") as vfs:
        await write(vfs, b"gone", os.urandom(300 * KIB))
        place.bucket.rename(tmp_path / "away")
        await vfs.unlink(ROOT, ROOT_INO, b"gone")
        volume = await service.volume()
        async with asyncio.timeout(60):
            while not volume.jobs()["garbage"].failures:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await vfs.mkdir(ROOT, ROOT_INO, b"works", mode=0o755)
        (tmp_path / "away").rename(place.bucket)
        await place.until_objects(0)
