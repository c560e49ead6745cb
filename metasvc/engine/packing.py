"""Packs: small slices are gathered into one, without anybody who reads or writes them noticing.

A slice is immutable and its id is never used again. So wherever a chunk map names a small slice, a ref to the same bytes at
another place says the same, whatever has been written meanwhile: `move_refs` needs no version and holds nobody up. What was
cut away, overwritten or removed since the job looked is simply not found. Times and length stay; the map's version moves.

Invariants: a pack is an ordinary slice with blocks; `Slice.refs` counts its refs, and when the last one goes it becomes
garbage like any other. Rows of `packable` and `pack` are hints for the job: a wrong one costs a look.

Interleavings and crashes. The object is in the bucket before the first ref names it. A pack of a thousand files is brought
in several operations, each atomic: a crash between two leaves the rest where it was, inline, and the pack with fewer refs.
The first operation makes the row of the pack (or garbage, if nothing of it is wanted any more); later ones find it, or stop.
A clone may name a small slice from elsewhere: then it stays, with what it had before, and is not looked at again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunkstore.geometry import SliceId
from metasvc.engine import chunkmap, content
from metasvc.engine.engine import Engine
from metasvc.engine.tx import Tx
from metasvc.model import Ino, Pack, Packable, Slice, SliceKind, SliceRef, WrittenSlice, pack_members, unpack_members
from metasvc.store.tables import CHUNK, INODE, PACK, PACKABLE, SLICE, Key

SCAN_ROWS = 1000
LOOK_AT_ONCE = 500
MOVES_AT_ONCE = 256
"""Of one operation: 2 to 3 ms of the event loop."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that may be moved: a small slice, or what a file still has in a pack."""

    ino: Ino
    chunk_index: int
    slice_id: SliceId
    slice_offset: int
    length: int
    data: bytes | None
    """The bytes; None if they lie in the pack ``slice_id``."""


@dataclass(frozen=True, slots=True)
class Move:
    """Where the bytes of a piece lie in the new pack."""

    piece: Piece
    to_offset: int


class Packing:
    """What the job that packs asks of the owner of a volume."""

    def __init__(self, engine: Engine) -> None:
        """Look at one volume. The engine must stay open."""
        self._engine = engine

    async def small(self, *, before_ns: int, limit: int) -> list[Piece]:
        """Return inline slices that were committed before a time, at most ``limit``, in the order of their ids.

        Forgets those that are gone. Costs a scan, and the slices themselves.
        """
        engine = self._engine
        await engine.settled()
        found: list[Packable] = []
        after: Key | None = None
        while len(found) < limit and (page := await engine.store.scan(PACKABLE, after=after, limit=SCAN_ROWS)):
            found += [Packable(*row) for row in page if row[3] <= before_ns]
            after = PACKABLE.key_of(page[-1])
        pieces: list[Piece] = []
        for first in range(0, min(limit, len(found)), LOOK_AT_ONCE):
            rows = found[first : min(limit, first + LOOK_AT_ONCE)]
            pieces += await engine.run(_small_pieces, rows)
        return pieces

    async def sparse(self, *, after: SliceId | None) -> tuple[list[Piece], SliceId | None]:
        """Look through the next packs; return the pieces of those of which half is not used any more, and where to go on.

        None: that was the end. Forgets packs that are gone.
        """
        engine = self._engine
        await engine.settled()
        key = None if after is None else (after,)
        page = [Pack(*row) for row in await engine.store.scan(PACK, after=key, limit=SCAN_ROWS)]
        pieces: list[Piece] = []
        for pack in page:
            pieces += await engine.run(_sparse_pieces, pack)
            if len(pieces) >= SCAN_ROWS:
                return pieces, pack.slice_id
        return pieces, page[-1].slice_id if len(page) == SCAN_ROWS else None

    async def slice(self, slice_id: SliceId) -> Slice | None:
        """Return a slice, if it lives."""
        found: Slice | None = await self._engine.run(Tx.slice, slice_id)
        return found

    async def move(self, written: WrittenSlice, moves: Sequence[Move]) -> int:
        """Let files name a pack, whose objects are in the bucket, instead of what they named; how many refs."""
        moved: int = await self._engine.run(move_refs, written.slice_id, moves[:MOVES_AT_ONCE], moves, written)
        for first in range(MOVES_AT_ONCE, len(moves), MOVES_AT_ONCE):
            part = moves[first : first + MOVES_AT_ONCE]
            moved += await self._engine.run(move_refs, written.slice_id, part, (), None)
        return moved


