"""The job that gathers small slices into packs: which ones go together, and writing them.

Owns the choice only; that nothing is lost or seen is the matter of metasvc.engine.packing. Files that were made one after the
other lie side by side in a pack, so that reading one brings its neighbours into the cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Final

from chunkstore.geometry import MIB, Buffer, SliceId
from chunkstore.slices import ChunkStore, SliceInfo
from metasvc.api import MetaClient
from metasvc.engine.packing import Move, Packing, Piece
from metasvc.model import PACK_BYTES, SliceKind, WrittenSlice

LEAST_BYTES: Final = 1 * MIB
"""Fewer small bytes stay where they are: an object for them would be no gain."""
AGE_S: Final = 60.0
"""Younger ones may be about to be overwritten or removed."""
LOOK_AT_ONCE: Final = 4096


async def pack_small(
    packing: Packing,
    meta: MetaClient,
    chunks: ChunkStore,
    *,
    age_s: float = AGE_S,
    least_bytes: int = LEAST_BYTES,
    pause_s: float = 0.0,
) -> int:
    """Gather inline slices until less than ``least_bytes`` of them is left; how many refs were moved."""
    moved = 0
    while True:
        pieces = await packing.small(before_ns=time.time_ns() - int(age_s * 1e9), limit=LOOK_AT_ONCE)
        full = [group for group in _groups(pieces) if sum(piece.length for piece in group) >= least_bytes]
        for group in full:
            moved += await _write(packing, meta, chunks, group)
            await asyncio.sleep(pause_s)
        if not full:
            return moved


async def repack(packing: Packing, meta: MetaClient, chunks: ChunkStore, *, pause_s: float = 0.0) -> int:
    """Gather what is left of packs of which half or more is not used any more; how many refs were moved."""
    moved = 0
    after: SliceId | None = None
    while True:
        pieces, after = await packing.sparse(after=after)
        for group in _groups(pieces):
            moved += await _write(packing, meta, chunks, group)
            await asyncio.sleep(pause_s)
        if after is None:
            return moved


def _groups(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Divide pieces into packs, neighbours together."""
    group: list[Piece] = []
    size_bytes = 0
    for piece in sorted(pieces, key=lambda piece: (piece.ino, piece.chunk_index, piece.slice_id, piece.slice_offset)):
        if size_bytes + piece.length > PACK_BYTES and group:
            yield group
            group, size_bytes = [], 0
        group.append(piece)
        size_bytes += piece.length
    if group:
        yield group


async def _write(packing: Packing, meta: MetaClient, chunks: ChunkStore, group: Sequence[Piece]) -> int:
    """Write one pack and let the files name it. Errors of the bucket and of the owner; nothing has changed then."""
    slice_id = SliceId((await meta.allocate_slices(1))[0])
    writer = chunks.writer(slice_id)
    moves: list[Move] = []
    try:
        length = 0
        for piece in group:
            waits = writer.append(await _bytes(packing, chunks, piece))
            if waits is not None:
                await waits
            moves.append(Move(piece, length))
            length += piece.length
        sealed = await writer.seal()
    except BaseException:
        await writer.discard()
        raise
    # What is so little that it is kept inline again is a slice all the same.
    kind, data = (SliceKind.BLOCKS, sealed.digests) if sealed.inline is None else (SliceKind.INLINE, sealed.inline)
    return await packing.move(WrittenSlice(slice_id, sealed.length, kind, data, ()), moves)


async def _bytes(packing: Packing, chunks: ChunkStore, piece: Piece) -> Buffer:
    if piece.data is not None:
        return piece.data
    row = await packing.slice(piece.slice_id)
    if row is None:
        # Gone since: the bytes are wanted by nobody, the place is.
        return bytes(piece.length)
    first = piece.slice_offset
    return await chunks.read(SliceInfo(row.slice_id, row.length, row.data), first, first + piece.length)
