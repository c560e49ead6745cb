"""A vfs over the wire for tests: real service, real gRPC, real chunk store, a directory as bucket."""

from __future__ import annotations

import asyncio
import contextlib
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
from metasvc.model import Caller
from metasvc.server.volumes import SessionEnded, Volume
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import format_volume
from tests.metasvc.server.served import Client, Served, connected, served

ROOT = Caller()
BLOCK_BYTES = 64 * KIB
OPTIONS = VfsOptions(slice_max_bytes=300 * KIB, slice_ids=4, flush_interval_s=3600, shutdown_flush_s=10)


@dataclass
class Mounted:
    """A vfs over the wire."""

    vfs: Vfs
    client: Client
    service: Served
    objects: Path

    async def volume(self) -> Volume:
        return await self.service.volume()

    async def lose_session(self) -> None:
        """Let the service end the session, and the client begin another."""
        volume = await self.volume()
        before = self.client.connection.session_id
        session = volume.sessions[before]
        outlet = session.outlet
        assert outlet is not None
        ending = asyncio.create_task(volume.end(session))
        outlet.fail(SessionEnded("a test says so"))
        await ending
        async with asyncio.timeout(20):
            while self.client.connection.session_id == before or not self.client.connection.is_connected:
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def mounted(place: Path, **changes: object) -> AsyncIterator[Mounted]:
    rows = await format_volume(MemoryStore(), block_bytes=BLOCK_BYTES, inline_limit_bytes=2 * KIB, **changes)
    form = rows.format
    (place / "objects").mkdir()
    (place / "cache").mkdir()
    config = ChunkStoreConfig(
        volume_uuid=form.uuid,
        cache_dir=place / "cache",
        codec=Codec.parse(form.compression),
        block_bytes=form.block_bytes,
        inline_limit_bytes=form.inline_limit_bytes,
        write_memory_bytes=4 * BLOCK_BYTES,
        free_ratio_floor=0.0,
        disk_threads=2,
        codec_threads=1,
    )
    async with (
        served(rows) as service,
        connected(service) as client,
        ChunkStore(config, bucket=DirectoryStore(str(place / "objects"))) as chunks,
    ):
        async with Vfs(client.meta, chunks, log=structlog.get_logger(), options=OPTIONS) as vfs:
            yield Mounted(vfs, client, service, place / "objects")
        assert [problem async for problem in (await service.volume()).admin.check(repair=False)] == []
