"""Chunk maps against bytes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from chunkstore.geometry import CHUNK_BYTES, SliceId
from metasvc.engine import chunkmap
from metasvc.model import SliceRef, pack_refs, unpack_refs

SPACE = 120
WRITES = st.lists(
    st.tuples(st.integers(0, SPACE), st.integers(1, 40), st.integers(0, 5), st.booleans(), st.integers(0, 3)),
    max_size=30,
)


def painted(refs: list[SliceRef]) -> dict[int, tuple[int, int]]:
    """Return for each byte which byte of which slice it comes from."""
    return {ref.offset + at: (ref.slice_id, ref.slice_offset + at) for ref in refs for at in range(ref.length)}


@given(WRITES)
def test_overlay_and_cut_do_what_they_do_to_bytes(writes: list[tuple[int, int, int, bool, int]]) -> None:
    refs: list[SliceRef] = []
    expected: dict[int, tuple[int, int]] = {}
    for offset, length, slice_id, is_cut, skip in writes:
        if is_cut:
            refs = chunkmap.cut(refs, offset, offset + length)
            for at in range(offset, offset + length):
                expected.pop(at, None)
        else:
            refs = chunkmap.overlay(refs, [SliceRef(offset, SliceId(slice_id), skip, length)])
            expected.update({offset + at: (slice_id, skip + at) for at in range(length)})
        assert painted(refs) == expected
        assert all(a.end <= b.offset for a, b in itertools.pairwise(refs))
        assert all(ref.length > 0 for ref in refs)
    assert unpack_refs(pack_refs(refs)) == refs


@given(WRITES, st.integers(0, SPACE), st.integers(0, SPACE))
def test_clip_keeps_exactly_what_lies_inside(writes: list[tuple[int, int, int, bool, int]], one: int, two: int) -> None:
    refs: list[SliceRef] = []
    for offset, length, slice_id, _, skip in writes:
        refs = chunkmap.overlay(refs, [SliceRef(offset, SliceId(slice_id), skip, length)])
    start, end = sorted((one, two))
    inside = {at: byte for at, byte in painted(refs).items() if start <= at < end}
    assert painted(chunkmap.clip(refs, start, end)) == inside


@given(st.integers(0, 5 * CHUNK_BYTES), st.integers(1, 3 * CHUNK_BYTES), st.integers(0, 1000))
def test_splitting_at_chunk_borders_and_back_loses_nothing(offset: int, length: int, skip: int) -> None:
    ref = SliceRef(offset, SliceId(9), skip, length)
    parts = [part for index, refs in chunkmap.by_chunk([ref]).items() for part in chunkmap.in_file(refs, index)]
    assert all(part.offset // CHUNK_BYTES == (part.end - 1) // CHUNK_BYTES for part in parts)
    joined: list[SliceRef] = []
    for part in parts:
        joined = chunkmap.overlay(joined, [part])
    assert joined == [ref]
