"""One task at a time for the files of one slice: who makes, opens by name, renames or removes them.

All on the event loop. Several slices are taken in the order of their ids, so two who want some of the same never wait for each
other. Waits are for work on the local disk only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from chunkstore.geometry import SliceId


class Exclusive:
    """Hand out slices, each to one task at a time."""

    def __init__(self) -> None:
        """Start with all free."""
        self._held: dict[SliceId, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def hold(self, slice_ids: Iterable[SliceId]) -> AsyncIterator[None]:
        """Hold slices, waiting for those who do."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        mine: list[SliceId] = []
        try:
            for slice_id in sorted(set(slice_ids)):
                while (other := self._held.get(slice_id)) is not None:
                    await asyncio.shield(other)
                self._held[slice_id] = done
                mine.append(slice_id)
            yield
        finally:
            for slice_id in mine:
                del self._held[slice_id]
            done.set_result(None)
