"""Chunk maps for sessions that are confined to a directory: no byte that is not in the file.

A slice may hold more than a file shows of it. A pack holds small files of the whole volume, and a small slice that a file
shares with another one, as after `copy_file_range`, is sent with all its bytes. So of small slices of which a file has a part
such a session is told that part only, as an inline slice of its own; the service reads packs for it, and signs no URLs for
them. Blocks of larger slices are signed for whole: what a file does not show of them was written beside it, to the same file or
to one of which somebody copied a range.

A part has an id by itself, the same whenever it is told: clients join maps of different times and ranges by ids. It is one
that no slice has, and cannot be asked for.

Interleavings. A map is read in one step, which of its slices are packs in a later one, the bytes later still. A pack that has
gone meanwhile is told as it is: the client finds that no URL is signed for it, and reads the map anew. For a slice that is gone
none is signed, as nobody knows any more what it was.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Coroutine, Iterable
from hashlib import blake2b
from typing import Any, Final

from chunkstore.geometry import SliceId
from metasvc.engine.tx import Tx
from metasvc.model import PACK_BYTES, FileMap, Ino, OpenFile, Slice, SliceKind, SliceRef
from metasvc.server.access import VolumeAccess
from metasvc.store.tables import PACK, SLICE

__all__ = ["ConfinedMaps"]

_PART = struct.Struct("<QII")
_PART_ID: Final = 1 << 62
"""Ids of slices are counted from 1."""

Run = Callable[..., Coroutine[Any, Any, Any]]
"""Runs a rule."""


class ConfinedMaps:
    """Tell one session of maps."""

    def __init__(self, run: Run, access: VolumeAccess) -> None:
        """``run`` runs a rule without a look at what the session reaches."""
        self._run = run
        self._access = access

    async def of_map(self, found: FileMap) -> FileMap:
        """Return a map with no more than the bytes of the file. Errors of the bucket."""
        return await self._cut(found, await self._packs([found]))

    async def of_maps(self, found: dict[Ino, FileMap]) -> dict[Ino, FileMap]:
        """Return maps of small files that are about to be read. Their packs are fetched whole."""
        packs = await self._packs(found.values())
        if packs and (reader := self._access.packs) is not None:
            for row in {row.slice_id: row for each in found.values() for row in each.slices.values()}.values():
                if row.slice_id in packs:
                    await reader.prefetch(row)
        return {ino: await self._cut(each, packs) for ino, each in found.items()}

    async def of_open(self, answer: OpenFile) -> OpenFile:
        """Return an open file; without its map if that names packs: an open waits for no bucket. The client asks for it."""
        packs = await self._packs([answer.map])
        if packs:
            return answer._replace(map=FileMap(answer.map.map_version, [], {}, 0, 0))
        return answer._replace(map=await self._cut(answer.map, packs))

    async def of_copied(self, answer: tuple[int, OpenFile]) -> tuple[int, OpenFile]:
        """Return what copying a range answers."""
        return answer[0], await self.of_open(answer[1])

    async def may_sign(self, slice_id: SliceId) -> bool:
        """Return whether a slice of which a file shows a part is there, and no pack."""
        return bool(await self._run(_is_there_and_no_pack, slice_id))

    async def _packs(self, maps: Iterable[FileMap]) -> frozenset[SliceId]:
        """Return which slices of maps have to be read for the client."""
        parts = {
            ref.slice_id
            for found in maps
            for ref in found.refs
            if _is_part(ref, found.slices[ref.slice_id]) and found.slices[ref.slice_id].kind == SliceKind.BLOCKS
        }
        # A client that reads with keys of its own, from its environment, is told of packs as they are.
        if not parts or await self._access.signer() is None:
            return frozenset()
        packs: frozenset[SliceId] = await self._run(_packs_among, tuple(parts))
        return packs

    async def _cut(self, found: FileMap, packs: frozenset[SliceId]) -> FileMap:
        refs: list[SliceRef] = []
        slices: dict[SliceId, Slice] = {}
        for ref in found.refs:
            row = found.slices[ref.slice_id]
            if _is_part(ref, row) and (row.kind == SliceKind.INLINE or row.slice_id in packs):
                part = _part_id(ref)
                if part not in slices:
                    slices[part] = Slice(part, ref.length, 1, SliceKind.INLINE, await self._bytes(row, ref))
                ref = ref._replace(slice_id=part, slice_offset=0)
            else:
                slices[row.slice_id] = row
            refs.append(ref)
        return found._replace(refs=refs, slices=slices)

    async def _bytes(self, row: Slice, ref: SliceRef) -> bytes:
        start, end = ref.slice_offset, ref.slice_offset + ref.length
        if row.kind == SliceKind.INLINE:
            return row.data[start:end]
        return await self._access.require_packs().read(row, start, end)


def _is_part(ref: SliceRef, row: Slice) -> bool:
    """Return whether a file shows, at one place, only part of a slice that is sent, or packed, whole."""
    return ref.length < row.length <= PACK_BYTES


def _part_id(ref: SliceRef) -> SliceId:
    """Return an id that no slice has, nor any other part."""
    packed = _PART.pack(ref.slice_id, ref.slice_offset, ref.length)
    return SliceId(_PART_ID | int.from_bytes(blake2b(packed, digest_size=8).digest()) >> 2)


def _packs_among(tx: Tx, slice_ids: tuple[SliceId, ...]) -> frozenset[SliceId]:
    """A rule."""
    tx.require([(PACK, slice_id) for slice_id in slice_ids])
    return frozenset(slice_id for slice_id in slice_ids if tx.get(PACK, slice_id) is not None)


def _is_there_and_no_pack(tx: Tx, slice_id: SliceId) -> bool:
    """A rule."""
    tx.require([(SLICE, slice_id), (PACK, slice_id)])
    row = tx.slice(slice_id)
    return row is not None and row.kind == SliceKind.BLOCKS and tx.get(PACK, slice_id) is None
