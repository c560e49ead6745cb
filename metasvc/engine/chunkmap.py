"""Chunk maps as pure functions: overlay, cut and count the slice references of a chunk.

A map is a list of SliceRef sorted by offset that never overlap; a later write cuts what it covers, so the
list is always the shortest that says the same, and a slice that is wholly covered is known to be dead at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from chunkstore.geometry import CHUNK_BYTES
from metasvc.model import SliceRef


def cut(refs: list[SliceRef], start: int, end: int) -> list[SliceRef]:
    """Return refs without what lies in [start, end)."""
    if not refs or start >= end or refs[-1].end <= start or refs[0].offset >= end:
        return refs
    kept: list[SliceRef] = []
    for ref in refs:
        if ref.end <= start or ref.offset >= end:
            kept.append(ref)
            continue
        if ref.offset < start:
            kept.append(ref._replace(length=start - ref.offset))
        if ref.end > end:
            skip = end - ref.offset
            kept.append(SliceRef(end, ref.slice_id, ref.slice_offset + skip, ref.length - skip))
    return kept


def overlay(refs: list[SliceRef], new: SliceRef) -> list[SliceRef]:
    """Return refs with a newer one laid over them; neighbours that continue each other are joined."""
    if not refs or refs[-1].end <= new.offset:
        if refs and _continues(refs[-1], new):
            return [*refs[:-1], refs[-1]._replace(length=refs[-1].length + new.length)]
        return [*refs, new]
    kept = cut(refs, new.offset, new.end)
    at = bisect_left(kept, new.offset, key=lambda ref: ref.offset)
    before, after = kept[:at], kept[at:]
    if before and _continues(before[-1], new):
        previous = before.pop()
        new = previous._replace(length=previous.length + new.length)
    if after and _continues(new, after[0]):
        new = new._replace(length=new.length + after[0].length)
        after = after[1:]
    return [*before, new, *after]


def _continues(first: SliceRef, second: SliceRef) -> bool:
    return (
        first.end == second.offset
        and first.slice_id == second.slice_id
        and first.slice_offset + first.length == second.slice_offset
    )


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
