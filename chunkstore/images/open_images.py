"""The images that are open: bounded descriptors, and threads that use them.

Owns when a descriptor may be closed: never while a thread has it (`pins`), also not when the coroutine that started the
thread was cancelled, because a closed number is reused at once and the thread would read or write another file.
All on the event loop; each method is atomic for lack of an await.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

from chunkstore.background import Executors, TaskSet
from chunkstore.geometry import SliceId
from chunkstore.images.disk import Disk
from chunkstore.images.image import Image

log = logging.getLogger(__name__)

T = TypeVar("T")

# Closed together, in one hop to the executor.
_CLOSE_BATCH: Final = 32


class ImageGone(Exception):
    """Say that an image was closed or dropped since it was looked up: look again."""


class OpenImages:
    """Keep images open, as many as the bound allows."""

    def __init__(
        self,
        *,
        executors: Executors,
        disk: Disk,
        tasks: TaskSet,
        max_descriptors: int,
        used: Callable[[SliceId], None],
        lost: Callable[[Image], None],
    ) -> None:
        """Call `used` for an image that was read since it was last asked for, `lost` for one whose bytes were not written."""
        self._executors = executors
        self._disk = disk
        self._tasks = tasks
        self._max_descriptors = max_descriptors
        self._used = used
        self._lost = lost
        self._images: OrderedDict[SliceId, Image] = OrderedDict()
        self._descriptors = 0
        self.get = self._images.get

    def __contains__(self, slice_id: SliceId) -> bool:
        """Return whether the image of a slice is open."""
        return slice_id in self._images

    def __iter__(self) -> Iterator[Image]:
        """Yield the open images."""
        return iter(self._images.values())

    @property
    def descriptor_count(self) -> int:
        """Return how many descriptors are open, those of dropped images not counted."""
        return self._descriptors

    def add(self, image: Image) -> None:
        """Keep an image open; close others if there are too many."""
        assert image.slice_id not in self._images
        self._images[image.slice_id] = image
        self._descriptors += image.descriptor_count
        if self._descriptors > self._max_descriptors:
            self._close_some()

    def bury(self, slice_id: SliceId) -> None:
        """Take an image out, because its name goes; it is closed when its last thread is done."""
        image = self._images.pop(slice_id, None)
        if image is not None:
            image.bury()
            self._descriptors -= image.descriptor_count
            if image.pins == 0:
                self._tasks.start(self._close([image]), name="close a dropped image")

    def start(self, image: Image, call: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Start disk work with an image pinned until the thread is done. Await it through `asyncio.shield`.

        ImageGone if it was closed or dropped at an await since it was looked up: its descriptor may be another file's now.
        """
        if not image.is_alive():
            raise ImageGone
        image.pins += 1
        job = self._executors.start_disk(call, *args)
        job.add_done_callback(lambda done: self._ended(image, done))
        return job

    async def run(self, image: Image, call: Callable[..., T], *args: object) -> T:
        """Run disk work like `start`; a cancellation leaves it running, and the image pinned, to its end."""
        return await asyncio.shield(self.start(image, call, *args))

    @contextmanager
    def pinned(self, image: Image) -> Iterator[None]:
        """Keep an image pinned over awaits of the caller. ImageGone like `start`."""
        if not image.is_alive():
            raise ImageGone
        image.pins += 1
        try:
            yield
        finally:
            self._unpin(image)

    def _ended(self, image: Image, job: asyncio.Future[T]) -> None:
        if not job.cancelled():
            # Whoever waits gets it too; but nobody may be waiting any more.
            job.exception()
        self._unpin(image)

    def _unpin(self, image: Image) -> None:
        image.pins -= 1
        if image.is_buried() and image.pins == 0:
            self._tasks.start(self._close([image]), name="close a dropped image")

    def _close_some(self) -> None:
        """Close images that were not read since the last look, the oldest first, to a batch below the bound."""
        bound = self._max_descriptors - min(_CLOSE_BATCH, self._max_descriptors // 4)
        closing: list[Image] = []
        # Each is looked at twice at most: the first look takes the mark of having been read.
        for _ in range(2 * len(self._images)):
            if self._descriptors <= bound:
                break
            slice_id, image = next(iter(self._images.items()))
            self._images.move_to_end(slice_id)
            if image.is_touched:
                image.is_touched = False
                self._used(slice_id)
            elif image.pins == 0 and image.punching is None and not image.is_handed_out:
                del self._images[slice_id]
                self._descriptors -= image.descriptor_count
                image.note_closed()
                closing.append(image)
        if closing:
            self._tasks.start(self._close(closing), name="close images")

    async def _close(self, closing: Sequence[Image]) -> None:
        for image in await self._executors.disk(self._close_files, closing):
            self._lost(image)

    def _close_files(self, closing: Sequence[Image]) -> list[Image]:
        """Close descriptors; return the images whose bytes did not reach the disk."""
        lost = []
        for image in closing:
            try:
                if image.is_dirty and not image.is_buried():
                    self._disk.datasync(image.descriptor)
            except OSError as error:
                log.warning("cache: slice %d: writing back failed (%s); the image is dropped", image.slice_id, error)
                lost.append(image)
            finally:
                self._disk.close(image.descriptor)
                if image.side is not None:
                    self._disk.close(image.side)
        return lost

    async def close(self) -> None:
        """Close all, after the threads that use them."""
        images = list(self._images.values())
        self._images.clear()
        self._descriptors = 0
        idle = [image for image in images if image.pins == 0]
        for image in images:
            image.note_closed()
            if image.pins:
                image.bury()
        await self._close(idle)