def _small_pieces(tx: Tx, rows: Sequence[Packable]) -> list[Piece]:
    """A rule."""
    tx.require([(SLICE, row.slice_id) for row in rows])
    pieces = []
    for row in rows:
        slice_ = tx.slice(row.slice_id)
        if slice_ is None or slice_.kind != SliceKind.INLINE:
            tx.delete(PACKABLE, row.slice_id)
        else:
            pieces.append(Piece(row.ino, row.chunk_index, row.slice_id, 0, slice_.length, slice_.data))
    return pieces


def _sparse_pieces(tx: Tx, pack: Pack) -> list[Piece]:
    """A rule."""
    slice_ = tx.slice(pack.slice_id)
    if slice_ is None or slice_.kind == SliceKind.INLINE:
        # Gone, or so little that it is inline again.
        tx.delete(PACK, pack.slice_id)
        return []
    if 2 * slice_.refs > pack.refs:
        return []
    members = unpack_members(pack.members)
    tx.require([(CHUNK, member) for member in members])
    return [
        Piece(ino, index, ref.slice_id, ref.slice_offset, ref.length, None)
        for ino, index in members
        for ref in content.get_chunk(tx, ino, index)
        if ref.slice_id == pack.slice_id
    ]


def move_refs(
    tx: Tx, pack_id: SliceId, moves: Sequence[Move], whole: Sequence[Move], written: WrittenSlice | None
) -> int:
    """Replace refs to what was moved; how many. A rule. With ``written`` the pack is new, and made for ``whole``."""
    if written is None and tx.slice(pack_id) is None:
        return 0
    by_chunk: dict[tuple[Ino, int], dict[SliceId, list[Move]]] = {}
    for move in moves:
        piece = move.piece
        by_chunk.setdefault((piece.ino, piece.chunk_index), {}).setdefault(piece.slice_id, []).append(move)
    tx.require([(CHUNK, key) for key in by_chunk] + [(INODE, ino) for ino, _ in by_chunk])
    delta: dict[int, int] = {}
    moved = 0
    for (ino, index), by_slice in by_chunk.items():
        if tx.get(INODE, ino) is None:
            continue
        old = content.get_chunk(tx, ino, index)
        new = [_moved(ref, by_slice.get(ref.slice_id, ()), pack_id) for ref in old]
        if new == old:
            continue
        moved += sum(before is not after for before, after in zip(old, new, strict=True))
        chunkmap.count_slices(old, delta, -1)
        chunkmap.count_slices(new, delta, +1)
        content.put_chunk(tx, ino, index, new)
        inode = tx.inode(ino)
        tx.put(INODE, inode._replace(map_version=inode.map_version + 1))
    content.settle(tx, delta, () if written is None else (written,))
    for move in moves:
        if move.piece.data is not None:
            # Named from elsewhere, too, or no more: nobody needs to look again.
            tx.delete(PACKABLE, move.piece.slice_id)
    if written is not None:
        members = dict.fromkeys((move.piece.ino, move.piece.chunk_index) for move in whole)
        tx.put(PACK, Pack(pack_id, len(whole), pack_members(members)))
    return moved


def _moved(ref: SliceRef, moves: Sequence[Move], pack_id: SliceId) -> SliceRef:
    """Return a ref to the same bytes in the pack; the ref itself if they are not there."""
    for move in moves:
        piece = move.piece
        first = ref.slice_offset - piece.slice_offset
        if first >= 0 and first + ref.length <= piece.length:
            return ref._replace(slice_id=pack_id, slice_offset=move.to_offset + first)
    return ref
