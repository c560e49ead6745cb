"""Compaction: a chunk whose map has grown into many pieces is written again as one slice.

Owns reading the pieces and writing the new slice; whether the map is still the one that was read decides the owner
(MetaAdmin.replace_refs), so a writer that comes in between wins and the new slice becomes garbage. Content, times and length
stay. Readers that hold the old map find the old slices until their objects are deleted, and then fetch the new map.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from chunkstore.geometry import CHUNK_BYTES, MIB, Buffer, SliceId
from chunkstore.slices import ChunkStore, SliceInfo
from metasvc.api import MetaClient
from metasvc.api.admin import MetaAdmin
from metasvc.model import FileMap, Ino, SliceKind, SliceRef, WrittenSlice

READ_BYTES: Final = 4 * MIB


async def compact(meta: MetaClient, admin: MetaAdmin, chunks: ChunkStore, *, ino: Ino, chunk: int) -> bool:
    """Compact one chunk; False if it has nothing to gain or was changed meanwhile.

    Reads up to 64 MiB and writes as much. Errors of the chunk store and of the owner; nothing has changed then.
    """
    start = chunk * CHUNK_BYTES
    found = await meta.read_map(ino, start=start, end=start + CHUNK_BYTES)
    refs = [ref for ref in found.refs if start <= ref.offset < start + CHUNK_BYTES]
    if len({ref.slice_id for ref in refs}) < 2:
        return False
    slice_id = SliceId((await meta.allocate_slices(1))[0])
    writer = chunks.writer(slice_id)
    try:
        placed = await _copy(chunks, found, refs, slice_id, writer.append)
        sealed = await writer.seal()
    except BaseException:
        await writer.discard()
        raise
    kind, data = (SliceKind.BLOCKS, sealed.digests) if sealed.inline is None else (SliceKind.INLINE, sealed.inline)
    written = WrittenSlice(slice_id, sealed.length, kind, data, tuple(placed))
    return await admin.replace_refs(ino, chunk, expected=refs, written=[written])


async def _copy(
    chunks: ChunkStore,
    found: FileMap,
    refs: list[SliceRef],
    slice_id: SliceId,
    append: Callable[[Buffer], Awaitable[None] | None],
) -> list[SliceRef]:
    """Append what the refs name, in order, and return where it lies in the new slice; holes are left out."""
    placed: list[SliceRef] = []
    length = 0
    for ref in refs:
        row = found.slices[ref.slice_id]
        for skip in range(0, ref.length, READ_BYTES):
            first = ref.slice_offset + skip
            last = min(first + READ_BYTES, ref.slice_offset + ref.length)
            data: Buffer
            if row.kind == SliceKind.INLINE:
                data = row.data[first:last]
            else:
                data = await chunks.read(SliceInfo(row.slice_id, row.length, row.data), first, last)
            waits = append(data)
            if waits is not None:
                await waits
        before = placed[-1] if placed else None
        if before is not None and before.end == ref.offset:
            placed[-1] = before._replace(length=before.length + ref.length)
        else:
            placed.append(SliceRef(ref.offset, slice_id, length, ref.length))
        length += ref.length
    return placed
