"""The scrub: reads what lies in the cache again, slowly, and drops what is no longer what was written.

Owns the pace. Runs as one task; reads leave the page cache as it was. Frames are compared with the digests of the side file,
a small image with the 4 bytes of its digest in its name: enough against decay (whoever reads it compares all 16).
Staged images are not for the scrub: their upload verifies them. On its way it removes what crashes have left over.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import Final, TypeVar

from chunkstore.background import Executors
from chunkstore.block import digest_of
from chunkstore.geometry import SliceId
from chunkstore.images.cache import ImageCache
from chunkstore.images.directory import CHECK_BYTES, ImageName
from chunkstore.images.disk import Disk
from chunkstore.images.image import Image, damaged_frames
from chunkstore.images.sidefile import PRESENT

log = logging.getLogger(__name__)

T = TypeVar("T")

_NAMES_AT_ONCE: Final = 256
_PAUSE_BETWEEN_PASSES_S: Final = 3600.0
_PAUSE_BEFORE_FIRST_S: Final = 60.0


class Scrub:
    """Compare images with their digests."""

    def __init__(
        self,
        cache: ImageCache,
        *,
        bytes_per_s: int,
        executors: Executors,
        disk: Disk,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Take the pace."""
        self._cache = cache
        self._bytes_per_s = bytes_per_s
        self._executors = executors
        self._disk = disk
        self._sleep = sleep

    async def run(self) -> None:
        """Scrub again and again, until cancelled."""
        await self._sleep(_PAUSE_BEFORE_FIRST_S)
        while True:
            try:
                await self.scrub()
            except OSError as error:
                self._cache.failed(error, SliceId(0))
            await self._sleep(_PAUSE_BETWEEN_PASSES_S)

    async def scrub(self) -> None:
        """Scrub everything once. OSError where the directory cannot be listed."""
        names = self._cache.directory.image_names()
        while batch := await self._executors.disk(_take, names):
            for name in batch:
                if name.slice_id in self._cache.index:
                    await (self._small(name, name.check) if name.check is not None else self._big(name))
        sides = self._cache.directory.side_ids()
        while orphans := await self._executors.disk(_take, sides):
            for slice_id in orphans:
                if not self._cache.may_have(slice_id):
                    await self._cache.remove_orphan_side(slice_id)

    async def _small(self, name: ImageName, check: int) -> None:
        path = self._cache.directory.image(name.slice_id, name.length, check)
        try:
            is_sound = await self._executors.disk(self._is_sound, path, name.length, check)
        except OSError as error:
            self._cache.failed(error, name.slice_id)
            is_sound = False
        if not is_sound and name.slice_id in self._cache.index:
            self._cache.damaged_small(name.slice_id)
        await self._pace(name.length)

    def _is_sound(self, path: str, length: int, check: int) -> bool:
        try:
            descriptor = self._disk.open(path, os.O_RDONLY)
        except FileNotFoundError:
            # Evicted since it was listed.
            return True
        try:
            data = self._disk.pread_once(descriptor, length + 1, 0)
        finally:
            self._disk.close(descriptor)
        return len(data) == length and int.from_bytes(digest_of(data)[:CHECK_BYTES], "big") == check

    async def _big(self, name: ImageName) -> None:
        image = await self._cache.open_big(name.slice_id, name.length)
        if image is None or image.states is None:
            return
        for block_index in range(image.layout.block_count):
            frames = [f for f in image.layout.frames_of_block(block_index) if image.states[f] == PRESENT]
            # It may be evicted at any await; pinned it is not punched.
            if not frames or not image.is_alive():
                continue
            try:
                damaged = await self._cache.opened.run(image, self._damaged, image, frames)
            except OSError as error:
                self._cache.failed(error, name.slice_id)
                damaged = frames
            if damaged:
                log.warning(
                    "cache: image of slice %d: frames %s differ from their digests; they will be fetched again",
                    *(name.slice_id, damaged),
                )
                await self._cache.drop_frames(image, damaged)
            await self._pace(len(frames) * image.frame_bytes)

    def _damaged(self, image: Image, frames: list[int]) -> list[int]:
        return damaged_frames(self._disk, image.files, image.layout, frames=frames)

    async def _pace(self, size_bytes: int) -> None:
        self._cache.counters.scrubbed_bytes += size_bytes
        await self._sleep(size_bytes / self._bytes_per_s)


def _take(names: Iterator[T]) -> list[T]:
    return list(islice(names, _NAMES_AT_ONCE))
