"""Blocks by presigned URLs, which somebody signs who has the keys.

Owns which URLs are asked for, and when: those that read come for several blocks at a time, ahead of whoever reads on, and are
kept until shortly before they expire; one that puts is asked for when the bytes are there, for it is signed with their digest.

Interleavings. `_asked` has at most one request for a block, from before it is sent; readers of one block share it. It is a task
of this object: a reader that is cancelled stops waiting, and the URLs are kept. No lock is held; tables change between awaits.
The wait for a signature is in front of the retries: the service may be away for longer than a bucket is given.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final, NamedTuple, Protocol

from chunkstore.background import TaskSet
from chunkstore.buckets import Limits, VerbCounters
from chunkstore.buckets.retry import RetryingStore
from chunkstore.buckets.urls import UrlOfPut, UrlStore
from chunkstore.errors import AtollError, ObjectMissing
from chunkstore.geometry import Buffer, SliceId, block_count, block_key, parse_block_key
from chunkstore.model import SliceInfo

__all__ = ["PresignedAccess", "Signed", "Signing"]

URLS_KEPT: Final = 4096
"""Of 500 bytes or so."""
AHEAD: Final = 16
"""Blocks of a slice for which URLs are asked at once: 64 MiB."""
_SPARE_S: Final = 60.0
"""A URL is not used when less is left of it: the request may wait for a slot, and clocks differ."""

Key = tuple[SliceId, int]


class Signed(NamedTuple):
    """URLs in order of the blocks ("": none), and for how long they are good from before they were asked for."""

    urls: Sequence[str]
    life_s: float
    headers: Sequence[Mapping[str, str]] = ()


class Signing(Protocol):
    """Whoever signs. Errors: what the service says; ObjectMissing if the file does not have the first block (any more)."""

    async def sign_get(self, info: SliceInfo, blocks: Sequence[int]) -> Signed:
        """Sign URLs that read blocks: of the file of `info.place`, without one of a slice of this session."""
        ...

    async def sign_put(self, slice_id: SliceId, blocks: Sequence[int], sha256: Sequence[bytes]) -> Signed:
        """Sign URLs that put blocks of a slice of this session."""
        ...


class PresignedAccess:
    """A BlockAccess without keys."""

    def __init__(
        self,
        signing: Signing,
        *,
        volume_uuid: str,
        block_bytes: int,
        name: str,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``name`` stands for the bucket in messages."""
        self._signing = signing
        self._volume_uuid = volume_uuid
        self._block_bytes = block_bytes
        self._clock = clock
        self._tasks = TaskSet()
        self._urls: OrderedDict[Key, tuple[str, float]] = OrderedDict()
        self._asked: dict[Key, asyncio.Future[None]] = {}
        self._puts: dict[str, tuple[UrlOfPut, float]] = {}
        """Of blocks that are being put; a block is put by one task at a time."""
        self._infos: dict[SliceId, tuple[SliceInfo, int]] = {}
        """By which file a slice is being read, and by how many."""
        self.store = RetryingStore(UrlStore(self, name=name), limits=limits or Limits())

    def counters(self) -> Mapping[str, VerbCounters]:
        """Return what was counted of requests to the bucket."""
        return self.store.counters()

    async def close(self) -> None:
        """Close connections; what is asked for is given up."""
        await self._tasks.close()
        await self.store.close()

    # -- blocks -----------------------------------------------------------------------------------------------------------

    async def get(
        self, info: SliceInfo, index: int, *, start: int | None = None, end: int | None = None
    ) -> bytes | memoryview:
        """Return stored bytes of a block: one request, and rarely one for URLs before it."""
        slice_id = info.slice_id
        await self._have(info, index)
        _, users = self._infos.get(slice_id, (info, 0))
        self._infos[slice_id] = info, users + 1
        try:
            return await self.store.get(block_key(self._volume_uuid, slice_id, index), start=start, end=end)
        finally:
            known, users = self._infos.pop(slice_id)
            if users > 1:
                self._infos[slice_id] = known, users - 1

    async def put(self, slice_id: SliceId, index: int, payload: Buffer) -> None:
        """Store a block: a request for its URL, and one."""
        key = block_key(self._volume_uuid, slice_id, index)
        self._puts[key] = await self._signed_put(slice_id, index, payload)
        try:
            await self.store.put(key, payload)
        finally:
            self._puts.pop(key, None)

    async def delete(self, blocks: Sequence[tuple[SliceId, int]]) -> None:
        """Leave them: nothing names them, and garbage collection, which has the keys, finds them."""

    # -- URLs -------------------------------------------------------------------------------------------------------------

    async def get_url(self, key: str, *, anew: bool) -> str:
        """Return the URL of a block that is being read."""
        named = parse_block_key(key)
        assert named is not None
        block = named.slice_id, named.block_index
        info = self._infos.get(named.slice_id, (SliceInfo(named.slice_id, 0, b""), 0))[0]
        if anew:
            self._urls.pop(block, None)
        while (url := self._good(block)) is None:
            await self._have(info, named.block_index)
        return url

    async def put_url(self, key: str, data: Buffer, *, anew: bool) -> UrlOfPut:
        """Return what puts a block with these bytes."""
        signed = self._puts[key]
        if anew or self._clock() >= signed[1]:
            named = parse_block_key(key)
            assert named is not None
            signed = self._puts[key] = await self._signed_put(named.slice_id, named.block_index, data)
        return signed[0]

    async def _signed_put(self, slice_id: SliceId, index: int, data: Buffer) -> tuple[UrlOfPut, float]:
        """Ask for a URL; with it, until when it is used. Hashing 4 MiB takes a few ms: in a thread."""
        digest = await asyncio.to_thread(_sha256, data)
        began_s = self._clock()
        signed = await self._signing.sign_put(slice_id, [index], [digest])
        return UrlOfPut(signed.urls[0], signed.headers[0]), self._until(began_s, signed.life_s)

    def _until(self, began_s: float, life_s: float) -> float:
        return began_s + life_s - min(_SPARE_S, life_s / 2)

    def _good(self, block: Key) -> str | None:
        found = self._urls.get(block)
        if found is None or self._clock() >= found[1]:
            return None
        self._urls.move_to_end(block)
        return found[0]

    async def _have(self, info: SliceInfo, index: int) -> None:
        """Have the URL of a block, and soon those of the next ones."""
        block = info.slice_id, index
        count = block_count(info.length, self._block_bytes)
        if self._good(block) is None:
            await self._ask(info, range(index, max(index + 1, min(count, index + AHEAD))))
        middle = index + AHEAD // 2
        if middle < count and self._good((info.slice_id, middle)) is None:
            ahead = range(middle, min(count, middle + AHEAD))
            self._tasks.start(self._ask_quietly(info, ahead), name=f"URLs of slice {info.slice_id}")

    async def _ask(self, info: SliceInfo, blocks: range) -> None:
        """Wait until there is a URL for the first of some blocks; those of the others come with it, or not. ObjectMissing."""
        block = info.slice_id, blocks.start
        while (asked := self._asked.get(block)) is not None:
            # Somebody has: perhaps for another file, or for another block first, which says nothing about this one.
            with suppress(ObjectMissing):
                await asyncio.shield(asked)
            if self._good(block) is not None:
                return
        wanted = [index for index in blocks if (info.slice_id, index) not in self._asked]
        asked = asyncio.get_running_loop().create_future()
        for index in wanted:
            self._asked[info.slice_id, index] = asked
        self._tasks.start(self._fetch(info, wanted, asked), name=f"URLs of slice {info.slice_id}")
        await asyncio.shield(asked)

    async def _ask_quietly(self, info: SliceInfo, blocks: range) -> None:
        with suppress(AtollError):
            await self._ask(info, blocks)

    async def _fetch(self, info: SliceInfo, blocks: Sequence[int], asked: asyncio.Future[None]) -> None:
        began_s = self._clock()
        try:
            signed = await self._signing.sign_get(info, blocks)
            until_s = self._until(began_s, signed.life_s)
            for index, url in zip(blocks, signed.urls, strict=True):
                if url:
                    self._urls[info.slice_id, index] = url, until_s
                    self._urls.move_to_end((info.slice_id, index))
            while len(self._urls) > URLS_KEPT:
                self._urls.popitem(last=False)
        except BaseException as error:
            told = error if isinstance(error, Exception) else AtollError("the store is closing", retryable=True)
            if not asked.done():
                asked.set_exception(told)
                asked.exception()
            if not isinstance(error, AtollError):
                raise
        finally:
            for index in blocks:
                self._asked.pop((info.slice_id, index), None)
            if not asked.done():
                asked.set_result(None)


def _sha256(data: Buffer) -> bytes:
    return hashlib.sha256(data).digest()
