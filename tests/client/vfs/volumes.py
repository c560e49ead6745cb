"""A whole vfs for tests: real engine, real chunk store, a directory as bucket that can be made to fail, a clock to turn."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from chunkstore.block import Codec
from chunkstore.buckets import ObjectInfo, ObjectStore
from chunkstore.buckets.directory import DirectoryStore
from chunkstore.errors import BucketUnavailable
from chunkstore.geometry import KIB, Buffer
from chunkstore.slices import ChunkStore, ChunkStoreConfig
from client.vfs.options import VfsOptions
from client.vfs.vfs import Vfs
from metasvc.engine import Engine, EngineAdmin, EngineSession
from metasvc.model import Caller, VolumeFormat
from metasvc.store import Store
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import format_volume

BLOCK_BYTES = 64 * KIB
INLINE_BYTES = 2 * KIB
ROOT = Caller()
SMALL = VfsOptions(
    entry_timeout_s=3600,
    attr_timeout_s=3600,
    # Small, so that tests get to every limit; the background flush runs when a test says so.
    slice_max_bytes=300 * KIB,
    slice_max_refs=24,
    slice_ids=4,
    readdir_page=5,
    flush_interval_s=3600,
    shutdown_flush_s=30,
)


class FlakyBucket:
    """An ObjectStore in front of another that fails when it is told to. Counts what came through."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.puts_fail = False
        self.gets_fail = False
        self.puts = 0
        self.gets = 0

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        if self.gets_fail:
            raise BucketUnavailable(f"object {key}: the bucket is away")
        self.gets += 1
        return await self.inner.get(key, start=start, end=end, timeout_s=timeout_s)

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        if self.puts_fail:
            raise BucketUnavailable(f"object {key}: the bucket is away")
        self.puts += 1
        await self.inner.put(key, data, if_absent=if_absent, timeout_s=timeout_s)

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        await self.inner.delete(keys, timeout_s=timeout_s)

    def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        return self.inner.list(prefix, start_after=start_after)

    async def head(self, key: str, *, timeout_s: float | None = None) -> ObjectInfo:
        return await self.inner.head(key, timeout_s=timeout_s)

    async def probe(self) -> None:
        await self.inner.probe()

    async def close(self) -> None:
        await self.inner.close()


@dataclass
class TurnedClock:
    """A clock that moves when it is told to, and a little with each look at the wall."""

    now_s: float = 1000.0
    ticks: int = 0

    def wall_ns(self) -> int:
        self.ticks += 1
        return int(self.now_s * 1e9) + self.ticks

    def monotonic_s(self) -> float:
        return self.now_s


@dataclass
class VfsVolume:
    """An open vfs with everything beneath it within reach."""

    vfs: Vfs
    meta: EngineSession
    engine: Engine
    chunks: ChunkStore
    bucket: FlakyBucket
    clock: TurnedClock
    admin: EngineAdmin

    async def problems(self) -> list[str]:
        """Return what fsck finds in the metadata."""
        return [f"{problem.code} {problem.ino}: {problem.text}" async for problem in self.admin.check(repair=False)]

    def objects(self, place: Path) -> list[Path]:
        """Return the objects of the bucket, as files."""
        return sorted(path for path in (place / "objects").rglob("*") if path.is_file())


@dataclass
class Place:
    """A formatted volume in a directory: opened, closed and opened again."""

    path: Path
    format_changes: dict[str, Any] = field(default_factory=dict)
    store: Store = field(default_factory=MemoryStore)
    """Closed by who gave it."""
    clock: TurnedClock = field(default_factory=TurnedClock)
    form: VolumeFormat | None = None

    @contextlib.asynccontextmanager
    async def opened(self, *, options: VfsOptions = SMALL, fresh_cache: bool = False) -> AsyncIterator[VfsVolume]:
        """Open the volume; at the end fsck must find nothing. `fresh_cache`: no image of an earlier opening is used."""
        if self.form is None:
            (self.path / "objects").mkdir()
            changes = {"block_bytes": BLOCK_BYTES, "inline_limit_bytes": INLINE_BYTES, **self.format_changes}
            self.form = (await format_volume(self.store, **changes)).format
        form = self.form
        rows = await self.store.open_volume(form.tenant, form.name)
        number = sum(1 for _ in self.path.glob("cache*"))
        cache_dir = self.path / f"cache{number if fresh_cache or not number else number - 1}"
        cache_dir.mkdir(exist_ok=True)
        config = ChunkStoreConfig(
            volume_uuid=form.uuid,
            cache_dir=cache_dir,
            codec=Codec.parse(form.compression),
            block_bytes=form.block_bytes,
            inline_limit_bytes=form.inline_limit_bytes,
            write_memory_bytes=4 * BLOCK_BYTES,
            free_ratio_floor=0.0,
            disk_threads=2,
            codec_threads=1,
        )
        bucket = FlakyBucket(DirectoryStore(str(self.path / "objects")))
        clock = self.clock
        async with contextlib.AsyncExitStack() as stack:
            engine = await stack.enter_async_context(
                await Engine.open(rows, address="test", clock_ns=lambda: int(clock.now_s * 1e9) + clock.ticks)
            )
            meta = await stack.enter_async_context(await EngineSession.begin(engine, host="test", pid=1))
            stack.push_async_callback(bucket.close)
            chunks = await stack.enter_async_context(ChunkStore(config, bucket=bucket))
            log = structlog.get_logger().bind(volume="test")
            vfs = Vfs(meta, chunks, log=log, options=options, clock=clock)
            volume = VfsVolume(vfs, meta, engine, chunks, bucket, clock, EngineAdmin(engine))
            async with vfs:
                yield volume
            assert await volume.problems() == []
