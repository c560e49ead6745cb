"""Eviction: keeps the cache within its limit, and the file system's free space above its floor.

Owns the choice of victims: images used longest ago, whole; of a big image that is more than is needed only the blocks that
were used longest ago are punched, so that a file larger than the cache keeps its warm part. Never staged images, which are
not in the index. Runs as one task.

"Used" is exact for images that are not open. Open ones are marked when they are read, and get a second chance: a marked
victim loses its mark and counts as used now.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from chunkstore.background import Executors, wait_for_event
from chunkstore.geometry import MIB, SliceId
from chunkstore.images.cache import ImageCache
from chunkstore.images.disk import Disk, Space
from chunkstore.images.image import Image
from chunkstore.images.index import Entry
from chunkstore.images.sidefile import ABSENT

DEFAULT_SHARE: Final = 0.8
# Smaller ones are removed whole: a punch costs a write, a call and a fragmented file.
_PUNCH_FROM_BYTES: Final = 64 * MIB
_BATCH: Final = 256
_PAUSE_S: Final = 5.0
_RETRY_PAUSE_S: Final = 0.1
# statvfs takes a hop to the executor; at 2 GB/s a cache grows by 1 GB between two of them.
_SPACE_PAUSE_S: Final = 0.5


class Evictor:
    """Evict when there is too much."""

    def __init__(
        self,
        cache: ImageCache,
        *,
        limit_bytes: int | None,
        free_ratio_floor: float,
        held_bytes: Callable[[], int],
        executors: Executors,
        disk: Disk,
        clock: Callable[[], float],
    ) -> None:
        """`held_bytes` says how much lies in the directory beside the images of the index: what is staged."""
        self._cache = cache
        self._limit_bytes = limit_bytes
        self._free_ratio_floor = free_ratio_floor
        self._held_bytes = held_bytes
        self._executors = executors
        self._disk = disk
        self._clock = clock
        self._space: Space | None = None
        self._looked_at = float("-inf")
        self._turn = asyncio.Lock()

    @property
    def limit_bytes(self) -> int:
        """Return the bound on the cache; 80 % of its file system where none is set."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        return int(self._space.total_bytes * DEFAULT_SHARE) if self._space is not None else 1 << 62

    async def run(self) -> None:
        """Watch and evict, until cancelled."""
        while True:
            await wait_for_event(self._cache.has_grown, timeout_s=_PAUSE_S)
            self._cache.has_grown.clear()
            if await self.look() == 0:
                # There is too much, and all of it is in use or about to be uploaded.
                await asyncio.sleep(_RETRY_PAUSE_S)

    async def look(self) -> int | None:
        """Evict what is too much now; return how many bytes were freed, None if there was not too much."""
        now = self._clock()
        if now - self._looked_at >= _SPACE_PAUSE_S or not self._cache.is_writable:
            self._looked_at = now
            await self.measure()
        excess_bytes = self._excess_bytes()
        if excess_bytes <= 0 or not self._cache.index.is_loaded:
            return None
        # A little more, so that not every store is followed by an eviction.
        freed_bytes = await self.evict(excess_bytes + min(self.limit_bytes // 64, 256 * MIB))
        self._looked_at = float("-inf")
        return freed_bytes

    async def measure(self) -> None:
        """Ask the file system for its free space."""
        try:
            self._space = await self._executors.disk(self._disk.space, self._cache.directory.images)
        except OSError as error:
            self._cache.failed(error, SliceId(0))

    def has_room(self, size_bytes: int) -> bool:
        """Return whether so much may be held beside the index, if all images were evicted."""
        if self._held_bytes() + size_bytes > self.limit_bytes:
            return False
        if self._space is None:
            return True
        floor_bytes = self._space.total_bytes * self._free_ratio_floor
        return self._space.free_bytes + self._cache.index.space_bytes - size_bytes >= floor_bytes

    def _excess_bytes(self) -> int:
        over_limit = self._cache.index.space_bytes + self._held_bytes() - self.limit_bytes
        if self._space is None:
            return over_limit
        under_floor = int(self._space.total_bytes * self._free_ratio_floor) - self._space.free_bytes
        return max(over_limit, under_floor)

    async def evict(self, wanted_bytes: int) -> int:
        """Free so many bytes as far as there are images to evict; return how many were freed."""
        async with self._turn:
            return await self._evict(wanted_bytes)

    async def _evict(self, wanted_bytes: int) -> int:
        index = self._cache.index
        freed_bytes = 0
        victims: list[tuple[SliceId, Entry]] = []
        # What has come to the end of the order without being evicted: when it comes up again, all others are gone.
        spared: set[SliceId] = set()
        while freed_bytes < wanted_bytes and (victim := index.oldest()) is not None:
            slice_id, entry = victim
            image = self._cache.opened.get(slice_id)
            if image is not None and image.is_touched:
                image.is_touched = False
                index.touch(slice_id)
                continue
            if slice_id in spared:
                break
            needed_bytes = wanted_bytes - freed_bytes
            is_handed_out = image is not None and image.is_handed_out
            if (
                entry.check is None
                and entry.space_bytes >= max(_PUNCH_FROM_BYTES, 2 * needed_bytes)
                and not is_handed_out
            ):
                punched_bytes = await self._punch(slice_id, entry, needed_bytes)
                freed_bytes += punched_bytes
                # In use at this moment: it is not the one to go.
                spared.add(slice_id)
                index.touch(slice_id)
                continue
            index.remove(slice_id)
            freed_bytes += entry.space_bytes
            victims.append((slice_id, entry))
            if len(victims) == _BATCH:
                await self._cache.evict(victims)
                victims = []
        if victims:
            await self._cache.evict(victims)
        return freed_bytes

    async def _punch(self, slice_id: SliceId, entry: Entry, needed_bytes: int) -> int:
        """Give up the coldest blocks of a big image; 0 if something has it pinned."""
        image = await self._cache.open_big(slice_id, entry.length)
        if image is None:
            return 0
        # Opening counts as a use, which this is not.
        image.is_touched = False
        freed_bytes = await self._cache.punch(image, _coldest_blocks(image, needed_bytes))
        self._cache.counters.evicted_bytes += freed_bytes
        return freed_bytes


def _coldest_blocks(image: Image, needed_bytes: int) -> list[int]:
    """Return the blocks of an image that were used longest ago, as many as hold so many bytes."""
    assert image.states is not None
    assert image.block_used is not None
    chosen: list[int] = []
    for block_index in sorted(range(image.layout.block_count), key=image.block_used.__getitem__):
        frames = image.layout.frames_of_block(block_index)
        held = len(frames) - image.states.count(ABSENT, frames.start, frames.stop)
        if held:
            chosen.append(block_index)
            needed_bytes -= held * image.frame_bytes
            if needed_bytes <= 0:
                break
    return chosen
