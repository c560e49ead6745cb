"""The chunk store as the client sees it: write a slice, read a range of one, delete slices. Signatures; bodies follow.

Owns the composition: bucket, images, writing, reading, uploads. Must not know files, inodes or chunk maps.

One event loop, one ChunkStore per volume and process. All methods are called on that loop. Disk work runs on a bounded
executor, codec work on another; what is documented as synchronous never blocks on a disk or on the network.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from chunkstore.buckets import ObjectStore
from chunkstore.geometry import Buffer, SliceId
from chunkstore.model import ChunkStoreConfig, Durability, Sealed, SliceInfo

__all__ = ["ChunkStore", "ChunkStoreConfig", "Durability", "Sealed", "SliceInfo", "SliceWriter"]


class SliceWriter:
    """Build one slice. Made by `ChunkStore.writer`; used by one task at a time, `try_read` and `read` by any.

    A slice grows by `append` only. A block is taken for upload as soon as it is full; from then on its bytes cannot change
    (`mutable_from` moves up). A call that writes and returns None has taken the data; an awaitable must be awaited before the
    next call that writes (it is back-pressure, or a tail that lies on disk), and has taken them when it is done.
    The first `seal` of a slice over the inline limit freezes it: whether it succeeds or not, nothing can be appended after
    that (`is_frozen`), because a PUT that timed out may still arrive and must find the same bytes. Write on in a new slice.
    """

    @property
    def slice_id(self) -> SliceId:
        """Return the id that the slice was opened with."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """Return how many bytes were appended."""
        raise NotImplementedError

    @property
    def mutable_from(self) -> int:
        """Return the first offset that `overwrite` still takes: the start of the last, incomplete block."""
        raise NotImplementedError

    @property
    def is_frozen(self) -> bool:
        """Return whether `seal` has begun, so that only reading, sealing (again) and discarding are left."""
        raise NotImplementedError

    def append(self, data: Buffer) -> Awaitable[None] | None:
        """Add bytes at the end. None: taken, without waiting. An awaitable: await it before writing more.

        A failed upload is kept and reported by `seal`; only where memory is at its bound and the cache disk takes nothing
        does this raise: CacheFull, or what the bucket said. ValueError over 4 GiB - 1. RuntimeError once frozen. After a
        cancellation `length` says how much was taken.
        """
        raise NotImplementedError

    def overwrite(self, offset: int, data: Buffer) -> Awaitable[None] | None:
        """Replace bytes in `[mutable_from, length)`; the same promise as `append`. ValueError outside of that range."""
        raise NotImplementedError

    def try_read(self, start: int, end: int) -> Buffer | None:
        """Return bytes `[start, end)` (cut at `length`) as written so far if that needs no waiting; else None. May be a view: use it at once."""
        raise NotImplementedError

    async def read(self, start: int, end: int) -> Buffer:
        """Return bytes `[start, end)` (cut at `length`) as written so far."""
        raise NotImplementedError

    async def seal(self) -> Sealed:
        """Make the slice immutable and durable as the store's durability says; what it returns is to be committed.

        Up to the inline limit: the bytes come back as `inline`, nothing is stored. OBJECT: all blocks are in the bucket.
        LOCAL: data and the record that they wait for upload are on disk.
        On an error (BucketUnavailable, BucketDenied, BucketFull …) or cancellation nothing is dropped: the writer can be
        read and sealed again; what was uploaded is not sent twice. After success a second call returns the same value.
        An empty slice seals as `inline=b""`.
        """
        raise NotImplementedError

    async def discard(self) -> None:
        """Give the slice up: memory, image and (best effort, in the background) objects go. Idempotent, never raises.

        After a successful seal use `ChunkStore.delete`.
        """
        raise NotImplementedError


class ChunkStore:
    """Store the bytes of one volume: verified reads through local images, writes to bucket or staging."""

    def __init__(
        self,
        config: ChunkStoreConfig,
        *,
        bucket: ObjectStore,
        clock: Callable[[], float] | None = None,
        boot_id: str | None = None,
    ) -> None:
        """Take settings and the bucket, which the caller closes after this store. Touches nothing yet.

        `clock` is a monotonic clock in seconds; `boot_id` stands in for /proc/sys/kernel/random/boot_id in tests.
        """
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        """Lock and index the cache directory, start the background work.

        CacheLocked (EBUSY) names the directory and the process that has it. A directory that cannot be written, or is full,
        is an OSError here; later in life a broken cache is only a miss.
        """
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the background work, sync the presence bits, free the directory. Staged slices stay staged: drain first."""
        raise NotImplementedError

    def writer(self, slice_id: SliceId) -> SliceWriter:
        """Start a new slice. Synchronous, makes no file. The id must be new in the volume."""
        raise NotImplementedError

    def try_read(self, info: SliceInfo, start: int, end: int) -> Buffer | None:
        """Return bytes `[start, end)` of a slice (0 <= start < end <= length) if they are in memory, else None.

        Never blocks. The buffer is read-only to the caller; bytes, bytearray or a view, whatever saves a copy.
        """
        raise NotImplementedError

    async def read(self, info: SliceInfo, start: int, end: int) -> Buffer:
        """Return bytes `[start, end)` of a slice (0 <= start < end <= length), verified against its digests.

        Missing frames are fetched, one fetch per block at a time. ObjectMissing, ObjectCorrupt, BucketUnavailable (after all
        retries) and BucketDenied name the slice and the object key.
        """
        raise NotImplementedError

    def prefetch(self, info: SliceInfo, start: int, end: int) -> None:
        """Start fetching a range in the background; dropped silently when the queue is full. Never raises."""
        raise NotImplementedError

    async def delete(self, slice_id: SliceId, length: int) -> None:
        """Delete the objects and the image of a slice that no map names any more. Idempotent. Errors of the bucket."""
        raise NotImplementedError

    async def delete_many(self, slices: Sequence[tuple[SliceId, int]]) -> None:
        """Delete many slices `(id, length)` with as few requests as the store allows; repeat it whole if it fails."""
        raise NotImplementedError

    def forget(self, slice_id: SliceId) -> None:
        """Drop the image of a slice, unless it is not uploaded yet."""
        raise NotImplementedError

    async def recover(self) -> list[SliceId]:
        """Queue again for upload what an earlier process staged (durability LOCAL); return those slices.

        A slice whose commit never happened is among them: the caller compares with the metadata and deletes it.
        """
        raise NotImplementedError

    async def drain(self, *, progress: Callable[[int], None] | None = None, timeout_s: float | None = None) -> None:
        """Wait until everything staged is uploaded; `progress` gets the pending bytes now and then.

        BucketUnavailable when `timeout_s` has passed (None: without bound, while the bucket is tried again and again).
        """
        raise NotImplementedError

    @property
    def pending_bytes(self) -> int:
        """Return how many bytes of sealed slices are on this node only."""
        raise NotImplementedError

    def is_staged(self, slice_id: SliceId) -> bool:
        """Return whether a sealed slice is (in part) on this node only."""
        raise NotImplementedError

    def stats(self) -> dict[str, int | float]:
        """Return counters and gauges by metric name without prefix (`cache_hits_total`, `cache_bytes` …)."""
        raise NotImplementedError

    @property
    def cache_dir(self) -> Path:
        """Return the directory that holds this volume's images."""
        raise NotImplementedError
