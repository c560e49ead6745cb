"""Chunk maps as pure functions: overlay, cut and count the slice references of a chunk.

A map is a list of SliceRef sorted by offset that never overlap; a later write cuts what it covers, so the
list is always the shortest that says the same, and a slice that is wholly covered is known to be dead at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from chunkstore.geometry import CHUNK_BYTES
from metasvc.api import overlay as layers
from metasvc.model import SliceRef


def cut(refs: list[SliceRef], start: int, end: int) -> list[SliceRef]:
    """Return refs without what lies in [start, end)."""
    kept = refs.copy()
    layers.cut(kept, start, end)
    return kept


def overlay(refs: list[SliceRef], newer: Iterable[SliceRef]) -> list[SliceRef]:
    """Return refs with newer ones laid over them, one after the other; neighbours that continue each other are joined."""
    merged = refs.copy()
    layers.overlay_all(merged, newer)
    return merged


def clip(refs: Iterable[SliceRef], start: int, end: int) -> list[SliceRef]:
    """Return the parts of refs that lie in [start, end)."""
    result = []
    for ref in refs:
        first, last = max(ref.offset, start), min(ref.end, end)
        if first < last:
            result.append(SliceRef(first, ref.slice_id, ref.slice_offset + first - ref.offset, last - first))
    return result


def by_chunk(refs: Iterable[SliceRef]) -> dict[int, list[SliceRef]]:
    """Split refs with offsets in the file at chunk borders; offsets in the result are in the chunk."""
    result: dict[int, list[SliceRef]] = {}
    for ref in refs:
        offset, skip, left = ref.offset, ref.slice_offset, ref.length
        while left > 0:
            index, inside = divmod(offset, CHUNK_BYTES)
            length = min(left, CHUNK_BYTES - inside)
            result.setdefault(index, []).append(SliceRef(inside, ref.slice_id, skip, length))
            offset += length
            skip += length
            left -= length
    return result


def in_file(refs: Iterable[SliceRef], index: int) -> list[SliceRef]:
    """Turn refs with offsets in a chunk into refs with offsets in the file."""
    base = index * CHUNK_BYTES
    return [ref._replace(offset=base + ref.offset) for ref in refs]


def count_slices(refs: Iterable[SliceRef], into: dict[int, int], sign: int) -> None:
    """Add ``sign`` to the count of each slice for each of its refs."""
    for ref in refs:
        into[ref.slice_id] = into.get(ref.slice_id, 0) + sign
