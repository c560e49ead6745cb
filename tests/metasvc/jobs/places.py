"""A service with its jobs, its bucket and mounts without a kernel, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

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
from metasvc.model import ROOT_INO, Caller, Ino
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import volume_format
from tests.metasvc.server.served import Served, connected, served

ROOT = Caller()
BLOCK_BYTES = 64 * KIB
FAST = JobRates(garbage_s=0.05, trash_s=0.05, compaction_s=0.05, compaction_pause_s=0)
NEVER = JobRates(garbage_s=3600, trash_s=3600, compaction_s=3600, packs_s=3600)


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
            while self.objects() != count:
                await asyncio.sleep(0.02)


async def write(vfs: Vfs, name: bytes, *pieces: bytes, parent: Ino = ROOT_INO) -> None:
    """Write a file, each piece with an fsync of its own: a slice for each."""
    handle = await vfs.create(ROOT, parent, name, mode=0o644, flags=os.O_RDWR)
    offset = 0
    for piece in pieces:
        await vfs.write(handle.fh, offset, piece)
        await vfs.fsync(handle.fh)
        offset += len(piece)
    await vfs.flush(handle.fh)
    await vfs.release(handle.fh)


async def read(vfs: Vfs, fh: int) -> bytes:
    return bytes(await vfs.read(fh, 0, 1 << 30))
