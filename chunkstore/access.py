"""How reading and uploading reach blocks: the seam between them and whoever has the keys of the bucket.

Owns the Protocol, and the implementation over an object store with keys. The one over presigned URLs is `chunkstore.presigned`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from chunkstore.buckets import MAX_DELETE_KEYS, ObjectStore
from chunkstore.geometry import Buffer, SliceId, block_key
from chunkstore.model import SliceInfo

__all__ = ["BlockAccess", "ObjectAccess"]


class BlockAccess(Protocol):
    """Get, put and delete the objects of blocks. Safe for any number of tasks of one event loop. Errors as of ObjectStore."""

    async def get(
        self, info: SliceInfo, index: int, *, start: int | None = None, end: int | None = None
    ) -> bytes | memoryview:
        """Return the stored bytes `[start, end)` of a block, fewer only where the object ends. ObjectMissing."""
        ...

    async def put(self, slice_id: SliceId, index: int, payload: Buffer) -> None:
        """Store a block; durable when it returns. `payload` must never change."""
        ...

    async def delete(self, blocks: Sequence[tuple[SliceId, int]]) -> None:
        """Delete blocks, any number; absent ones are fine. What may not be deleted from here is left for others to find."""
        ...


class ObjectAccess:
    """Reach blocks in an object store."""

    def __init__(self, bucket: ObjectStore, volume_uuid: str) -> None:
        """Take the bucket, which the caller closes."""
        self._bucket = bucket
        self._volume_uuid = volume_uuid

    async def get(
        self, info: SliceInfo, index: int, *, start: int | None = None, end: int | None = None
    ) -> bytes | memoryview:
        """Return stored bytes of a block. One request."""
        key = block_key(self._volume_uuid, info.slice_id, index)
        if start is None and end is None:
            return await self._bucket.get(key)
        return await self._bucket.get(key, start=start, end=end)

    async def put(self, slice_id: SliceId, index: int, payload: Buffer) -> None:
        """Store a block. One request."""
        await self._bucket.put(block_key(self._volume_uuid, slice_id, index), payload)

    async def delete(self, blocks: Sequence[tuple[SliceId, int]]) -> None:
        """Delete blocks, a thousand in a request."""
        keys = [block_key(self._volume_uuid, slice_id, index) for slice_id, index in blocks]
        for start in range(0, len(keys), MAX_DELETE_KEYS):
            await self._bucket.delete(keys[start : start + MAX_DELETE_KEYS])
