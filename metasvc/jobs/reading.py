"""Reading packs for clients that may not have them whole."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final

from chunkstore.slices import ChunkStore, SliceInfo
from metasvc.api import MetaClient
from metasvc.model import Slice

_IDLE_S: Final = 30.0
"""So long after the last read the chunk store is kept open."""

Taken = Callable[[], AbstractAsyncContextManager[tuple[MetaClient, ChunkStore]]]


class PackReader:
    """Read packs with the chunk store of the volume's jobs, which is held open while it is used.

    Interleavings: who comes first opens it, others wait for that (`_turn`). `_closing` lets go of it when nobody has used it
    for a while; whoever reads is counted before it looks.
    """

    def __init__(self, taken: Taken) -> None:
        """Take what opens the chunk store. `close` must be called before the bucket is closed."""
        self._taken = taken
        self._turn = asyncio.Lock()
        self._stack: AsyncExitStack | None = None
        self._chunks: ChunkStore
        self._users = 0
        self._used_s = 0.0
        self._closing: asyncio.Task[None] | None = None

    async def read(self, pack: Slice, start: int, end: int) -> bytes:
        """Return bytes of a pack. Errors of the bucket."""
        chunks = await self._use()
        try:
            return bytes(await chunks.read(_info(pack), start, end))
        finally:
            self._unuse()

    async def prefetch(self, pack: Slice) -> None:
        """Start to fetch a pack whole."""
        chunks = await self._use()
        try:
            chunks.prefetch(_info(pack), 0, pack.length, in_pieces=True)
        finally:
            self._unuse()

    async def close(self) -> None:
        """Let go of the chunk store."""
        async with self._turn:
            # So it rests, or waits for its turn: it is not in the middle of closing.
            if self._closing is not None:
                self._closing.cancel()
            await self._let_go()

    async def _use(self) -> ChunkStore:
        async with self._turn:
            if self._stack is None:
                stack = AsyncExitStack()
                _, self._chunks = await stack.enter_async_context(self._taken())
                self._stack = stack
                self._closing = asyncio.create_task(self._close_when_idle(), name="reader of packs")
            self._users += 1
        return self._chunks

    def _unuse(self) -> None:
        self._users -= 1
        self._used_s = time.monotonic()

    async def _close_when_idle(self) -> None:
        while True:
            await asyncio.sleep(_IDLE_S)
            async with self._turn:
                if not self._users and time.monotonic() - self._used_s >= _IDLE_S:
                    await self._let_go()
                    return

    async def _let_go(self) -> None:
        stack, self._stack = self._stack, None
        if stack is not None:
            await stack.aclose()


def _info(pack: Slice) -> SliceInfo:
    return SliceInfo(pack.slice_id, pack.length, pack.data)
