"""One open image, and the blocking work on its files.

`Image` belongs to the event loop: only the loop reads and changes its fields. The functions below run on the disk executor
with the descriptors they were given; whoever starts one pins the image first, so that no descriptor is closed and no frame
punched under it.
"""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from chunkstore.block import DIGEST_BYTES, block_digest, digest, digest_of, frame_digests
from chunkstore.geometry import MIB, Buffer, SliceId
from chunkstore.images import sidefile
from chunkstore.images.disk import Disk
from chunkstore.images.layout import Layout
from chunkstore.images.sidefile import ABSENT, PRESENT, UNCHECKED

_READ_STEP_BYTES = 1 << 20
# What comes in such pieces is read in order: the kernel has it as pages of the mounted file, once is enough (ADR 0013).
_ONCE_BYTES = MIB


class Opened(NamedTuple):
    """Hold the descriptors of an image and the states of its frames; a small one has neither side file nor states."""

    descriptor: int
    side: int | None
    states: bytearray | None


class Run(NamedTuple):
    """Hold consecutive frames to be written."""

    first_frame: int
    frame_count: int
    data: Buffer
    in_pieces: bool = False
    """They will be read from the image in short pieces, so they stay in the page cache. Else, if they are long, the kernel
    has them as pages of a mounted file."""


class Image:
    """Hold an open image. `pins` counts threads that use its descriptors."""

    __slots__ = (
        "_is_closed",
        "_is_dead",
        "block_used",
        "check",
        "descriptor",
        "frame_bytes",
        "is_complete",
        "is_dirty",
        "is_handed_out",
        "is_touched",
        "layout",
        "pins",
        "punching",
        "side",
        "slice_id",
        "states",
    )

    def __init__(self, slice_id: SliceId, layout: Layout, opened: Opened, *, check: int | None) -> None:
        """Take over descriptors. `check` is that of the name of a small image."""
        self.slice_id = slice_id
        self.check = check
        self.layout = layout
        self.frame_bytes = layout.frame_bytes
        self.descriptor = opened.descriptor
        self.side = opened.side
        self.states = opened.states
        self.is_complete = opened.states is None or opened.states.count(PRESENT) == len(opened.states)
        self.pins = 0
        self._is_dead = False
        self._is_closed = False
        self.is_dirty = False
        """Written since it was last synced, so a failure to write back may not be known yet."""
        self.is_handed_out = False
        """The kernel has had it as a backing file: it may be unlinked, but never punched."""
        self.is_touched = True
        """Read since it was last looked at by what closes or evicts; at first, because somebody is about to."""
        self.punching: asyncio.Future[None] | None = None
        self.block_used = None if opened.states is None else array("Q", bytes(8 * layout.block_count))

    def bury(self) -> None:
        """Note that its name is gone or going: nothing more is kept in it, its descriptors go with the last pin."""
        self._is_dead = True

    def note_closed(self) -> None:
        """Note that its descriptors are closed, or will be at once; opened again it is another object."""
        self._is_closed = True

    def is_buried(self) -> bool:
        """Return whether its name is gone or going."""
        return self._is_dead

    def is_alive(self) -> bool:
        """Return whether it can be used. True is true up to the next await only, unless it is pinned."""
        return not self._is_dead and not self._is_closed

    @property
    def files(self) -> Opened:
        """Return the descriptors, for work on a thread."""
        return Opened(self.descriptor, self.side, None)

    @property
    def descriptor_count(self) -> int:
        """Return how many descriptors it keeps open."""
        return 1 if self.side is None else 2

    @property
    def present_bytes(self) -> int:
        """Return how many bytes it holds, unchecked ones included; of the last frame as if it were full."""
        if self.states is None or self.is_complete:
            return self.layout.length
        return (len(self.states) - self.states.count(ABSENT)) * self.frame_bytes

    def has(self, start: int, end: int) -> bool:
        """Return whether all of a range is there and trusted."""
        if self.is_complete:
            return True
        assert self.states is not None
        first, after = start // self.frame_bytes, -(-end // self.frame_bytes)
        return self.states.count(PRESENT, first, after) == after - first

    def mark(self, first_frame: int, frame_count: int, state: int) -> None:
        """Set the state of frames."""
        assert self.states is not None
        self.states[first_frame : first_frame + frame_count] = bytes((state,)) * frame_count
        self.is_complete = self.states.count(PRESENT) == len(self.states)


