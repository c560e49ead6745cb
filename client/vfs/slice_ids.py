"""Slice ids for writers, reserved from the metadata session many at a time."""

from __future__ import annotations

import asyncio

from chunkstore.geometry import SliceId
from metasvc.api import MetaClient


class SliceIds:
    """Hand out ids, each once. What is left at the end of the session is never used: ids are plenty."""

    def __init__(self, meta: MetaClient, *, count: int) -> None:
        """Reserve `count` at a time, the first when one is asked for."""
        self._meta = meta
        self._count = count
        self._left = range(0)
        self._session_id = meta.session_id
        self._refill = asyncio.Lock()

    async def take(self) -> SliceId:
        """Return an id never returned before. One round trip in every `count` calls."""
        while not self._left or self._session_id != self._meta.session_id:
            async with self._refill:
                if not self._left or self._session_id != self._meta.session_id:
                    # Ids of a session that ended are worth nothing to the next one.
                    self._session_id = self._meta.session_id
                    self._left = await self._meta.allocate_slices(self._count)
        first, self._left = self._left[0], self._left[1:]
        return SliceId(first)
