"""Uploading: blocks encoded and put into the bucket, and the queue of staged slices that wait for it.

Owns how many puts run at once, and the life of a staged slice from its seal, or from a restart, until its objects are there:
the promise of durability `local`. Must not know who wrote the bytes.

A staged slice is uploaded by one task. It reads each block from the image, encodes it and compares the digest with the
committed one before anything is sent; after a restart, where only the root digest is known, all blocks are read once more
before the first is sent. An image that fails this is set aside and reported, never uploaded. The order at the end: all puts
have returned -> the image leaves staged/. A crash in between uploads the same bytes again.

Interleavings. `_staged` is changed without an await. Deleting a staged slice stops its task between two blocks and *waits*
for the put that is under way, so that no object appears after the delete; it does not wait for the bucket to come back.
While the bucket is away, each task waits longer and longer, at most a minute; `hurry` wakes all.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from chunkstore.access import BlockAccess
from chunkstore.background import Executors, TaskSet, wait_for_event
from chunkstore.block import DIGEST_BYTES, digest_of, encode, read_header
from chunkstore.errors import AtollError, BucketUnavailable, ObjectCorrupt
from chunkstore.geometry import Buffer, SliceId, block_count, block_key, block_length
from chunkstore.images.cache import ImageCache
from chunkstore.images.directory import StagedName, root_of
from chunkstore.images.disk import Disk
from chunkstore.model import ChunkStoreConfig

log = logging.getLogger(__name__)

# Encoding so little on the event loop costs about what the hop to a thread does: 64 KiB take 30 us where they do not shrink,
# as training data mostly do not, and 280 us of text.
_ENCODE_HERE_BYTES: Final = 65536
_SLICES_AT_ONCE: Final = 4
_BLOCKS_AT_ONCE: Final = 4
# A disk that cannot read a staged image so many times has lost it.
_DISK_ATTEMPTS: Final = 5
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 60.0
_PROGRESS_PAUSE_S: Final = 0.5


class Encoded(NamedTuple):
    """Hold a block as it is stored, its digest, and those of its frames."""

    payload: Buffer
    digest: bytes
    frame_digests: tuple[bytes, ...]


class Uploader:
    """Encode blocks and put them, so many at once."""

    def __init__(self, config: ChunkStoreConfig, *, access: BlockAccess, executors: Executors) -> None:
        """Take what reaches the bucket."""
        self._config = config
        self._access = access
        self._executors = executors
        # The store behind has slots too, but waiting for one of those counts against the budget of the put.
        self._slots = asyncio.Semaphore(config.max_uploads)
        self.uploads = 0
        self.uploaded_bytes = 0
        self.failures = 0

    async def encode(self, raw: Buffer) -> Encoded:
        """Return a block encoded. `raw` must not change until the thread is done with it."""
        if len(raw) <= _ENCODE_HERE_BYTES:
            return self.encode_now(raw)
        return await self._executors.codec(self.encode_now, raw)

    def encode_now(self, raw: Buffer) -> Encoded:
        """Return a block encoded; for the codec executor."""
        payload, block_digest = encode(raw, codec=self._config.codec)
        header = read_header(payload, expected_digest=block_digest, raw_length=len(raw))
        return Encoded(payload, block_digest, tuple(frame.digest for frame in header.frames))

    async def put(self, slice_id: SliceId, block_index: int, payload: Buffer) -> None:
        """Put a block; errors name slice and object."""
        key = block_key(self._config.volume_uuid, slice_id, block_index)
        try:
            async with self._slots:
                await self._access.put(slice_id, block_index, payload)
        except AtollError as error:
            self.failures += 1
            message = f"slice {slice_id}: {'' if key in error.message else f'object {key}: '}{error.message}"
            raise type(error)(message, errno=error.errno, retryable=error.retryable) from error
        self.uploads += 1
        self.uploaded_bytes += len(payload)


class _Staged:
    """Hold a staged slice. `digests` is None until they were computed again after a restart."""

    __slots__ = ("digests", "done_blocks", "failures", "is_doomed", "is_tried", "name", "task")

    def __init__(self, name: StagedName, digests: bytes | None) -> None:
        self.name = name
        self.digests = digests
        self.done_blocks: set[int] = set()
        self.failures = 0
        self.is_doomed = False
        self.is_tried = digests is None
        self.task: asyncio.Task[None] | None = None


class StagedUploads:
    """Upload what is staged, in the background, for as long as it takes."""

    def __init__(
        self,
        config: ChunkStoreConfig,
        *,
        uploader: Uploader,
        cache: ImageCache,
        executors: Executors,
        disk: Disk,
        tasks: TaskSet,
    ) -> None:
        """Take what encodes and puts."""
        self._block_bytes = config.block_bytes
        self._uploader = uploader
        self._cache = cache
        self._executors = executors
        self._disk = disk
        self._tasks = tasks
        self._staged: dict[SliceId, _Staged] = {}
        self._turns = asyncio.Semaphore(_SLICES_AT_ONCE)
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self.pending_bytes = 0
        self.held_bytes = 0
        self.damaged = 0
        self._last_error: AtollError | OSError | None = None

    def __contains__(self, slice_id: SliceId) -> bool:
        """Return whether a slice is staged."""
        return slice_id in self._staged

    def __len__(self) -> int:
        """Return how many slices are staged."""
        return len(self._staged)

    def add(self, name: StagedName, *, digests: bytes | None = None) -> None:
        """Queue a staged slice, whose image the cache has. `digests` None after a restart."""
        staged = _Staged(name, digests)
        self._staged[name.slice_id] = staged
        self.pending_bytes += name.length
        self.held_bytes += name.length
        staged.task = self._tasks.start(self._run(staged), name=f"upload staged slice {name.slice_id}")

    async def remove(self, slice_id: SliceId) -> bool:
        """Give a staged slice up: nothing is sent of it after this returns, and its image goes.

        Return False if nothing was ever sent, so that there is no object to delete.
        """
        staged = self._staged.get(slice_id)
        if staged is None:
            return True
        staged.is_doomed = True
        self._wake_all()
        assert staged.task is not None
        await asyncio.wait([staged.task])
        return staged.is_tried

    def hurry(self) -> None:
        """Try again now what waits for the bucket to come back."""
        self._wake_all()

    def _wake_all(self) -> None:
        self._wake.set()
        self._wake = asyncio.Event()

    async def drain(self, *, progress: Callable[[int], None] | None, timeout_s: float | None) -> None:
        """Wait until nothing is staged; BucketUnavailable when the time is over."""
        self.hurry()
        try:
            async with asyncio.timeout(timeout_s):
                while self._staged:
                    if progress is not None:
                        progress(self.pending_bytes)
                    self._changed.clear()
                    await wait_for_event(self._changed, timeout_s=_PROGRESS_PAUSE_S)
        except TimeoutError as error:
            reason = "" if self._last_error is None else f" ({self._last_error})"
            raise BucketUnavailable(
                f"{len(self._staged)} slices with {self.pending_bytes} bytes are not uploaded after {timeout_s:g} s"
                f"{reason}; they stay in {self._cache.directory.staged} and go on with the next mount"
            ) from error
        if progress is not None:
            progress(0)

    async def _run(self, staged: _Staged) -> None:
        name = staged.name
        try:
            while not staged.is_doomed:
                try:
                    async with self._turns:
                        await self._upload(staged)
                    if not staged.is_doomed:
                        await self._cache.unstage(name)
                        return
                except ObjectCorrupt as error:
                    await self._give_up(staged, error)
                    return
                except (AtollError, OSError) as error:
                    staged.failures += 1
                    if isinstance(error, OSError) and staged.failures >= _DISK_ATTEMPTS:
                        await self._give_up(staged, error)
                        return
                    await self._pause(staged, error)
                except Exception as error:
                    # Given up, it would be forgotten until the next start although only this disk has it.
                    log.exception("staged slice %d", name.slice_id)
                    staged.failures += 1
                    await self._pause(staged, AtollError(repr(error)))
            await self._cache.remove_staged(name)
        finally:
            self._finish(staged)

    async def _pause(self, staged: _Staged, error: AtollError | OSError) -> None:
        """Wait before the next attempt, or until somebody hurries."""
        self._last_error = error
        if staged.is_doomed:
            return
        pause_s = min(_FIRST_PAUSE_S * 2 ** (staged.failures - 1), _LONGEST_PAUSE_S)
        log.warning("staged slice %d: %s; trying again in %.0f s", staged.name.slice_id, error, pause_s)
        await wait_for_event(self._wake, timeout_s=pause_s)

    async def _give_up(self, staged: _Staged, error: AtollError | OSError) -> None:
        """Put an image aside that cannot be uploaded: its slice is lost unless somebody can read it there."""
        self.damaged += 1
        path = self._cache.directory.damaged_image(staged.name)
        log.error("staged slice %d is lost: %s; what is left of it is kept as %s", staged.name.slice_id, error, path)
        await self._cache.set_aside(staged.name)

    def _finish(self, staged: _Staged) -> None:
        """Forget a staged slice. Where the store is closing instead, its image stays staged on the disk."""
        del self._staged[staged.name.slice_id]
        self.held_bytes -= staged.name.length
        self.pending_bytes -= staged.name.length - sum(self._length(staged, index) for index in staged.done_blocks)
        self._changed.set()

    def _length(self, staged: _Staged, index: int) -> int:
        return block_length(staged.name.length, index, self._block_bytes)

    async def _upload(self, staged: _Staged) -> None:
        """Upload the blocks that are not done. ObjectCorrupt if the image is not what was sealed."""
        slice_id, length, root = staged.name
        count = block_count(length, self._block_bytes)
        if staged.digests is None:
            digests = [
                await self._executors.codec(digest_of, await self._read(staged, index)) for index in range(count)
            ]
            staged.digests = b"".join(digests)
            if root_of(staged.digests) != root:
                raise ObjectCorrupt(f"slice {slice_id}: the staged image is not what was sealed")
        missing = iter([index for index in range(count) if index not in staged.done_blocks])
        senders = (self._send(staged, missing, staged.digests) for _ in range(_BLOCKS_AT_ONCE))
        # All end by themselves: a put that is cancelled may still arrive, after the delete of its slice.
        for result in await asyncio.gather(*senders, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    async def _send(self, staged: _Staged, missing: Iterator[int], digests: bytes) -> None:
        """Upload blocks until there are no more."""
        slice_id = staged.name.slice_id
        for index in missing:
            if staged.is_doomed:
                return
            encoded = await self._uploader.encode(await self._read(staged, index))
            if encoded.digest != digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]:
                raise ObjectCorrupt(f"slice {slice_id}: block {index} of the staged image is not what was sealed")
            staged.is_tried = True
            await self._uploader.put(slice_id, index, encoded.payload)
            staged.done_blocks.add(index)
            self.pending_bytes -= self._length(staged, index)
            self._changed.set()

    async def _read(self, staged: _Staged, index: int) -> bytes:
        path = self._cache.directory.staged_image(staged.name)
        size_bytes = self._length(staged, index)
        data = await self._executors.disk(self._read_file, path, index * self._block_bytes, size_bytes)
        if len(data) != size_bytes:
            raise ObjectCorrupt(f"slice {staged.name.slice_id}: the staged image ends within block {index}")
        return data

    def _read_file(self, path: str, offset: int, size_bytes: int) -> bytes:
        try:
            descriptor = self._disk.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return b""
        try:
            return self._disk.pread(descriptor, size_bytes, offset)
        finally:
            self._disk.close(descriptor)
