"""Side files: byte by byte as docs/format.md says, refused where they are newer, worth nothing where they are not ours."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkstore.block import digest
from chunkstore.errors import FormatUnsupported
from chunkstore.geometry import KIB, MIB, SliceId
from chunkstore.images import sidefile
from chunkstore.images.layout import Layout, is_small
from chunkstore.images.sidefile import ABSENT, PRESENT, UNCHECKED

BOOT = UUID("0f8fad5b-d9cb-469f-a165-70867728950e")
OTHER = UUID(int=7)
LAYOUT = Layout(5 * MIB + 3, 2 * MIB)
SLICE = SliceId(0x1234567890)


def test_its_bytes_are_those_of_the_format() -> None:
    states = bytes([PRESENT] * 20 + [ABSENT])
    digests = [bytes([number]) * 16 for number in range(21)]
    data = sidefile.pack(SLICE, LAYOUT, BOOT, states=states, digests=digests)
    head = bytes.fromhex(
        "41544c49 0100 0000 9078563412000000 0300500000000000 00002000 00000400 0f8fad5bd9cb469fa16570867728950e"
    )
    assert data == head + digest(head) + states + b"".join(digests)
    assert len(data) == sidefile.size_bytes(LAYOUT) == 64 + 21 + 21 * 16
    assert sidefile.states_offset(3) == 67
    assert sidefile.digests_offset(LAYOUT, 2) == 64 + 21 + 32
    found = sidefile.unpack(data, SLICE, LAYOUT, boot_id=BOOT)
    assert found is not None
    assert (bytes(found.states), found.is_of_this_boot) == (states, True)


def test_what_another_boot_wrote_is_unchecked() -> None:
    states = bytes([PRESENT, ABSENT, UNCHECKED] * 7)
    data = sidefile.pack(SLICE, LAYOUT, BOOT, states=states, digests=[bytes(16)] * 21)
    found = sidefile.unpack(data, SLICE, LAYOUT, boot_id=OTHER)
    assert found is not None
    assert bytes(found.states) == bytes([UNCHECKED, ABSENT, UNCHECKED] * 7)
    assert not found.is_of_this_boot


def test_a_newer_version_is_refused() -> None:
    data = bytearray(sidefile.pack_header(SLICE, LAYOUT, BOOT) + bytes(21))
    data[4] = 2
    data[48:64] = digest(data[:48])
    with pytest.raises(FormatUnsupported, match="newer"):
        sidefile.unpack(bytes(data), SLICE, LAYOUT, boot_id=BOOT)


@given(position=st.integers(0, 63), bit=st.integers(0, 7))
def test_an_altered_header_makes_it_worthless(position: int, bit: int) -> None:
    data = bytearray(sidefile.pack_header(SLICE, LAYOUT, BOOT) + bytes(21))
    data[position] ^= 1 << bit
    assert sidefile.unpack(bytes(data), SLICE, LAYOUT, boot_id=BOOT) is None


def test_a_short_one_and_that_of_another_slice_are_worthless_and_unknown_states_are_absent() -> None:
    data = sidefile.pack_header(SLICE, LAYOUT, BOOT) + bytes([77] * 21)
    found = sidefile.unpack(data, SLICE, LAYOUT, boot_id=BOOT)
    assert found is not None
    assert bytes(found.states) == bytes(21)
    assert sidefile.unpack(data[:-1], SLICE, LAYOUT, boot_id=BOOT) is None
    assert sidefile.unpack(b"", SLICE, LAYOUT, boot_id=BOOT) is None
    assert sidefile.unpack(data, SliceId(5), LAYOUT, boot_id=BOOT) is None
    for other in (Layout(5 * MIB + 2, 2 * MIB), Layout(5 * MIB + 3, 4 * MIB)):
        assert sidefile.unpack(data, SLICE, other, boot_id=BOOT) is None


@given(
    length=st.integers(1, 40 * MIB),
    block_bytes=st.sampled_from([64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, 4 * MIB, 16 * MIB]),
)
def test_frames_tile_the_slice_and_never_straddle_blocks(length: int, block_bytes: int) -> None:
    layout = Layout(length, block_bytes)
    seen = 0
    for block_index in range(layout.block_count):
        frames = layout.frames_of_block(block_index)
        assert frames.start == layout.first_frame(block_index)
        for frame in frames:
            start, end = layout.frame_range(frame)
            assert start == seen
            assert (
                block_index * block_bytes <= start < end <= block_index * block_bytes + layout.block_length(block_index)
            )
            assert layout.block_of_frame(frame) == block_index
            assert layout.frames_of_range(start, end) == range(frame, frame + 1)
            seen = end
    assert seen == length
    assert layout.frame_count == sum(len(layout.frames_of_block(index)) for index in range(layout.block_count))
    if is_small(length, block_bytes):
        assert layout.block_count == 1
