"""Chunk stores for tests: real images, a real directory as bucket, and a wrapper around it that counts, holds and fails."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final
from uuid import UUID

from chunkstore.block import Codec
from chunkstore.buckets import ObjectInfo, ObjectStore
from chunkstore.buckets.directory import DirectoryStore
from chunkstore.errors import AtollError, BucketUnavailable
from chunkstore.geometry import KIB, MIB, Buffer, SliceId
from chunkstore.slices import ChunkStore, ChunkStoreConfig, Sealed, SliceInfo, SliceWriter

VOLUME: Final = "0193b1f0-5d1a-7c1e-9d7a-3f0c2f6f8a11"
OTHER_BOOT: Final = str(UUID(int=7))


def content(length: int, *, salt: int = 1) -> bytes:
    """Return bytes that differ everywhere and between salts; half of them shrink."""
    noise = bytes((i * 7919 * salt + i // 251) & 255 for i in range(min(length, 4096)))
    text = b"%08x" % (salt * 2654435761 & 0xFFFFFFFF)
    unit = noise + text * 512
    parts = [b"%016d" % number + unit for number in range(length // len(unit) + 1)]
    return b"".join(parts)[:length]


class FaultyBucket:
    """An ObjectStore in front of a real one that counts, and holds, fails or alters when it is told to."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner
        self.requests: Counter[str] = Counter()
        self.gets: list[tuple[str, int | None, int | None]] = []
        self.puts: list[str] = []
        self.got_bytes = 0
        self.put_error: AtollError | None = None
        self.get_error: AtollError | None = None
        self.alter: Callable[[str, bytes], bytes] | None = None
        self.open_gets = asyncio.Event()
        self.open_puts = asyncio.Event()
        self.open_gets.set()
        self.open_puts.set()
        self.waiting_gets = 0
        self.waiting_puts = 0
        self.arrived = asyncio.Condition()

    async def _arrive(self, verb: str) -> None:
        self.requests[verb] += 1
        async with self.arrived:
            self.arrived.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a request came that made a condition true."""
        async with asyncio.timeout(20), self.arrived:
            await self.arrived.wait_for(condition)

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        self.gets.append((key, start, end))
        self.waiting_gets += 1
        await self._arrive("get")
        await self.open_gets.wait()
        self.waiting_gets -= 1
        if self.get_error is not None:
            raise self.get_error
        data = await self.inner.get(key, start=start, end=end, timeout_s=timeout_s)
        self.got_bytes += len(data)
        return data if self.alter is None else self.alter(key, bytes(data))

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        self.puts.append(key)
        self.waiting_puts += 1
        await self._arrive("put")
        await self.open_puts.wait()
        self.waiting_puts -= 1
        if self.put_error is not None:
            raise self.put_error
        await self.inner.put(key, data, if_absent=if_absent, timeout_s=timeout_s)

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        await self._arrive("delete")
        await self.inner.delete(keys, timeout_s=timeout_s)

    def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        return self.inner.list(prefix, start_after=start_after)

    async def head(self, key: str, *, timeout_s: float | None = None) -> ObjectInfo:
        return await self.inner.head(key, timeout_s=timeout_s)

    async def probe(self) -> None:
        await self.inner.probe()

    async def close(self) -> None:
        await self.inner.close()

    async def keys(self) -> Sequence[str]:
        """Return the keys of all objects."""
        return [info.key async for info in self.inner.list()]


def unavailable() -> BucketUnavailable:
    """Return the error of a bucket whose budget is spent."""
    return BucketUnavailable("the bucket is away")


class Workshop:
    """Make chunk stores in one directory, one after the other, on the same bucket and cache directory."""

    def __init__(self, directory: Path, **changes: object) -> None:
        self.directory = directory
        (directory / "bucket").mkdir(exist_ok=True)
        self.config = replace(
            ChunkStoreConfig(
                volume_uuid=VOLUME,
                cache_dir=directory / "cache",
                codec=Codec.parse("zstd:1"),
                block_bytes=2 * MIB,
                inline_limit_bytes=4 * KIB,
                scrub_bytes_per_s=0,
            ),
            **changes,  # type: ignore[arg-type]
        )
        self.bucket = FaultyBucket(DirectoryStore(str(directory / "bucket")))
        self._killed: list[ChunkStore] = []
        self.cache = directory / "cache" / VOLUME

    @asynccontextmanager
    async def opened(self, *, boot_id: str | None = None, **changes: object) -> AsyncIterator[ChunkStore]:
        """Open a store, with other settings if need be; staged slices are recovered."""
        config = replace(self.config, **changes)  # type: ignore[arg-type]
        store = ChunkStore(config, bucket=self.bucket, boot_id=boot_id)
        async with asyncio.timeout(60):
            await store.__aenter__()
            try:
                await store.recover()
                yield store
            finally:
                if store not in self._killed:
                    await store.__aexit__(None, None, None)

    async def kill(self, store: ChunkStore) -> None:
        """End a store as kill -9 does: nothing that waits is written, nothing is synced, locks and descriptors go."""
        for tasks in (store._loops, store._tasks, store._cache._tasks):
            await tasks.close()
        await store._executors.close()
        for image in list(store._cache.opened):
            os.close(image.descriptor)
            if image.side is not None:
                os.close(image.side)
        store._directory.close()
        self._killed.append(store)

    def images(self) -> list[str]:
        """Return the names of the images, staged ones included."""
        return sorted(os.listdir(self.cache / "images") + os.listdir(self.cache / "staged"))

    def files(self) -> list[str]:
        """Return the paths of all files in the cache directory that hold bytes of slices."""
        found = []
        for folder, _, names in os.walk(self.cache):
            found += [os.path.relpath(os.path.join(folder, name), self.cache) for name in names]
        return sorted(set(found) - {"lock", "format"})


async def append(writer: SliceWriter, data: Buffer, *, step: int = 100_003) -> None:
    """Append bytes in pieces."""
    view = memoryview(data)
    for start in range(0, len(view), step):
        if (wait := writer.append(bytes(view[start : start + step]))) is not None:
            await wait


async def written(store: ChunkStore, slice_id: int, data: bytes) -> SliceInfo:
    """Write and seal a slice that is not inline."""
    sealed = await sealed_slice(store, slice_id, data)
    assert sealed.inline is None
    return sealed.info


async def sealed_slice(store: ChunkStore, slice_id: int, data: bytes) -> Sealed:
    """Write and seal a slice."""
    writer = store.writer(SliceId(slice_id))
    await append(writer, data)
    return await writer.seal()


async def settled(store: ChunkStore) -> None:
    """Wait until everything is written that is written by and by, and nothing is being fetched or closed."""
    await store._tasks.settle(timeout_s=20)
    await store._cache._pending.flush()
    await store._cache._tasks.settle(timeout_s=20)