def write_small(disk: Disk, path: str, data: Buffer) -> None:
    """Write a small image whole. A part of one, left by a crash, is found by its digest when it is read."""
    descriptor = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        disk.pwrite(descriptor, data, 0)
    except OSError:
        disk.unlink(path)
        raise
    finally:
        disk.close(descriptor)


def open_small(disk: Disk, path: str, *, length: int, expected_digest: bytes) -> Opened | None:
    """Open a small image whose bytes are those of the digest; None if there is none. Leaves them in the page cache."""
    try:
        descriptor = disk.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if read_small(disk, descriptor, length=length, expected_digest=expected_digest) is not None:
            return Opened(descriptor, None, None)
    except BaseException:
        disk.close(descriptor)
        raise
    disk.close(descriptor)
    return None


def read_small(disk: Disk, descriptor: int, *, length: int, expected_digest: bytes) -> bytes | None:
    """Return the bytes of a small image, None if they are not those of the digest. One byte more would be wrong, too."""
    data = disk.pread(descriptor, length + 1, 0)
    return data if len(data) == length and digest_of(data) == expected_digest else None


def open_big(
    disk: Disk, path: str, side_path: str, *, slice_id: SliceId, layout: Layout, boot_id: UUID
) -> Opened | None:
    """Open a big image with its side file; None if one is missing or not of this slice.

    The first opening in another boot turns PRESENT into UNCHECKED on disk before any frame can become PRESENT again.
    """
    try:
        side = disk.open(side_path, os.O_RDWR)
    except FileNotFoundError:
        return None
    descriptor = -1
    try:
        found = sidefile.unpack(
            disk.pread(side, sidefile.states_offset(layout.frame_count), 0), slice_id, layout, boot_id=boot_id
        )
        if found is not None:
            try:
                descriptor = disk.open(path, os.O_RDWR)
            except FileNotFoundError:
                found = None
        if found is None or disk.size(descriptor) != layout.length:
            disk.close(side)
            if descriptor >= 0:
                disk.close(descriptor)
            return None
        if not found.is_of_this_boot:
            disk.pwrite(side, found.states, sidefile.states_offset(0))
            disk.pwrite(side, sidefile.pack_header(slice_id, layout, boot_id), 0)
        return Opened(descriptor, side, found.states)
    except BaseException:
        disk.close(side)
        if descriptor >= 0:
            disk.close(descriptor)
        raise


