"""The image of a slice that is being written: a file in new/, until it is published or staged under its name.

Owns a descriptor, which the image gets a duplicate of: a read that a thread has begun keeps its own. Made at the first write.
A draft that fails once (full or broken disk) takes nothing more: `is_broken`; what it took before can still be read, and is
true unless the disk could not write back (`sync` tells). Writes of different ranges may run at the same time. Nothing in new/
outlives the process, because nothing names its bytes before the slice is sealed.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from chunkstore.background import Executors
from chunkstore.geometry import MIB, Buffer, SliceId
from chunkstore.images.cache import ImageCache
from chunkstore.images.directory import StagedName, check_of
from chunkstore.images.disk import Disk
from chunkstore.images.image import Image, Opened, write_complete_side
from chunkstore.images.layout import Layout, is_small
from chunkstore.images.sidefile import PRESENT
from chunkstore.model import SliceInfo

T = TypeVar("T")

# Whole blocks of big files go to the disk at once and leave the page cache: the kernel keeps a copy of what was just written as
# pages of the mounted file anyway (ADR 0013).
_WRITE_THROUGH_BYTES: Final = MIB


class Draft:
    """Write one slice to the local disk. `publish` and `stage` run in tasks that are not cancelled."""

    def __init__(self, slice_id: SliceId, *, cache: ImageCache, executors: Executors, disk: Disk) -> None:
        """Make no file yet."""
        self._slice_id = slice_id
        self._cache = cache
        self._executors = executors
        self._disk = disk
        self._path = cache.directory.draft(slice_id)
        self._opening: asyncio.Future[int] | None = None
        self._descriptor: int | None = None
        self._pins = 0
        self._is_closed = False
        self._is_handed_over = False
        self._has_lost_bytes = False
        self.is_broken = False

    @property
    def exists(self) -> bool:
        """Return whether there is a file, or was one until it was published, staged or discarded."""
        return self._opening is not None

    async def write(self, offset: int, data: Buffer) -> bool:
        """Write bytes; False if the disk did not take them. `data` must not change until the thread is done with it."""
        if self.is_broken or not self._cache.is_writable:
            # With a gap it can never become an image, so nothing more is written to it.
            self.is_broken = True
            return False
        try:
            descriptor = await self._opened()
            is_big = len(data) >= _WRITE_THROUGH_BYTES
            await self._run(self._write_through if is_big else self._disk.pwrite, descriptor, data, offset)
        except OSError as error:
            self.is_broken = True
            self._cache.failed(error, self._slice_id)
            return False
        return True

    def _write_through(self, descriptor: int, data: Buffer, offset: int) -> None:
        """Write bytes to the disk, so that they take no room in the page cache afterwards."""
        self._disk.pwrite(descriptor, data, offset)
        self._sync(descriptor)
        self._disk.drop_pages(descriptor, offset, len(data))

    def _sync(self, descriptor: int) -> None:
        try:
            self._disk.datasync(descriptor)
        except OSError:
            # The kernel says so once, and it may be about any bytes of the file.
            self._has_lost_bytes = True
            raise

    async def sync(self) -> None:
        """Make sure that what reads returned is what was written. OSError if the disk failed to write anything back."""
        await self._run(self._sync, await self._opened())
        if self._has_lost_bytes:
            raise OSError(errno.EIO, "the cache disk failed to write back", self._path)

    def try_read(self, start: int, end: int) -> Buffer | None:
        """Return bytes that were written, if they are in memory."""
        if self._descriptor is None:
            return None
        buffer = bytearray(end - start)
        return buffer if self._disk.try_pread(self._descriptor, buffer, start) == end - start else None

    async def read(self, start: int, end: int) -> bytes:
        """Return bytes that were written. OSError, also once the draft was handed over or discarded."""
        return await self._run(self._disk.pread, await self._opened(), end - start, start)

    async def publish(self, info: SliceInfo, *, frame_digests: Sequence[bytes]) -> None:
        """Make it the cached image of the sealed slice, or discard it if that fails."""
        descriptor = await self._opened()
        async with self._cache.files.hold([self._slice_id]):
            try:
                image = await self._executors.disk(self._publish, descriptor, info, frame_digests)
            except OSError as error:
                self._cache.failed(error, self._slice_id)
                self.discard()
                return
            self._close(is_handed_over=True)
            self._cache.adopt(image)

    def _publish(self, descriptor: int, info: SliceInfo, frame_digests: Sequence[bytes]) -> Image:
        check = check_of(info, self._cache.block_bytes)
        path = self._cache.directory.image(info.slice_id, info.length, check)
        self._write_side(info, frame_digests, is_durable=False)
        self._disk.rename(self._path, path)
        return self._image(descriptor, info)

    async def stage(self, info: SliceInfo, name: StagedName, *, frame_digests: Sequence[bytes]) -> None:
        """Make it a staged image, durable when this returns. OSError: it is a draft as before."""
        descriptor = await self._opened()
        async with self._cache.files.hold([self._slice_id]):
            image = await self._executors.disk(self._stage, descriptor, info, name, frame_digests)
            self._close(is_handed_over=True)
            self._cache.adopt_staged(name, image)

    def _stage(self, descriptor: int, info: SliceInfo, name: StagedName, frame_digests: Sequence[bytes]) -> Image:
        """Sync data and side file, then give it the name that promises both, then sync the names."""
        directory = self._cache.directory
        path = directory.staged_image(name)
        self._disk.datasync(descriptor)
        if self._write_side(info, frame_digests, is_durable=True):
            self._disk.sync_directory(directory.sides)
        self._disk.rename(self._path, path)
        try:
            self._disk.sync_directory(directory.staged)
            return self._image(descriptor, info)
        except BaseException:
            self._disk.rename(path, self._path)
            raise

    def _write_side(self, info: SliceInfo, frame_digests: Sequence[bytes], *, is_durable: bool) -> bool:
        """Make the side file if it is a big image; return whether it is."""
        if is_small(info.length, self._cache.block_bytes):
            return False
        write_complete_side(
            self._disk,
            self._cache.directory.side(info.slice_id),
            slice_id=info.slice_id,
            layout=Layout(info.length, self._cache.block_bytes),
            boot_id=self._cache.boot_id,
            digests=frame_digests,
            is_durable=is_durable,
        )
        return True

    def _image(self, descriptor: int, info: SliceInfo) -> Image:
        check = check_of(info, self._cache.block_bytes)
        layout = Layout(info.length, self._cache.block_bytes)
        if check is not None:
            return Image(info.slice_id, layout, Opened(self._disk.duplicate(descriptor), None, None), check=check)
        side = self._disk.open(self._cache.directory.side(info.slice_id), os.O_RDWR)
        try:
            data = self._disk.duplicate(descriptor)
        except BaseException:
            self._disk.close(side)
            raise
        return Image(info.slice_id, layout, Opened(data, side, bytearray((PRESENT,)) * layout.frame_count), check=None)

    def discard(self) -> None:
        """Remove the file, after the threads that use it, unless it was handed over. Idempotent."""
        self._close(is_handed_over=False)

    def _close(self, *, is_handed_over: bool) -> None:
        """Take no more calls; the descriptor goes after the threads that use it."""
        if not self._is_closed:
            self._is_closed = True
            self._is_handed_over = is_handed_over
        if self._pins == 0:
            self._let_go()

    def _let_go(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            # Nobody waits for it: the descriptor is ours alone now, and the name is never used again.
            work = self._executors.disk(self._remove, descriptor)
            self._cache.start(work, name=f"close draft of slice {self._slice_id}")

    def _remove(self, descriptor: int) -> None:
        try:
            if not self._is_handed_over:
                self._disk.unlink(self._path)
        except OSError:
            # Emptied at the next start.
            pass
        finally:
            self._disk.close(descriptor)

    async def _opened(self) -> int:
        if self._opening is None:
            self._opening = self._start(self._disk.open, self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            self._opening.add_done_callback(self._note_opened)
        descriptor = await asyncio.shield(self._opening)
        if self._is_closed:
            # The number may be that of another file by now.
            raise OSError(errno.EBADF, "the draft is closed", self._path)
        return descriptor

    def _note_opened(self, opening: asyncio.Future[int]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self._descriptor = opening.result()
            if self._is_closed and self._pins == 0:
                self._let_go()

    def _start(self, call: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Start disk work; the file stays open until it is done."""
        self._pins += 1
        job = self._executors.start_disk(call, *args)
        job.add_done_callback(self._unpin)
        return job

    async def _run(self, call: Callable[..., T], *args: object) -> T:
        return await asyncio.shield(self._start(call, *args))

    def _unpin(self, job: asyncio.Future[T]) -> None:
        self._pins -= 1
        if not job.cancelled():
            job.exception()
        if self._is_closed and self._pins == 0:
            self._let_go()
