"""The cache of images: what the rest of chunkstore reads from, stores into and adopts images into.

Owns the index of all images, the order of operations on their files, and the rule that a broken cache is a miss: no method
raises for the sake of the cache disk. Must not know the bucket.

Interleavings. Everything that is not a call on the disk executor runs on the event loop, without an await between a decision
and the change that follows from it:
- *Read*: `try_read` looks at the states and reads, with no await. `read` looks at the states and pins the image before it
  gives the descriptor to a thread; only the end of that thread unpins, also when the reader is cancelled. Descriptors are
  closed, and frames punched, only at zero pins. So a read sees all of its frames as they were, or is a miss.
- *Eviction*: clear the state, then write that to the side file, then punch. From the moment of the first step reads miss; a
  store to that image waits for `punching`, and stays pinned until its frames are marked, so no newly fetched frame is punched.
  A whole image is unlinked; a reader that has it pinned goes on with the descriptor.
- *Files of one slice* are made, opened by name, renamed and removed by one task at a time (`Exclusive`), so a removal never
  takes the file that a later fetch has made. Such tasks belong to the cache and are never cancelled, only waited for: a
  reader that is cancelled stops waiting for an opening, and nothing leaks.
- *Forget against store*: forgetting marks the open image dead and removes the files after whatever is under way; a store
  that is under way then writes to a file without a name, and reports that nothing is kept.
- *Write back errors*: a page that could not be written is dropped by the kernel and would be read back as something old.
  Every big image is therefore synced some seconds after it was written, and before it is closed; a failure drops the image.
  Small ones need none of that: each read from the disk is verified.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from array import array
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Final
from uuid import UUID

from chunkstore.background import Executors, TaskSet
from chunkstore.errors import FormatUnsupported
from chunkstore.geometry import Buffer, SliceId
from chunkstore.images import image as image_files
from chunkstore.images.directory import CacheDirectory, StagedName, check_of
from chunkstore.images.disk import Disk
from chunkstore.images.exclusive import Exclusive
from chunkstore.images.image import Image, Opened, Run
from chunkstore.images.index import Entry, FoundImages, ImageIndex, big_entry, found_images, small_entry
from chunkstore.images.layout import Layout, is_small
from chunkstore.images.open_images import ImageGone, OpenImages
from chunkstore.images.pending import PendingImage, PendingImages
from chunkstore.images.sidefile import ABSENT, PRESENT, UNCHECKED
from chunkstore.model import SliceInfo

log = logging.getLogger(__name__)

# How long nothing is written after the disk was full, so that eviction gets somewhere.
_FULL_PAUSE_S: Final = 1.0
_LOG_PAUSE_S: Final = 60.0
_SETTLE_S: Final = 60.0
_SYNC_PAUSE_S: Final = 10.0
# An image may be closed between its opening and the turn of who asked for it, if very many are opened at once.
_LOOKS: Final = 100


class CacheCounters:
    """Count what happened since the start."""

    __slots__ = ("damaged", "disk_errors", "evicted_bytes", "evictions", "scrubbed_bytes", "skipped", "written_bytes")

    def __init__(self) -> None:
        """Start at zero."""
        self.written_bytes = 0
        self.skipped = 0
        self.evictions = 0
        self.evicted_bytes = 0
        self.disk_errors = 0
        self.damaged = 0
        self.scrubbed_bytes = 0


class ImageCache:
    """Keep images of slices. All methods run on the event loop; those that are not coroutines never block."""

    def __init__(
        self,
        directory: CacheDirectory,
        *,
        block_bytes: int,
        boot_id: UUID,
        executors: Executors,
        disk: Disk,
        clock: Callable[[], float],
        max_descriptors: int,
    ) -> None:
        """Take an opened directory. What lies in it is looked for by name until `load` has run."""
        self.directory = directory
        self.index = ImageIndex()
        self.counters = CacheCounters()
        self.has_grown = asyncio.Event()
        """Set when something was written, or the disk was full: whoever evicts looks."""
        self.block_bytes = block_bytes
        self.boot_id = boot_id
        self._executors = executors
        self._disk = disk
        self._clock = clock
        self._tasks = TaskSet()
        self.files = Exclusive()
        self.opened = OpenImages(
            executors=executors,
            disk=disk,
            tasks=self._tasks,
            max_descriptors=max_descriptors,
            used=self.index.touch,
            lost=lambda image: self.forget([image.slice_id]),
        )
        self._opening: dict[SliceId, tuple[SliceInfo, asyncio.Task[Image | None]]] = {}
        self._pending = PendingImages(tasks=self._tasks, write=self._write_pending)
        self._staged: dict[SliceId, StagedName] = {}
        self._tick = 0
        self._full_until = float("-inf")
        self._logged: dict[int, float] = {}

    # --- reading

    def try_read(self, slice_id: SliceId, start: int, end: int) -> Buffer | None:
        """Return bytes of an image if they are in memory, else None. 3 us for 4 KiB, 90 us for 1 MiB."""
        image = self.opened.get(slice_id)
        if image is None:
            return self._pending.read(slice_id, start, end)
        if not image.has(start, end):
            return None
        buffer = bytearray(end - start)
        if self._disk.try_pread(image.descriptor, buffer, start) != end - start:
            return None
        image.is_touched = True
        if image.block_used is not None:
            image.block_used[start // self.block_bytes] = self._tick
        return buffer

    async def read(self, info: SliceInfo, start: int, end: int) -> Buffer | None:
        """Return bytes of an image, None if not all of them are there and proven."""
        for _ in range(_LOOKS):
            if not self.may_have(info.slice_id):
                return None
            image = self.opened.get(info.slice_id)
            if image is None:
                if (waiting := self._pending.read(info.slice_id, start, end)) is not None:
                    return waiting
                image = await self._open(info)
                if image is None:
                    return None
                if (data := self.try_read(info.slice_id, start, end)) is not None:
                    return data
            try:
                if image.states is None:
                    return await self._read_small(image, info, start=start, end=end)
                return await self._read_big(image, info, start=start, end=end)
            except ImageGone:
                # Closed to make room for others, or dropped, since it was looked up.
                continue
            except OSError as error:
                self.failed(error, info.slice_id)
                self.forget([info.slice_id])
                return None
        return None

    def may_have(self, slice_id: SliceId) -> bool:
        """Return False where there is certainly no image. 0.3 us, and 1 us per 16,384 images not used lately."""
        return (
            slice_id in self.opened
            or slice_id in self._pending
            or slice_id in self._staged
            or not self.index.is_loaded
            or slice_id in self.index
        )

    def absent_frames(self, info: SliceInfo, frames: range) -> list[int]:
        """Return those of the frames that are certainly absent as far as memory tells: all where no image is open."""
        image = self.opened.get(info.slice_id)
        if image is None:
            return [] if info.slice_id in self._pending else list(frames)
        if image.states is None:
            return []
        return [frame for frame in frames if image.states[frame] == ABSENT]

    def read_ahead(self, slice_id: SliceId, start: int, end: int) -> None:
        """Ask the kernel to load a range of an open image into the page cache, in the background."""
        image = self.opened.get(slice_id)
        if image is not None and image.has(start, end):
            self.opened.start(image, self._disk.will_need, image.descriptor, start, end - start)

    async def _read_small(self, image: Image, info: SliceInfo, *, start: int, end: int) -> Buffer | None:
        """Read and verify all of a small image, as not all of its pages were in memory."""
        data = await self.opened.run(image, self._reread, image.descriptor, info)
        if data is None:
            self._damaged(info.slice_id, "bytes differ from their digest")
            return None
        image.is_touched = True
        return memoryview(data)[start:end]

    def _reread(self, descriptor: int, info: SliceInfo) -> bytes | None:
        return image_files.read_small(self._disk, descriptor, length=info.length, expected_digest=info.digests)

    async def _read_big(self, image: Image, info: SliceInfo, *, start: int, end: int) -> Buffer | None:
        assert image.states is not None
        assert image.block_used is not None
        frames = image.layout.frames_of_range(start, end)
        if UNCHECKED in image.states[frames.start : frames.stop]:
            await self._check(image, info, frames)
        if not image.has(start, end):
            return None
        data = await self.opened.run(image, self._disk.pread, image.descriptor, end - start, start)
        if len(data) != end - start:
            self._damaged(info.slice_id, "ends too early")
            return None
        image.is_touched = True
        image.block_used[start // self.block_bytes] = self._tick
        return data

    async def _check(self, image: Image, info: SliceInfo, frames: range) -> None:
        """Prove frames that an earlier boot has written; what cannot be proven becomes absent."""
        assert image.states is not None
        by_block: dict[int, list[int]] = {}
        for frame in frames:
            if image.states[frame] == UNCHECKED:
                by_block.setdefault(image.layout.block_of_frame(frame), []).append(frame)
        for block_index, wanted in by_block.items():
            proven = await self.opened.run(image, self._check_frames, image, block_index, wanted, info)
            for frame in wanted:
                # A fetch may have written it meanwhile; then it is PRESENT already.
                if image.states[frame] == UNCHECKED:
                    image.mark(frame, 1, PRESENT if frame in proven else ABSENT)
            if len(proven) < len(wanted):
                lost = len(wanted) - len(proven)
                log.warning(
                    "cache: slice %d: %d of %d frames of block %d did not outlast the boot that wrote them",
                    *(info.slice_id, lost, len(wanted), block_index),
                )

    def _check_frames(self, image: Image, block_index: int, frames: Sequence[int], info: SliceInfo) -> list[int]:
        return image_files.check_frames(
            self._disk,
            image.files,
            image.layout,
            block_index=block_index,
            frames=frames,
            expected_digest=info.digest(block_index),
        )

    # --- opening and making

    async def _open(self, info: SliceInfo, *, may_create: bool = False) -> Image | None:
        """Return the open image of a slice, opening or making it in a task that outlives the caller."""
        while True:
            if (image := self.opened.get(info.slice_id)) is not None:
                return image
            under_way = self._opening.get(info.slice_id)
            # One that is done is not waited for: that takes no turn of the loop, and its callback may not have run yet.
            if under_way is None or under_way[1].done():
                work = self._open_by_name(info, may_create=may_create)
                task = self._tasks.start(work, name=f"open image of slice {info.slice_id}")
                self._opening[info.slice_id] = info, task
                task.add_done_callback(lambda ended: self._forget_opening(info.slice_id, ended))
                return await asyncio.shield(task)
            image = await asyncio.shield(under_way[1])
            if image is not None or not may_create:
                return image
            # What was under way may have been an opening that found nothing.
            may_create = self.is_writable

    def _forget_opening(self, slice_id: SliceId, ended: asyncio.Task[Image | None]) -> None:
        if (under_way := self._opening.get(slice_id)) is not None and under_way[1] is ended:
            del self._opening[slice_id]

    async def _open_by_name(self, info: SliceInfo, *, may_create: bool) -> Image | None:
        slice_id = info.slice_id
        layout = Layout(info.length, self.block_bytes)
        async with self.files.hold([slice_id]):
            path = self._path(info)
            try:
                opened = await self._executors.disk(self._open_files, path, info, layout, may_create)
                if opened is None:
                    if slice_id not in self._staged and self.index.remove(slice_id) is not None:
                        # Torn by a crash, or damaged: what is left of it is of no use.
                        await self._executors.disk(image_files.remove, self._disk, path, self._side_path(info))
                    return None
            except OSError as error:
                self.failed(error, slice_id)
                return None
            image = Image(slice_id, layout, opened, check=check_of(info, self.block_bytes))
            self._register(image)
            return image

    def _open_files(self, path: str, info: SliceInfo, layout: Layout, may_create: bool) -> Opened | None:  # noqa: FBT001
        if is_small(info.length, self.block_bytes):
            return image_files.open_small(self._disk, path, length=info.length, expected_digest=info.digests)
        side_path = self.directory.side(info.slice_id)
        opened = None
        try:
            opened = image_files.open_big(
                self._disk, path, side_path, slice_id=info.slice_id, layout=layout, boot_id=self.boot_id
            )
        except FormatUnsupported as error:
            log.warning("cache: %s; the image is dropped", error)
        if opened is None and may_create:
            opened = image_files.create_big(
                self._disk, path, side_path, slice_id=info.slice_id, layout=layout, boot_id=self.boot_id
            )
        return opened

    def _register(self, image: Image) -> None:
        if image.slice_id not in self._staged:
            self.index.put(image.slice_id, _entry(image))
        self.opened.add(image)

    # --- storing

    def put_later(self, info: SliceInfo, data: Buffer) -> bool:
        """Keep a whole slice: readable at once, written by and by; `data` must never change.

        False if too much waits already, the disk was full a moment ago, or the slice is there.
        """
        is_taken = self.is_writable and not self.may_have(info.slice_id) and self._pending.add(info, data)
        self.counters.skipped += not is_taken
        return is_taken

    async def store_block(
        self, info: SliceInfo, block_index: int, *, runs: Sequence[Run], digests: Sequence[bytes]
    ) -> bool:
        """Write frames of a block into the image of a slice, making it if need be; return whether they are kept.

        `digests` are those of all frames of the block. Called by one task per block at a time; not for small images.
        """
        if not self.is_writable:
            return False
        image = await self._open(info, may_create=True)
        while image is not None and image.punching is not None:
            await asyncio.shield(image.punching)
        if image is None or not image.is_alive() or image.states is None or image.block_used is None:
            return False
        # Pinned until the frames are marked. The thread's own pin ends some turns of the loop before this resumes, and a punch
        # in between would leave them marked and empty.
        with self.opened.pinned(image):
            try:
                await self.opened.run(image, self._write_frames, image, block_index, runs, digests)
            except OSError as error:
                self.failed(error, info.slice_id)
                return False
            if image.is_buried():
                return False
            self._tick += 1
            for run in runs:
                image.mark(run.first_frame, run.frame_count, PRESENT)
                self.counters.written_bytes += memoryview(run.data).nbytes
            image.block_used[block_index] = self._tick
            image.is_dirty = True
        if info.slice_id not in self._staged:
            self.index.put(info.slice_id, _entry(image))
        self.has_grown.set()
        return True

    def _write_frames(self, image: Image, block_index: int, runs: Sequence[Run], digests: Sequence[bytes]) -> None:
        image_files.write_frames(
            self._disk, image.files, image.layout, block_index=block_index, runs=runs, digests=digests
        )

    async def _write_pending(self, batch: Sequence[PendingImage]) -> None:
        async with self.files.hold([pending.info.slice_id for pending in batch]):
            wanted = [pending for pending in batch if self._pending.is_wanted(pending)]
            failed = await self._executors.disk(self._write_whole, wanted)
            for pending in wanted:
                info = pending.info
                if info.slice_id in failed:
                    self.failed(failed[info.slice_id], info.slice_id)
                elif self._pending.is_wanted(pending):
                    self.index.put(info.slice_id, _entry_of(info, self.block_bytes))
                    self.counters.written_bytes += info.length
        self.has_grown.set()

    def _write_whole(self, batch: Sequence[PendingImage]) -> dict[SliceId, OSError]:
        failed: dict[SliceId, OSError] = {}
        for info, data in batch:
            try:
                if is_small(info.length, self.block_bytes):
                    image_files.write_small(self._disk, self._path(info), data)
                else:
                    image_files.write_complete_big(
                        self._disk,
                        self._path(info),
                        self.directory.side(info.slice_id),
                        slice_id=info.slice_id,
                        layout=Layout(info.length, self.block_bytes),
                        boot_id=self.boot_id,
                        data=data,
                    )
            except OSError as error:
                failed[info.slice_id] = error
        return failed

    def adopt(self, image: Image) -> None:
        """Take over a complete image that was written as a draft and lies under its name now. Called with `files` held."""
        image.is_dirty = True
        self.index.put(image.slice_id, _entry(image))
        self.opened.add(image)
        self.has_grown.set()

    # --- staged images

    def adopt_staged(self, name: StagedName, image: Image | None = None) -> None:
        """Take over a staged image: readable, never evicted. Without `image` it is opened when it is read."""
        self._staged[name.slice_id] = name
        if image is not None:
            self.opened.add(image)

    async def unstage(self, name: StagedName) -> None:
        """Turn a staged image into a cached one, now that it is uploaded."""
        check = int.from_bytes(name.root[:4], "big") if is_small(name.length, self.block_bytes) else None
        target = self.directory.image(name.slice_id, name.length, check)
        async with self.files.hold([name.slice_id]):
            if name.slice_id not in self._staged:
                return
            try:
                await self._executors.disk(self._disk.rename, self.directory.staged_image(name), target)
            except OSError as error:
                self.failed(error, name.slice_id)
            del self._staged[name.slice_id]
            self.index.put(
                name.slice_id,
                big_entry(name.length, name.length) if check is None else small_entry(name.length, check),
            )
        self.has_grown.set()

    async def remove_staged(self, name: StagedName) -> None:
        """Remove a staged image, because its slice was deleted."""
        side = None if is_small(name.length, self.block_bytes) else self.directory.side(name.slice_id)
        await self._end_staged(name, image_files.remove, self._disk, self.directory.staged_image(name), side)

    async def set_aside(self, name: StagedName) -> None:
        """Move a staged image that is damaged out of the way, without losing it."""
        await self._end_staged(
            name, self._disk.rename, self.directory.staged_image(name), self.directory.damaged_image(name)
        )

    async def _end_staged(self, name: StagedName, call: Callable[..., None], *args: object) -> None:
        async with self.files.hold([name.slice_id]):
            self._staged.pop(name.slice_id, None)
            self.opened.bury(name.slice_id)
            try:
                await self._executors.disk(call, *args)
            except OSError as error:
                self.failed(error, name.slice_id)

    # --- forgetting

    def forget(self, slice_ids: Iterable[SliceId]) -> None:
        """Drop images: unreadable when this returns, their files are removed in the background. Staged ones stay."""
        gone: list[tuple[SliceId, Entry]] = []
        for slice_id in slice_ids:
            if slice_id in self._staged:
                continue
            being_written = self._pending.drop(slice_id)
            being_opened, _ = self._opening.get(slice_id, (None, None))
            self.opened.bury(slice_id)
            entry = self.index.remove(slice_id)
            if entry is None and (info := being_written or being_opened) is not None:
                entry = _entry_of(info, self.block_bytes)
            if entry is not None:
                gone.append((slice_id, entry))
        if gone:
            self._tasks.start(self._remove(gone), name="remove images")

    async def evict(self, victims: Sequence[tuple[SliceId, Entry]]) -> None:
        """Remove images that were taken out of the index, and return when their space is free."""
        for slice_id, entry in victims:
            self.opened.bury(slice_id)
            self.counters.evictions += 1
            self.counters.evicted_bytes += entry.space_bytes
        await asyncio.shield(self._tasks.start(self._remove(victims), name="evict images"))

    async def _remove(self, gone: Sequence[tuple[SliceId, Entry]]) -> None:
        async with self.files.hold([slice_id for slice_id, _ in gone]):
            paths = []
            for slice_id, entry in gone:
                # What was under way when it was forgotten may have opened or indexed it.
                self.opened.bury(slice_id)
                self.index.remove(slice_id)
                path = self.directory.image(slice_id, entry.length, entry.check)
                paths.append((path, None if entry.check is not None else self.directory.side(slice_id)))
            try:
                await self._executors.disk(self._remove_files, paths)
            except OSError as error:
                self.failed(error, gone[0][0])

    def _remove_files(self, paths: Sequence[tuple[str, str | None]]) -> None:
        for path, side_path in paths:
            image_files.remove(self._disk, path, side_path)

    async def punch(self, image: Image, block_indexes: Sequence[int]) -> int:
        """Give up blocks of an image that nothing has pinned; return how many bytes they held. Never of a staged one."""
        if (
            image.pins
            or image.slice_id in self._staged
            or not image.is_alive()
            or image.is_handed_out
            or image.punching is not None
            or image.states is None
        ):
            return 0
        before_bytes = image.present_bytes
        for block_index in block_indexes:
            frames = image.layout.frames_of_block(block_index)
            image.mark(frames.start, len(frames), ABSENT)
        freed_bytes = before_bytes - image.present_bytes
        image.punching = asyncio.get_running_loop().create_future()
        try:
            await self.opened.run(image, self._punch_blocks, image, block_indexes)
        except OSError as error:
            # What could not be punched is marked absent, but takes its space: only removing the image frees that.
            self.failed(error, image.slice_id)
            self.forget([image.slice_id])
        finally:
            image.punching.set_result(None)
            image.punching = None
        if image.is_alive():
            self.index.put(image.slice_id, _entry(image))
        return freed_bytes

    def _punch_blocks(self, image: Image, block_indexes: Sequence[int]) -> None:
        for block_index in block_indexes:
            image_files.punch_block(self._disk, image.files, image.layout, block_index=block_index)

    # --- care

    @property
    def is_writable(self) -> bool:
        """Return False for a moment after the disk was full."""
        return self._clock() >= self._full_until

    @property
    def pending_bytes(self) -> int:
        """Return how many bytes are held in memory until their images are written."""
        return self._pending.held_bytes

    async def open_big(self, slice_id: SliceId, length: int) -> Image | None:
        """Open a big image to scrub it, or to give up a part of it; its digests are not needed for that."""
        return await self._open(SliceInfo(slice_id, length, b""))

    async def drop_frames(self, image: Image, frames: Sequence[int]) -> None:
        """Mark damaged frames absent; they are fetched again when they are wanted."""
        if not image.is_alive() or image.states is None or image.side is None:
            return
        dropped = [frame for frame in frames if image.states[frame] != ABSENT]
        for frame in dropped:
            image.mark(frame, 1, ABSENT)
        self.counters.damaged += len(dropped)
        try:
            await self.opened.run(image, self._clear_frames, image.side, dropped)
        except OSError as error:
            self.failed(error, image.slice_id)
            self.forget([image.slice_id])

    def _clear_frames(self, side: int, frames: Sequence[int]) -> None:
        for frame in frames:
            image_files.clear_states(self._disk, side, first_frame=frame, frame_count=1)

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> None:
        """Start work on files that is not cancelled when the cache is closed, but waited for."""
        self._tasks.start(work, name=name)

    async def sync_written(self) -> None:
        """Sync the open images that were written, and drop those whose bytes did not reach the disk."""
        for image in [image for image in self.opened if image.is_dirty]:
            if not image.is_alive():
                continue
            image.is_dirty = False
            try:
                await self.opened.run(image, self._disk.datasync, image.descriptor)
            except OSError as error:
                self._damaged(image.slice_id, f"writing back failed ({error})")

    async def remove_orphan_side(self, slice_id: SliceId) -> None:
        """Remove a side file that a crash has left without an image."""
        async with self.files.hold([slice_id]):
            if not self.may_have(slice_id):
                try:
                    await self._executors.disk(self._disk.unlink, self.directory.side(slice_id))
                except OSError as error:
                    self.failed(error, slice_id)

    def damaged_small(self, slice_id: SliceId) -> None:
        """Drop a small image that the scrub found damaged."""
        self._damaged(slice_id, "bytes differ from their digest")

    async def care(self) -> None:
        """Sync written images every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(_SYNC_PAUSE_S)
            await self.sync_written()

    async def load(self) -> None:
        """Index what lies in the directory, on a thread: 2 us an image, and one stat for each big one."""
        try:
            found = await self._executors.disk(self._scan)
        except OSError as error:
            self.failed(error, SliceId(0))
            found = FoundImages(array("Q"), array("Q"), 0)
        gone = self.index.load(found)
        if gone:
            await self._remove(gone)
        self.has_grown.set()

    def _scan(self) -> FoundImages:
        return found_images(self._found())

    def _found(self) -> Iterator[tuple[SliceId, Entry]]:
        for slice_id, length, check in self.directory.image_names():
            if check is not None:
                yield slice_id, small_entry(length, check)
                continue
            try:
                space_bytes = self._disk.allocated(self.directory.image(slice_id, length, None))
            except OSError:
                continue
            yield slice_id, big_entry(length, min(space_bytes, length))

    async def close(self) -> None:
        """Write what is pending, wait for all work on files, close all images."""
        await self._pending.flush()
        await self._tasks.settle(timeout_s=_SETTLE_S)
        await self.opened.close()
        await self._tasks.settle(timeout_s=_SETTLE_S)
        await self._tasks.close()

    # --- names and errors

    def _path(self, info: SliceInfo) -> str:
        staged = self._staged.get(info.slice_id)
        if staged is not None:
            return self.directory.staged_image(staged)
        return self.directory.image(info.slice_id, info.length, check_of(info, self.block_bytes))

    def _side_path(self, info: SliceInfo) -> str | None:
        return None if is_small(info.length, self.block_bytes) else self.directory.side(info.slice_id)

    def _damaged(self, slice_id: SliceId, what: str) -> None:
        log.warning("cache: image of slice %d: %s; it is dropped and will be fetched again", slice_id, what)
        self.counters.damaged += 1
        self.forget([slice_id])

    def failed(self, error: OSError, slice_id: SliceId) -> None:
        """Note an error of the cache disk: the work goes on without the cache."""
        self.counters.disk_errors += 1
        now = self._clock()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._full_until = now + _FULL_PAUSE_S
            self.has_grown.set()
        code = error.errno or 0
        if now - self._logged.get(code, float("-inf")) >= _LOG_PAUSE_S:
            self._logged[code] = now
            log.warning("cache: slice %d: %s; going on without the cache", slice_id, error)


def _entry(image: Image) -> Entry:
    if image.check is not None:
        return small_entry(image.layout.length, image.check)
    return big_entry(image.layout.length, image.present_bytes)


def _entry_of(info: SliceInfo, block_bytes: int) -> Entry:
    check = check_of(info, block_bytes)
    return big_entry(info.length, info.length) if check is None else small_entry(info.length, check)