def create_big(disk: Disk, path: str, side_path: str, *, slice_id: SliceId, layout: Layout, boot_id: UUID) -> Opened:
    """Make a big image that holds nothing. The side file comes first: without a true one an image counts for nothing."""
    states = bytearray(layout.frame_count)
    side = disk.open(side_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    descriptor = -1
    try:
        disk.pwrite(side, sidefile.pack_header(slice_id, layout, boot_id) + states, 0)
        descriptor = disk.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        disk.truncate(descriptor, layout.length)
    except BaseException:
        disk.close(side)
        if descriptor >= 0:
            disk.close(descriptor)
        remove(disk, path, side_path)
        raise
    return Opened(descriptor, side, states)


def write_complete_big(
    disk: Disk,
    path: str,
    side_path: str,
    *,
    slice_id: SliceId,
    layout: Layout,
    boot_id: UUID,
    data: Buffer,
) -> None:
    """Make a big image that holds everything, from memory: data first, so that a crash leaves none with a side file."""
    disk.unlink(side_path)
    descriptor = disk.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        disk.pwrite(descriptor, data, 0)
        write_complete_side(
            disk, side_path, slice_id=slice_id, layout=layout, boot_id=boot_id, digests=_frame_digests(data, layout)
        )
    except OSError:
        remove(disk, path, side_path)
        raise
    finally:
        disk.close(descriptor)


def write_complete_side(
    disk: Disk,
    side_path: str,
    *,
    slice_id: SliceId,
    layout: Layout,
    boot_id: UUID,
    digests: Sequence[bytes],
    is_durable: bool = False,
) -> None:
    """Make the side file of an image whose data are all there; synced if it is to be durable (its name is not)."""
    side = disk.open(side_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        states = bytes((PRESENT,)) * layout.frame_count
        disk.pwrite(side, sidefile.pack(slice_id, layout, boot_id, states=states, digests=digests), 0)
        if is_durable:
            disk.datasync(side)
    finally:
        disk.close(side)


def write_frames(
    disk: Disk, opened: Opened, layout: Layout, *, block_index: int, runs: Sequence[Run], digests: Sequence[bytes]
) -> None:
    """Write frames of one block: data, then the digests of the whole block, then the states of these frames."""
    assert opened.side is not None
    for run in runs:
        disk.pwrite(opened.descriptor, run.data, run.first_frame * layout.frame_bytes)
        if not run.in_pieces and (size_bytes := memoryview(run.data).nbytes) >= _ONCE_BYTES:
            disk.datasync(opened.descriptor)
            disk.drop_pages(opened.descriptor, run.first_frame * layout.frame_bytes, size_bytes)
    disk.pwrite(opened.side, b"".join(digests), sidefile.digests_offset(layout, layout.first_frame(block_index)))
    for run in runs:
        disk.pwrite(opened.side, bytes((PRESENT,)) * run.frame_count, sidefile.states_offset(run.first_frame))


def check_frames(
    disk: Disk, opened: Opened, layout: Layout, *, block_index: int, frames: Sequence[int], expected_digest: bytes
) -> list[int]:
    """Return those of the given frames of a block whose bytes are proven to be the writer's, and note it in the side file.

    The digests in the side file are proven by the digest of the block, then each frame by its own. 50 us a frame.
    """
    proven = _proven_frames(
        disk, opened, layout, block_index=block_index, frames=frames, expected_digest=expected_digest
    )
    assert opened.side is not None
    for frame in frames:
        state = PRESENT if frame in proven else ABSENT
        disk.pwrite(opened.side, bytes((state,)), sidefile.states_offset(frame))
    return proven


def damaged_frames(disk: Disk, opened: Opened, layout: Layout, *, frames: Sequence[int]) -> list[int]:
    """Return those of the given frames whose bytes differ from the digests of the side file. For the scrub."""
    assert opened.side is not None
    found = []
    for frame in frames:
        start, end = layout.frame_range(frame)
        expected = disk.pread(opened.side, DIGEST_BYTES, sidefile.digests_offset(layout, frame))
        data = disk.pread_once(opened.descriptor, end - start, start)
        if len(data) != end - start or digest(data) != expected:
            found.append(frame)
    return found


def clear_states(disk: Disk, side: int, *, first_frame: int, frame_count: int) -> None:
    """Note that frames are absent."""
    disk.pwrite(side, bytes((ABSENT,)) * frame_count, sidefile.states_offset(first_frame))


def punch_block(disk: Disk, opened: Opened, layout: Layout, *, block_index: int) -> None:
    """Give back the space of a block: first the states, then the bytes, so that no crash leaves zeros marked present."""
    assert opened.side is not None
    frames = layout.frames_of_block(block_index)
    clear_states(disk, opened.side, first_frame=frames.start, frame_count=len(frames))
    disk.punch(opened.descriptor, block_index * layout.block_bytes, layout.block_length(block_index))


def remove(disk: Disk, path: str, side_path: str | None) -> None:
    """Remove an image, its side file first, as an image without one counts for nothing."""
    if side_path is not None:
        disk.unlink(side_path)
    disk.unlink(path)


def _frame_digests(data: Buffer, layout: Layout) -> list[bytes]:
    """Return the digests of all frames of a slice."""
    view = memoryview(data).cast("B")
    found: list[bytes] = []
    for start in range(0, layout.length, layout.block_bytes):
        found += frame_digests(view[start : start + layout.block_bytes])
    return found


def _proven_frames(
    disk: Disk, opened: Opened, layout: Layout, *, block_index: int, frames: Sequence[int], expected_digest: bytes
) -> list[int]:
    assert opened.side is not None
    of_block = layout.frames_of_block(block_index)
    table = disk.pread(opened.side, len(of_block) * DIGEST_BYTES, sidefile.digests_offset(layout, of_block.start))
    if len(table) != len(of_block) * DIGEST_BYTES:
        return []
    digests = [table[start : start + DIGEST_BYTES] for start in range(0, len(table), DIGEST_BYTES)]
    if block_digest(digests, layout.block_length(block_index)) != expected_digest:
        return []
    proven = []
    for frame in frames:
        start, end = layout.frame_range(frame)
        data = disk.pread(opened.descriptor, end - start, start)
        if len(data) == end - start and digest(data) == digests[frame - of_block.start]:
            proven.append(frame)
    return proven


__all__ = [
    "ABSENT",
    "PRESENT",
    "UNCHECKED",
    "Image",
    "Opened",
    "Run",
    "check_frames",
    "clear_states",
    "create_big",
    "damaged_frames",
    "open_big",
    "open_small",
    "punch_block",
    "read_small",
    "remove",
    "write_complete_big",
    "write_complete_side",
    "write_frames",
    "write_small",
]
