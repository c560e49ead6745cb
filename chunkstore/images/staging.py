"""Sealed slices that wait on this disk for their upload: made durable here, and found again after a restart.

Owns the record. The record is the *name* of the image in staged/: slice, length and root digest. It is made after the data
were synced (of an image that was written as a draft: a rename; of one in memory: the file is made under that name at once,
and until its sync has returned nobody was told). So a name is either durable together with its bytes, or its bytes do not
match its root and the slice was never acknowledged, or the disk has lost them; in the last two cases it is set aside.

Syncs of the directory are shared: a sync serves all who made their names before it began.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from chunkstore.background import Executors, TaskSet
from chunkstore.geometry import Buffer
from chunkstore.images.cache import ImageCache
from chunkstore.images.directory import StagedName
from chunkstore.images.disk import Disk
from chunkstore.images.image import write_complete_side
from chunkstore.images.layout import Layout, is_small
from chunkstore.model import SliceInfo


class Staging:
    """Stage slices that are held in memory."""

    def __init__(self, cache: ImageCache, *, executors: Executors, disk: Disk, tasks: TaskSet) -> None:
        """Take the cache that will serve what is staged."""
        self._cache = cache
        self._executors = executors
        self._disk = disk
        self._tasks = tasks
        self._next_sync: asyncio.Task[None] | None = None
        self._sync_turn = asyncio.Lock()

    async def stage(self, info: SliceInfo, name: StagedName, data: Buffer, *, frame_digests: Sequence[bytes]) -> None:
        """Write a slice of one block to staged/; durable when this returns. OSError: nothing of it is left.

        A cancellation leaves it to be finished: it may be staged or not. `data` must not change.
        """
        work = self._stage(info, name, data, frame_digests)
        await asyncio.shield(self._tasks.start(work, name=f"stage slice {info.slice_id}", raises=(OSError,)))

    async def _stage(self, info: SliceInfo, name: StagedName, data: Buffer, frame_digests: Sequence[bytes]) -> None:
        async with self._cache.files.hold([info.slice_id]):
            path = self._cache.directory.staged_image(name)
            try:
                await self._executors.disk(self._write, info, path, data, frame_digests)
                await self._synced()
            except OSError:
                await self._executors.disk(self._disk.unlink, path)
                raise
            self._cache.adopt_staged(name)

    def _write(self, info: SliceInfo, path: str, data: Buffer, frame_digests: Sequence[bytes]) -> None:
        if not is_small(info.length, self._cache.block_bytes):
            side_path = self._cache.directory.side(info.slice_id)
            write_complete_side(
                self._disk,
                side_path,
                slice_id=info.slice_id,
                layout=Layout(info.length, self._cache.block_bytes),
                boot_id=self._cache.boot_id,
                digests=frame_digests,
                is_durable=True,
            )
            self._disk.sync_directory(self._cache.directory.sides)
        descriptor = self._disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            self._disk.pwrite(descriptor, data, 0)
            self._disk.datasync(descriptor)
        finally:
            self._disk.close(descriptor)

    async def _synced(self) -> None:
        """Sync the names in staged/, with all others who ask before it begins."""
        if self._next_sync is None:
            self._next_sync = self._tasks.start(self._sync(), name="sync staged names", raises=(OSError,))
        await asyncio.shield(self._next_sync)

    async def _sync(self) -> None:
        async with self._sync_turn:
            self._next_sync = None
            await self._executors.disk(self._disk.sync_directory, self._cache.directory.staged)

    async def find(self) -> list[StagedName]:
        """Return what an earlier process staged, and make it readable. OSError."""
        names = await self._executors.disk(self._cache.directory.staged_names)
        for name in names:
            self._cache.adopt_staged(name)
        return names
