"""The arithmetic of chunks, blocks, frames and keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkstore.geometry import (
    CHUNK_BYTES,
    DEFAULT_BLOCK_BYTES,
    FRAME_BYTES,
    MAX_BLOCK_BYTES,
    MAX_FILE_BYTES,
    MIN_BLOCK_BYTES,
    SLICES_PER_PREFIX,
    BlockIndex,
    SliceId,
    block_count,
    block_key,
    block_length,
    blocks_of_range,
    frame_count,
    frame_length,
    frames_of_range,
    is_block_size,
    parse_block_key,
)

UUID = "0193b1f0-5d1a-7c1e-9d7a-3f0c2f6f8a11"
block_sizes = st.sampled_from([MIN_BLOCK_BYTES << n for n in range(9)])
lengths = st.integers(min_value=0, max_value=1 << 40)


def test_sizes_are_those_of_the_design() -> None:
    assert CHUNK_BYTES == 64 * 1024**2
    assert FRAME_BYTES == 256 * 1024
    assert DEFAULT_BLOCK_BYTES == 4 * 1024**2
    assert MAX_FILE_BYTES % CHUNK_BYTES == 0
    assert MAX_FILE_BYTES // CHUNK_BYTES == 1 << 31


@pytest.mark.parametrize(
    ("block_bytes", "allowed"),
    [
        (MIN_BLOCK_BYTES, True),
        (DEFAULT_BLOCK_BYTES, True),
        (MAX_BLOCK_BYTES, True),
        (MIN_BLOCK_BYTES // 2, False),
        (MAX_BLOCK_BYTES * 2, False),
        (MIN_BLOCK_BYTES + 1, False),
        (3 * MIN_BLOCK_BYTES, False),
        (0, False),
        (-MIN_BLOCK_BYTES, False),
    ],
)
def test_block_sizes_are_powers_of_two_between_their_bounds(block_bytes: int, allowed: bool) -> None:  # noqa: FBT001
    assert is_block_size(block_bytes) is allowed


@given(length=lengths.filter(bool), block_bytes=block_sizes)
def test_the_blocks_of_a_slice_add_up_to_its_length(length: int, block_bytes: int) -> None:
    count = block_count(length, block_bytes)
    assert block_length(length, 0, block_bytes) == min(length, block_bytes)
    last = block_length(length, count - 1, block_bytes)
    assert 0 < last <= block_bytes
    assert (count - 1) * block_bytes + last == length
    for outside in (-1, count):
        with pytest.raises(IndexError):
            block_length(length, outside, block_bytes)


@given(length=st.integers(min_value=1, max_value=MAX_BLOCK_BYTES))
def test_the_frames_of_a_block_add_up_to_its_length(length: int) -> None:
    assert sum(frame_length(length, index) for index in range(frame_count(length))) == length
    for outside in (-1, frame_count(length)):
        with pytest.raises(IndexError):
            frame_length(length, outside)


def test_an_empty_slice_has_no_blocks_and_an_empty_range_touches_none() -> None:
    assert block_count(0, DEFAULT_BLOCK_BYTES) == 0
    assert list(blocks_of_range(7, 7, MIN_BLOCK_BYTES)) == []
    assert list(blocks_of_range(8, 7, MIN_BLOCK_BYTES)) == []
    assert list(frames_of_range(FRAME_BYTES, FRAME_BYTES)) == []


@given(start=st.integers(0, 1 << 34), length=st.integers(0, 40 * MIN_BLOCK_BYTES), block_bytes=block_sizes)
def test_the_blocks_of_a_range_cover_it_once_and_in_order(start: int, length: int, block_bytes: int) -> None:
    position = start
    for part in blocks_of_range(start, start + length, block_bytes):
        assert 0 <= part.start < part.end <= block_bytes
        assert part.block_index * block_bytes + part.start == position
        position += part.end - part.start
    assert position == start + length


@given(start=st.integers(0, MAX_BLOCK_BYTES), length=st.integers(1, 3 * FRAME_BYTES))
def test_the_frames_of_a_range_are_those_that_share_a_byte_with_it(start: int, length: int) -> None:
    end = start + length
    touched = [n for n in range(end // FRAME_BYTES + 2) if n * FRAME_BYTES < end and (n + 1) * FRAME_BYTES > start]
    assert list(frames_of_range(start, end)) == touched


def test_keys_have_the_shape_that_the_design_says() -> None:
    assert block_key(UUID, SliceId(0), 0) == f"{UUID}/0/0.0"
    assert block_key(UUID, SliceId(0x2ABCDEF), 17) == f"{UUID}/2a/2abcdef.17"
    assert block_key(UUID, SliceId(SLICES_PER_PREFIX - 1), 1) == f"{UUID}/0/fffff.1"
    assert block_key(UUID, SliceId(SLICES_PER_PREFIX), 1) == f"{UUID}/1/100000.1"


@given(slice_id=st.integers(0, (1 << 63) - 1), index=st.integers(0, 1 << 20))
def test_a_key_reads_back_as_what_it_was_made_of(slice_id: int, index: int) -> None:
    assert parse_block_key(block_key(UUID, SliceId(slice_id), index)) == (UUID, SliceId(slice_id), BlockIndex(index))


@pytest.mark.parametrize(
    "key",
    [
        "",
        UUID,
        f"{UUID}/0/5",
        f"{UUID}/0/5.",
        f"{UUID}/0/.5",
        f"{UUID}/0/5.-1",
        f"{UUID}/0/-5.1",
        f"{UUID}/0/05.1",
        f"{UUID}/0/5.01",
        f"{UUID}/0/5.+1",
        f"{UUID}/0/0x5.1",
        f"{UUID}/0/5_5.1",
        f"{UUID}/0/ 5.1",
        f"{UUID}/0/A.1",
        f"{UUID}/1/5.1",
        f"{UUID}/0/5.1/x",
        f"{UUID}//0/5.1",
        f"{UUID}/0/5.1.1",
        "/0/5.1",
        f"x/{UUID}/0/5.1",
    ],
)
def test_what_block_key_never_makes_is_no_key(key: str) -> None:
    assert parse_block_key(key) is None
