"""The chunk store as the client sees it: write a slice, read a range of one, delete slices.

Owns the composition: bucket, images, writing, reading, staging, eviction, scrub, and their start and end. Must not know
files, inodes or chunk maps.

    async with ChunkStore(config, bucket=bucket) as store:
        await store.recover()
        writer = store.writer(slice_id)
        if (wait := writer.append(data)) is not None:
            await wait
        sealed = await writer.seal()
        data = store.try_read(sealed.info, 0, 4096) or await store.read(sealed.info, 0, 4096)

One event loop, one ChunkStore per volume and process. All methods are called on that loop. Disk work runs on a bounded
executor, codec work on another; what is documented as synchronous never blocks on a disk or on the network. How the parts
stand beside each other when things happen at once is said in each of them: `chunkstore.reading` (two fetchers, cancelled
readers, delete against fetch), `chunkstore.images.cache` (eviction against read, forget against store), `chunkstore.writing`
and `chunkstore.flight` (append, seal, discard, crash), `chunkstore.uploading` and `chunkstore.images.staging` (staged slices).

What it costs on two EPYC cores with a directory on ext4 as bucket: `try_read` 3 us for 4 KiB, 15 for 128 KiB, 85 for 1 MiB,
of which pread(2) is 1.5, 13 and 75. Big slices are bound by the disk and by the page cache: docs/adr/0013. Slices of 64 KiB:
sealed 660 a second one after the other, 770 by 8 tasks (all but 0.1 ms of each in the put), read with nothing cached 2,100 and
5,900. 200,000 images are indexed in 2.5 s in the background, with 8 MiB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from uuid import UUID
from weakref import WeakSet

from chunkstore.access import BlockAccess, ObjectAccess
from chunkstore.background import Executors, TaskSet
from chunkstore.buckets import ObjectStore
from chunkstore.budget import WriteMemory
from chunkstore.flight import WriteServices
from chunkstore.geometry import Buffer, SliceId, block_count
from chunkstore.images.cache import ImageCache
from chunkstore.images.directory import CacheDirectory, CacheLocked
from chunkstore.images.disk import Disk
from chunkstore.images.eviction import Evictor
from chunkstore.images.scrub import Scrub
from chunkstore.images.staging import Staging
from chunkstore.model import ChunkStoreConfig, Durability, Sealed, SliceInfo
from chunkstore.reading import SliceReader
from chunkstore.uploading import StagedUploads, Uploader
from chunkstore.writing import SliceWriter

__all__ = ["CacheLocked", "ChunkStore", "ChunkStoreConfig", "Durability", "Sealed", "SliceInfo", "SliceWriter"]

_BOOT_ID_PATH: Final = Path("/proc/sys/kernel/random/boot_id")


class ChunkStore:
    """Store the bytes of one volume: verified reads through local images, writes to bucket or staging."""

    def __init__(
        self,
        config: ChunkStoreConfig,
        *,
        bucket: ObjectStore | None = None,
        access: BlockAccess | None = None,
        clock: Callable[[], float] = time.monotonic,
        boot_id: str | None = None,
        disk: Disk | None = None,
    ) -> None:
        """Take settings, and the bucket or what else reaches its blocks; the caller closes it later. Touches nothing yet.

        `clock` is a monotonic clock in seconds; `boot_id` stands in for /proc/sys/kernel/random/boot_id, and `disk` for the
        system calls on the cache disk, in tests.
        """
        self._config = config
        if bucket is not None:
            access = ObjectAccess(bucket, config.volume_uuid)
        assert access is not None, "a bucket, or what else reaches blocks"
        self._access: BlockAccess = access
        self._clock = clock
        self._boot_id = boot_id
        self._disk = disk or Disk()
        self._directory = CacheDirectory(
            config.cache_dir / config.volume_uuid, block_bytes=config.block_bytes, disk=self._disk
        )
        self._writers: WeakSet[SliceWriter] = WeakSet()

    async def __aenter__(self) -> Self:
        """Lock the cache directory, start the background work (which begins with an index of what lies there).

        CacheLocked (EBUSY) names the directory and the process that has it. A directory that cannot be written, or is full,
        is an OSError here; later in life a broken cache is only a miss. FormatUnsupported: see `CacheDirectory.open`.
        """
        config, disk = self._config, self._disk
        self._executors = executors = Executors(disk_threads=config.disk_threads, codec_threads=config.codec_threads)
        try:
            await executors.disk(self._directory.open)
            boot_id = UUID(self._boot_id or _BOOT_ID_PATH.read_text().strip())
        except BaseException:
            await executors.close()
            raise
        self._loops = TaskSet()
        self._tasks = TaskSet()
        self._cache = cache = ImageCache(
            self._directory,
            block_bytes=config.block_bytes,
            boot_id=boot_id,
            executors=executors,
            disk=disk,
            clock=self._clock,
            max_descriptors=config.max_open_images,
        )
        uploader = Uploader(config, access=self._access, executors=executors)
        self._uploader = uploader
        self._staged = StagedUploads(
            config, uploader=uploader, cache=cache, executors=executors, disk=disk, tasks=self._tasks
        )
        self._reader = SliceReader(config, access=self._access, cache=cache, executors=executors, tasks=self._tasks)
        self._evictor = Evictor(
            cache,
            limit_bytes=config.cache_limit_bytes,
            free_ratio_floor=config.free_ratio_floor,
            held_bytes=lambda: self._staged.held_bytes,
            executors=executors,
            disk=disk,
            clock=self._clock,
        )
        self._staging = Staging(cache, executors=executors, disk=disk, tasks=self._tasks)
        self._services = WriteServices(
            config=config,
            access=self._access,
            memory=WriteMemory(config.write_memory_bytes),
            uploader=uploader,
            cache=cache,
            staging=self._staging,
            staged=self._staged,
            reader=self._reader,
            executors=executors,
            disk=disk,
            tasks=self._tasks,
            has_room=self._evictor.has_room,
        )
        await self._evictor.measure()
        self._loops.start(cache.load(), name="index the cache")
        self._loops.start(self._evictor.run(), name="evict")
        self._loops.start(cache.care(), name="sync written images")
        if config.scrub_bytes_per_s:
            self._scrub = Scrub(cache, bytes_per_s=config.scrub_bytes_per_s, executors=executors, disk=disk)
            self._loops.start(self._scrub.run(), name="scrub")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the background work, close the images, free the directory. Staged slices stay staged: drain first.

        Writers that are not sealed are lost, and calls under way end with BucketUnavailable or are cancelled.
        """
        await self._loops.close()
        await self._tasks.close()
        for writer in self._writers:
            writer.abandon()
        await self._cache.close()
        await self._executors.close()
        self._directory.close()

    def writer(self, slice_id: SliceId) -> SliceWriter:
        """Start a new slice. Synchronous, makes no file. The id must be new in the volume."""
        writer = SliceWriter(slice_id, self._services)
        self._writers.add(writer)
        return writer

    def try_read(self, info: SliceInfo, start: int, end: int) -> Buffer | None:
        """Return bytes `[start, end)` of a slice (0 <= start < end <= length) if they are in memory, else None.

        Never blocks. The buffer is read-only to the caller; bytes, bytearray or a view, whatever saves a copy.
        """
        return self._reader.try_read(info, start, end)

    async def read(self, info: SliceInfo, start: int, end: int) -> Buffer:
        """Return bytes `[start, end)` of a slice (0 <= start < end <= length), verified against its digests.

        Missing frames are fetched, one fetch per block at a time. ObjectMissing, ObjectCorrupt, BucketUnavailable (after all
        retries) and BucketDenied name the slice and the object key.
        """
        return await self._reader.read(info, start, end)

    def prefetch(self, info: SliceInfo, start: int, end: int, *, in_pieces: bool = False) -> int:
        """Start fetching a range in the background, as far as there is memory for it. Never waits, never raises.

        ``in_pieces``: it will be read in short ones, so it is to stay in the page cache. Return where it stopped: `end`, or
        the offset from which on to ask again later.
        """
        return self._reader.prefetch(info, start, end, in_pieces=in_pieces)

    async def settled(self, info: SliceInfo, start: int, end: int) -> None:
        """Wait until what `prefetch` started of a range has ended, one way or the other. Never raises."""
        await self._reader.settled(info, start, end)

    def may_have(self, slice_id: SliceId) -> bool:
        """Return False where no byte of a slice is on this node, nor being fetched as far as images know. 0.3 us."""
        return self._cache.may_have(slice_id)

    async def delete(self, slice_id: SliceId, length: int) -> None:
        """Delete the objects and the image of a slice that no map names any more. Idempotent. Errors of the bucket."""
        await self.delete_many([(slice_id, length)])

    async def delete_many(self, slices: Sequence[tuple[SliceId, int]]) -> None:
        """Delete many slices `(id, length)` with as few requests as the store allows; repeat it whole if it fails.

        A put of a staged slice that is under way is waited for, so that nothing of it appears afterwards.
        """
        self._reader.forget(slice_id for slice_id, _ in slices)
        blocks: list[tuple[SliceId, int]] = []
        for slice_id, length in slices:
            if not await self._staged.remove(slice_id):
                continue
            blocks += [(slice_id, index) for index in range(block_count(length, self._config.block_bytes))]
        self._cache.forget(slice_id for slice_id, _ in slices)
        await self._access.delete(blocks)

    def forget(self, slice_id: SliceId) -> None:
        """Drop the image of a slice, unless it is not uploaded yet."""
        self._reader.forget([slice_id])
        self._cache.forget([slice_id])

    async def recover(self) -> list[SliceId]:
        """Queue again for upload what an earlier process staged (durability LOCAL); return those slices. Call it once.

        A slice whose commit never happened is among them: the caller compares with the metadata and deletes it. OSError
        where the directory cannot be read.
        """
        names = await self._staging.find()
        for name in names:
            self._staged.add(name)
        return [name.slice_id for name in names]

    async def drain(self, *, progress: Callable[[int], None] | None = None, timeout_s: float | None = None) -> None:
        """Wait until everything staged is uploaded; `progress` gets the pending bytes now and then.

        BucketUnavailable when `timeout_s` has passed (None: without bound, while the bucket is tried again and again).
        """
        await self._staged.drain(progress=progress, timeout_s=timeout_s)

    @property
    def pending_bytes(self) -> int:
        """Return how many bytes of sealed slices are on this node only."""
        return self._staged.pending_bytes

    def is_staged(self, slice_id: SliceId) -> bool:
        """Return whether a sealed slice is (in part) on this node only."""
        return slice_id in self._staged

    @property
    def cache_dir(self) -> Path:
        """Return the directory that holds this volume's images."""
        return self._directory.root

    @property
    def cache_limit_bytes(self) -> int:
        """Return how much the images may take."""
        return self._evictor.limit_bytes

    def stats(self) -> dict[str, int | float]:
        """Return counters and gauges by metric name without prefix; counters end in `_total`."""
        read, cache = self._reader.counters, self._cache.counters
        return {
            "cache_bytes": self._cache.index.space_bytes + self._staged.held_bytes,
            "cache_limit_bytes": self._evictor.limit_bytes,
            "cache_images": len(self._cache.index),
            "cache_open_descriptors": self._cache.opened.descriptor_count,
            "cache_pending_bytes": self._cache.pending_bytes,
            "cache_hits_total": read.hits,
            "cache_hit_bytes_total": read.hit_bytes,
            "cache_misses_total": read.misses,
            "cache_miss_bytes_total": read.miss_bytes,
            "cache_written_bytes_total": cache.written_bytes,
            "cache_skipped_images_total": cache.skipped,
            "cache_evicted_images_total": cache.evictions,
            "cache_evicted_bytes_total": cache.evicted_bytes,
            "cache_disk_errors_total": cache.disk_errors,
            "cache_damaged_total": cache.damaged,
            "cache_scrubbed_bytes_total": cache.scrubbed_bytes,
            "fetches_total": read.fetches,
            "fetched_bytes_total": read.fetched_bytes,
            "fetches_corrupt_total": read.corrupt,
            "fetches_in_flight": self._reader.fetch_count,
            "prefetches_dropped_total": read.prefetch_dropped,
            "read_memory_bytes": self._reader.memory.used_bytes,
            "write_memory_bytes": self._services.memory.used_bytes,
            "uploads_total": self._uploader.uploads,
            "uploaded_bytes_total": self._uploader.uploaded_bytes,
            "upload_failures_total": self._uploader.failures,
            "staged_slices": len(self._staged),
            "staged_bytes": self._staged.pending_bytes,
            "staged_lost_total": self._staged.damaged,
        }
