"""Whole images that are written by and by, after their bytes were sealed or handed to a reader.

A small file costs its user a PUT or a GET; making its image costs 60 to 150 us more, which nobody should wait for, and which
is left out when too much waits already. Until an image is written it is read from here.

All on the event loop. A pending image is in `_waiting`, then in `_writing` while a thread writes it, then in the index.
`drop` takes it out of either; the thread may write it all the same, so whoever drops one also removes its file afterwards.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from chunkstore.background import TaskSet
from chunkstore.geometry import MIB, Buffer, SliceId
from chunkstore.model import SliceInfo

MAX_BYTES: Final = 16 * MIB
# One hop to the disk executor writes so many images; 16 of 64 KiB take about 2 ms there. One hop at a time: they all make
# files in one directory, whose lock four threads spent half of their time spinning on.
_BATCH: Final = 16


class PendingImage(NamedTuple):
    """Hold all bytes of a slice."""

    info: SliceInfo
    data: Buffer


class PendingImages:
    """Hold images until they are written."""

    def __init__(self, *, tasks: TaskSet, write: Callable[[Sequence[PendingImage]], Awaitable[None]]) -> None:
        """Take what writes a batch; it never raises, and asks `is_wanted` before it counts an image as kept."""
        self._tasks = tasks
        self._write = write
        self._waiting: OrderedDict[SliceId, PendingImage] = OrderedDict()
        self._writing: dict[SliceId, PendingImage] = {}
        self._writer: asyncio.Task[None] | None = None
        self.held_bytes = 0

    def __contains__(self, slice_id: SliceId) -> bool:
        """Return whether all bytes of a slice are here."""
        return slice_id in self._waiting or slice_id in self._writing

    def read(self, slice_id: SliceId, start: int, end: int) -> memoryview | None:
        """Return bytes of a slice that is here, else None."""
        pending = self._waiting.get(slice_id) or self._writing.get(slice_id)
        return None if pending is None else memoryview(pending.data)[start:end]

    def add(self, info: SliceInfo, data: Buffer) -> bool:
        """Take a slice, whose bytes never change; False if too much waits already."""
        if self.held_bytes + info.length > MAX_BYTES or info.slice_id in self:
            return False
        self._waiting[info.slice_id] = PendingImage(info, data)
        self.held_bytes += info.length
        if self._writer is None:
            self._writer = self._tasks.start(self._run(), name="write images")
        return True

    def is_wanted(self, pending: PendingImage) -> bool:
        """Return whether an image that is being written was not dropped since."""
        return self._writing.get(pending.info.slice_id) is pending

    def drop(self, slice_id: SliceId) -> SliceInfo | None:
        """Let go of a slice; return it if its file may come into being nevertheless."""
        waiting = self._waiting.pop(slice_id, None)
        if waiting is not None:
            self.held_bytes -= waiting.info.length
        writing = self._writing.pop(slice_id, None)
        return None if writing is None else writing.info

    async def flush(self) -> None:
        """Wait until everything is written."""
        while self._writer is not None:
            await asyncio.wait([self._writer])

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popitem(last=False)[1] for _ in range(min(_BATCH, len(self._waiting)))]
                self._writing = {pending.info.slice_id: pending for pending in batch}
                try:
                    await self._write(batch)
                finally:
                    self._writing = {}
                    self.held_bytes -= sum(pending.info.length for pending in batch)
        finally:
            self._writer = None
