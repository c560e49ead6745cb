"""The stored block: what goes in comes out, whole or by frames, and no altered byte gets through."""

from __future__ import annotations

import random
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chunkstore.block import (
    DIGEST_BYTES,
    MAGIC,
    BlockHeader,
    Codec,
    CodecKind,
    block_digest,
    decode,
    decode_frame,
    digest,
    digest_of,
    encode,
    frame_digests,
    header_size,
    read_header,
)
from chunkstore.errors import AtollError, FormatUnsupported, ObjectCorrupt
from chunkstore.geometry import FRAME_BYTES, MAX_BLOCK_BYTES, frame_count
from tests.chunkstore.golden_blocks import GOLDEN, Golden

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"

NONE = Codec.parse("none")
ZSTD = Codec.parse("zstd:1")
codecs = st.sampled_from([NONE, ZSTD, Codec.parse("zstd:3")])


def _pieces(parts: list[tuple[int, bool, int]]) -> bytes:
    """Join runs of noise and of text, so that frames of one block differ in whether they shrink."""
    out: list[bytes] = []
    for length, is_noise, seed in parts:
        text = b"all work and no play %d " % seed
        out.append(random.Random(seed).randbytes(length) if is_noise else (text * (length // len(text) + 1))[:length])
    return b"".join(out)


# Lengths around the edges of frames, of samples, and of nothing.
_lengths = st.one_of(
    st.integers(1, 600),
    st.sampled_from([8191, 8192, 8193, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 1, 2 * FRAME_BYTES]),
    st.integers(1, 2 * FRAME_BYTES),
)
blocks = st.lists(st.tuples(_lengths, st.booleans(), st.integers(0, 1 << 20)), min_size=1, max_size=3).map(_pieces)


@settings(max_examples=60)
@given(raw=blocks, codec=codecs)
@example(raw=b"\0", codec=ZSTD)
@example(raw=bytes(MAX_BLOCK_BYTES), codec=ZSTD)
def test_a_block_decodes_to_what_was_encoded(raw: bytes, codec: Codec) -> None:
    encoded = encode(raw, codec=codec)
    assert decode(encoded.payload, expected_digest=encoded.digest, raw_length=len(raw)) == raw
    assert len(encoded.payload) <= header_size(len(raw)) + len(raw)


@settings(max_examples=40)
@given(raw=blocks, codec=codecs)
def test_the_digest_depends_on_the_raw_bytes_alone(raw: bytes, codec: Codec) -> None:
    encoded = encode(raw, codec=codec)
    assert encoded.digest == digest_of(raw) == digest_of(bytearray(raw)) == digest_of(memoryview(raw))
    assert encoded.digest == block_digest(frame_digests(raw), len(raw))
    assert len(encoded.digest) == DIGEST_BYTES


@settings(max_examples=40)
@given(raw=blocks, codec=codecs)
def test_each_frame_read_alone_is_that_slice_of_the_whole(raw: bytes, codec: Codec) -> None:
    encoded = encode(raw, codec=codec)
    # A reader fetches this much, knowing only what the chunk map says.
    head = encoded.payload[: header_size(len(raw))]
    header = read_header(head, expected_digest=encoded.digest, raw_length=len(raw))
    assert len(header.frames) == frame_count(len(raw))
    assert header.stored_length == len(encoded.payload)
    for index in range(len(header.frames)):
        start, end = header.frame_range(index)
        frame = decode_frame(header, index, encoded.payload[start:end])
        assert frame == raw[index * FRAME_BYTES : (index + 1) * FRAME_BYTES]


def _is_refused_or_harmless(raw: bytes, payload: bytes, expected: bytes) -> bool:
    """Return whether an altered object is refused; True also where decoding gave exactly the right bytes."""
    try:
        return decode(payload, expected_digest=expected, raw_length=len(raw)) == raw
    except (ObjectCorrupt, FormatUnsupported):
        return True


@settings(max_examples=150)
@given(raw=blocks, codec=codecs, data=st.data())
def test_an_altered_byte_is_never_data(raw: bytes, codec: Codec, data: st.DataObject) -> None:
    encoded = encode(raw, codec=codec)
    at = data.draw(st.integers(0, len(encoded.payload) - 1), label="offset")
    flip = data.draw(st.integers(1, 255), label="flip")
    payload = bytearray(encoded.payload)
    payload[at] ^= flip
    header = read_header(encoded.payload, expected_digest=encoded.digest, raw_length=len(raw))
    is_in_zstd = any(frame.is_zstd and frame.start <= at < frame.end for frame in header.frames)
    if is_in_zstd:
        # zstd has a few bits that mean nothing; all others are noticed.
        assert _is_refused_or_harmless(raw, bytes(payload), encoded.digest)
    else:
        with pytest.raises((ObjectCorrupt, FormatUnsupported)):
            decode(bytes(payload), expected_digest=encoded.digest, raw_length=len(raw))


def test_every_flip_of_every_bit_of_a_small_raw_block_is_refused() -> None:
    raw = b"twenty-three raw bytes."
    encoded = encode(raw, codec=NONE)
    for bit in range(8 * len(encoded.payload)):
        payload = bytearray(encoded.payload)
        payload[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ObjectCorrupt, FormatUnsupported)):
            decode(payload, expected_digest=encoded.digest, raw_length=len(raw))


def test_every_flip_of_every_bit_of_a_small_zstd_block_is_refused_or_harmless() -> None:
    raw = b"all work and no play " * 30
    encoded = encode(raw, codec=ZSTD)
    harmless = 0
    for bit in range(8 * len(encoded.payload)):
        payload = bytearray(encoded.payload)
        payload[bit // 8] ^= 1 << bit % 8
        try:
            assert decode(payload, expected_digest=encoded.digest, raw_length=len(raw)) == raw
        except (ObjectCorrupt, FormatUnsupported):
            continue
        assert bit // 8 >= header_size(len(raw))
        harmless += 1
    # The unused bit of a zstd frame header and the like; were it more, the digests would not be looked at.
    assert harmless <= 4


@settings(max_examples=60)
@given(raw=blocks, codec=codecs, data=st.data())
def test_a_truncated_or_longer_object_is_refused(raw: bytes, codec: Codec, data: st.DataObject) -> None:
    encoded = encode(raw, codec=codec)
    end = data.draw(st.integers(0, len(encoded.payload) - 1), label="end")
    for payload in (encoded.payload[:end], encoded.payload + b"\0"):
        with pytest.raises(ObjectCorrupt):
            decode(payload, expected_digest=encoded.digest, raw_length=len(raw))


@settings(max_examples=40)
@given(raw=blocks, other=blocks, codec=codecs)
def test_a_sound_object_of_other_bytes_is_refused(raw: bytes, other: bytes, codec: Codec) -> None:
    """A table that is whole and signed by its own header digest is still not the one that was committed."""
    if raw == other:
        return
    expected = digest_of(raw)
    payload = encode(other, codec=codec).payload
    with pytest.raises(ObjectCorrupt):
        decode(payload, expected_digest=expected, raw_length=len(raw))
    with pytest.raises(ObjectCorrupt):
        read_header(payload, expected_digest=expected, raw_length=len(other))


def _resealed(payload: bytes, raw_length: int, changes: dict[int, bytes]) -> bytes:
    """Alter header bytes and make the header digest right again, as an attacker or a newer writer would."""
    size = header_size(raw_length)
    head = bytearray(payload[: size - DIGEST_BYTES])
    for at, change in changes.items():
        head[at : at + len(change)] = change
    return bytes(head) + digest(head) + payload[size:]


@pytest.mark.parametrize(
    ("offset", "change", "kind"),
    [
        (4, struct.pack("<H", 2), FormatUnsupported),  # version
        (4, struct.pack("<H", 0xFFFF), FormatUnsupported),
        (4, struct.pack("<H", 0), FormatUnsupported),
        (6, b"\x02", FormatUnsupported),  # codec
        (7, b"\x01", FormatUnsupported),  # flags
        (8, struct.pack("<I", FRAME_BYTES * 2), FormatUnsupported),  # frame bytes
        (12, struct.pack("<I", 1), ObjectCorrupt),  # raw length
        (12, struct.pack("<I", 0), ObjectCorrupt),
        (12, struct.pack("<I", MAX_BLOCK_BYTES + 1), ObjectCorrupt),
        (16, bytes(16), ObjectCorrupt),  # block digest
        (32, struct.pack("<I", 2), ObjectCorrupt),  # frame count
        (36, struct.pack("<I", 1), FormatUnsupported),  # reserved
        (40, struct.pack("<I", 1), ObjectCorrupt),  # offset of the frame
        (44, struct.pack("<I", 1), ObjectCorrupt),  # its stored length
        (44, struct.pack("<I", 700 | 1 << 31), ObjectCorrupt),  # zstd in a block that says raw
        (48, bytes(16), ObjectCorrupt),  # its digest
    ],
)
def test_a_resealed_header_is_refused_for_what_it_says(offset: int, change: bytes, kind: type[AtollError]) -> None:
    raw = bytes(range(256)) * 3
    encoded = encode(raw, codec=NONE)
    payload = _resealed(encoded.payload, len(raw), {offset: change})
    with pytest.raises(kind, match=r"^slice 7 block 3: "):
        decode(payload, expected_digest=encoded.digest, raw_length=len(raw), origin="slice 7 block 3")


def test_a_newer_version_is_refused_before_anything_else_is_believed() -> None:
    with pytest.raises(FormatUnsupported, match="newer version; upgrade"):
        read_header(MAGIC + struct.pack("<H", 2) + bytes(100), expected_digest=None, raw_length=None)


def test_a_frame_that_promises_more_bytes_than_its_length_is_refused_unread() -> None:
    raw = b"all work and no play " * 30
    encoded = encode(raw, codec=ZSTD)
    header = read_header(encoded.payload, expected_digest=encoded.digest, raw_length=len(raw))
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    frame = header.frames[0]._replace(end=header.frames[0].start + len(bomb))
    with pytest.raises(ObjectCorrupt, match="frame 0 is not of 630 bytes"):
        decode_frame(BlockHeader(len(raw), encoded.digest, (frame,)), 0, bomb)


def test_a_header_of_a_scan_is_checked_against_itself() -> None:
    raw = b"found in a bucket" * 5
    encoded = encode(raw, codec=NONE)
    header = read_header(encoded.payload, expected_digest=None, raw_length=None)
    assert (header.raw_length, header.digest) == (len(raw), encoded.digest)


def test_a_frame_is_compressed_only_where_that_saves_a_tenth() -> None:
    noise = random.Random(1).randbytes(FRAME_BYTES)
    text = b"%s" % (b"all work and no play " * FRAME_BYTES)[:FRAME_BYTES]
    # 7 % smaller: what zstd makes of the float32 weights of a model.
    floats = struct.pack(f"<{FRAME_BYTES // 4}f", *map(partial(random.Random(2).gauss, 0), [1.0] * (FRAME_BYTES // 4)))
    encoded = encode(noise + text + floats, codec=ZSTD)
    header = read_header(encoded.payload, expected_digest=encoded.digest, raw_length=3 * FRAME_BYTES)
    assert [frame.is_zstd for frame in header.frames] == [False, True, False]
    assert header.frames[1].end - header.frames[1].start < FRAME_BYTES // 10


def test_a_block_of_raw_frames_is_decoded_without_a_copy() -> None:
    encoded = encode(random.Random(3).randbytes(FRAME_BYTES + 5), codec=ZSTD)
    decoded = decode(encoded.payload, expected_digest=encoded.digest, raw_length=FRAME_BYTES + 5)
    assert isinstance(decoded, memoryview)
    assert decoded.obj is encoded.payload
    assert decoded.readonly


@pytest.mark.parametrize("raw", [b"", bytes(MAX_BLOCK_BYTES + 1)])
def test_a_block_of_no_bytes_or_too_many_is_not_made(raw: bytes) -> None:
    with pytest.raises(ValueError, match="a block has 1 to"):
        encode(raw, codec=NONE)


def test_threads_do_not_share_compressors() -> None:
    raws = [_pieces([(FRAME_BYTES, bool(n % 2), n), (1000 + n, False, n)]) for n in range(16)]

    def round_trip(raw: bytes) -> bool:
        encoded = encode(raw, codec=ZSTD)
        return decode(encoded.payload, expected_digest=encoded.digest, raw_length=len(raw)) == raw

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, raws * 8))


@pytest.mark.parametrize("text", ["none", "zstd:1", "zstd:19"])
def test_a_codec_is_spelled_as_it_is_read(text: str) -> None:
    assert str(Codec.parse(text)) == text


def test_codecs_have_the_numbers_of_the_format() -> None:
    assert (NONE.kind, ZSTD.kind) == (CodecKind.RAW, CodecKind.ZSTD)
    assert (int(CodecKind.RAW), int(CodecKind.ZSTD)) == (0, 1)


@pytest.mark.parametrize(
    "text", ["", "zstd", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "zstd:1.5", "zstd:²", "lz4", "none:1", "NONE"]
)
def test_an_unknown_codec_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(ValueError, match="use none or zstd:1 to zstd:19"):
        Codec.parse(text)


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_a_golden_block_still_reads_as_what_it_was_made_of(golden: Golden) -> None:
    expected = bytes.fromhex(golden.digest)
    assert decode(golden.payload, expected_digest=expected, raw_length=len(golden.raw)) == golden.raw
    header = read_header(golden.payload, expected_digest=expected, raw_length=len(golden.raw))
    assert tuple(frame.is_zstd for frame in header.frames) == golden.zstd_frames
    assert digest_of(golden.raw) == expected


@pytest.mark.parametrize(
    "golden", [golden for golden in GOLDEN if not any(golden.zstd_frames)], ids=lambda golden: golden.name
)
def test_what_is_stored_raw_is_still_encoded_byte_for_byte_the_same(golden: Golden) -> None:
    assert encode(golden.raw, codec=Codec.parse(golden.codec)) == (golden.payload, bytes.fromhex(golden.digest))


def test_the_dump_in_the_format_page_is_the_golden_block() -> None:
    lines = re.findall(r"^    ([0-9a-f]{8}): ((?:[0-9a-f]{2} ?)+)", FORMAT_PAGE.read_text(), re.MULTILINE)
    dumped = {int(offset, 16): bytes.fromhex(digits) for offset, digits in lines}
    assert list(dumped) == list(range(0, 16 * len(dumped), 16))
    assert b"".join(dumped.values()) == GOLDEN[0].payload
