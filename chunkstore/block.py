"""The stored block: encode, decode, and verify, whole or frame by frame. `docs/format.md` has it byte by byte.

Owns version 1 of the format and the rule that no byte leaves here unverified. Pure functions on bytes: no I/O, no keys, no
slices. BLAKE3 and zstd release the GIL, so callers run these on a bounded executor, never on an event loop. zstd's contexts
are kept per thread, so any number of threads may be here at once.

A block's digest is a tree of two levels: the BLAKE3-128 of its frames' digests and its raw length. Whoever holds the digest
from the chunk map can therefore verify the frame table alone, and then each frame alone (docs/adr/0001).

    header (40) | frame table (24 per frame) | header digest (16) | frames as stored
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple

import zstandard
from blake3 import blake3

from chunkstore.errors import FormatUnsupported, ObjectCorrupt
from chunkstore.geometry import FRAME_BYTES, MAX_BLOCK_BYTES, Buffer, frame_count, frame_length

MAGIC: Final = b"ATLB"
VERSION: Final = 1
DIGEST_BYTES: Final = 16

# magic, version, codec, flags, frame bytes, raw length, block digest, frame count, reserved
_HEAD: Final = Struct("<4sHBBII16sII")
# stored offset from the start of the object, stored length (top bit: zstd), digest of the raw frame
_ENTRY: Final = Struct("<II16s")
_ZSTD_BIT: Final = 1 << 31
_RAW_LENGTH: Final = Struct("<I")

# A frame is compressed only if that saves a tenth. Measured on one EPYC core, level 1, frames of 256 KiB: float32 weights
# shrink by 7.6 %, for which reading would fall from BLAKE3's 5 GB/s to zstd's 1 GB/s. A sample of 8 KiB judges that like the
# frame (7.3 %), and costs 6 us of random bytes, 17 us of floats, 32 us of text, where the frame takes 60, 380 and 1,100 us.
WORTH: Final = 0.9
SAMPLE_BYTES: Final = 8192
# Blocks of 4 MiB on that core, encode and decode in MB/s: random bytes 3,700 and 4,900; text (to 26 %) 234 and 560; floats
# 3,000 and 4,700 (stored raw); half text, half random 312 and 877. A header takes 28 us, a random frame 43 us, of text 413 us.

MIN_ZSTD_LEVEL: Final = 1
MAX_ZSTD_LEVEL: Final = 19


class CodecKind(IntEnum):
    """Number the codecs as the header stores them."""

    RAW = 0
    ZSTD = 1


@dataclass(frozen=True, slots=True)
class Codec:
    """Say how a volume compresses: `none`, or `zstd:N` with N of 1 to 19."""

    kind: CodecKind
    level: int = 0

    @classmethod
    def parse(cls, text: str) -> Codec:
        """Read `none` or `zstd:N`; ValueError with the remedy for anything else."""
        if text == "none":
            return cls(CodecKind.RAW)
        name, _, level_text = text.partition(":")
        if name == "zstd" and level_text.isascii() and level_text.isdigit():
            level = int(level_text)
            if MIN_ZSTD_LEVEL <= level <= MAX_ZSTD_LEVEL:
                return cls(CodecKind.ZSTD, level)
        raise ValueError(f"unknown compression {text!r}: use none or zstd:{MIN_ZSTD_LEVEL} to zstd:{MAX_ZSTD_LEVEL}")

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return "none" if self.kind is CodecKind.RAW else f"zstd:{self.level}"


_KNOWN_KINDS: Final = frozenset(CodecKind)


class EncodedBlock(NamedTuple):
    """Hold the bytes of an object, and the block digest to commit with the slice."""

    payload: bytes
    digest: bytes


class Frame(NamedTuple):
    """Describe one frame: where it is stored in the object, whether zstd, and the digest of its raw bytes."""

    start: int
    end: int
    is_zstd: bool
    digest: bytes


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """Hold a verified header with its frame table."""

    raw_length: int
    digest: bytes
    frames: tuple[Frame, ...]

    @property
    def stored_length(self) -> int:
        """Return the length in bytes of the whole object."""
        return self.frames[-1].end

    def frame_range(self, index: int) -> tuple[int, int]:
        """Return the bytes `[start, end)` of the object that hold frame `index`."""
        frame = self.frames[index]
        return frame.start, frame.end


def digest(raw: Buffer) -> bytes:
    """Return the BLAKE3-128 of bytes. For a frame; a block's digest is `block_digest`."""
    return blake3(raw).digest(length=DIGEST_BYTES)


def frame_digests(raw: Buffer) -> list[bytes]:
    """Return the digest of each 256 KiB frame of a block's raw bytes."""
    view = memoryview(raw).cast("B")
    return [digest(view[start : start + FRAME_BYTES]) for start in range(0, len(view), FRAME_BYTES)]


def block_digest(digests: Sequence[bytes], raw_length: int) -> bytes:
    """Return the digest of a block from those of its frames: what is committed with its slice."""
    return digest(b"".join(digests) + _RAW_LENGTH.pack(raw_length))


def digest_of(raw: Buffer) -> bytes:
    """Return the block digest of raw bytes: the same that `encode` gives, with any codec."""
    view = memoryview(raw).cast("B")
    return block_digest(frame_digests(view), len(view))


def header_size(raw_length: int) -> int:
    """Return how many bytes header, frame table and header digest take for a block of this raw length."""
    return _HEAD.size + _ENTRY.size * frame_count(raw_length) + DIGEST_BYTES


def encode(raw: Buffer, *, codec: Codec) -> EncodedBlock:
    """Return the object of a block of 1 byte to 16 MiB, and its digest.

    A frame is stored raw where its sample, or the whole of it, does not shrink by a tenth.
    """
    view = memoryview(raw).cast("B")
    raw_length = len(view)
    if not 1 <= raw_length <= MAX_BLOCK_BYTES:
        raise ValueError(f"a block has 1 to {MAX_BLOCK_BYTES} bytes, not {raw_length}")
    frames = [view[start : start + FRAME_BYTES] for start in range(0, raw_length, FRAME_BYTES)]
    digests = [digest(frame) for frame in frames]
    block = block_digest(digests, raw_length)
    compressor = None if codec.kind is CodecKind.RAW else _compressor(codec.level)
    offset = header_size(raw_length)
    entries: list[bytes] = []
    stored: list[Buffer] = []
    kind = CodecKind.RAW
    for frame, frame_digest in zip(frames, digests, strict=True):
        smaller = None if compressor is None else _compress(compressor, frame)
        if smaller is None:
            stored.append(frame)
            entries.append(_ENTRY.pack(offset, len(frame), frame_digest))
            offset += len(frame)
        else:
            kind = CodecKind.ZSTD
            stored.append(smaller)
            entries.append(_ENTRY.pack(offset, len(smaller) | _ZSTD_BIT, frame_digest))
            offset += len(smaller)
    head = _HEAD.pack(MAGIC, VERSION, kind, 0, FRAME_BYTES, raw_length, block, len(frames), 0) + b"".join(entries)
    return EncodedBlock(b"".join([head, digest(head), *stored]), block)


def read_header(
    head: Buffer, *, expected_digest: bytes | None, raw_length: int | None, origin: str = "block"
) -> BlockHeader:
    """Verify and return the header at the start of an object; `head` needs `header_size(raw_length)` bytes, may have more.

    `expected_digest` and `raw_length` come from the chunk map and authenticate the frame table; None (both) only where there
    is no map, as in a scan of a bucket. `origin` names the object in errors. ObjectCorrupt says what differs;
    FormatUnsupported for a newer version or codec.
    """
    view = memoryview(head).cast("B")
    if len(view) < _HEAD.size:
        raise ObjectCorrupt(f"{origin}: ends after {len(view)} bytes, within its header")
    magic, version, kind, flags, frame_bytes, length, block, count, reserved = _HEAD.unpack_from(view)
    if magic != MAGIC:
        raise ObjectCorrupt(f"{origin}: begins with {magic!r}, which is no block")
    if version > VERSION:
        raise FormatUnsupported(f"{origin}: block format {version} was written by a newer version; upgrade this node")
    # The length decides where the header ends, so it is checked before anything is read by it.
    if not 1 <= length <= MAX_BLOCK_BYTES or raw_length not in (None, length):
        expected = f"1 to {MAX_BLOCK_BYTES}" if raw_length is None else raw_length
        raise ObjectCorrupt(f"{origin}: raw length is {length}, expected {expected}")
    size = header_size(length)
    if len(view) < size:
        raise ObjectCorrupt(f"{origin}: ends after {len(view)} bytes, within its frame table of {size}")
    if digest(view[: size - DIGEST_BYTES]) != view[size - DIGEST_BYTES : size]:
        raise ObjectCorrupt(f"{origin}: header digest differs")
    if version != VERSION or frame_bytes != FRAME_BYTES or kind not in _KNOWN_KINDS or flags or reserved:
        raise FormatUnsupported(
            f"{origin}: header (version {version}, codec {kind}, flags {flags}, frames of {frame_bytes}) "
            "was written by a newer version; upgrade this node"
        )
    frames = _frames(view[_HEAD.size : size - DIGEST_BYTES], kind=CodecKind(kind), raw_length=length, origin=origin)
    computed = block_digest([frame.digest for frame in frames], length)
    if count != len(frames) or block != computed:
        raise ObjectCorrupt(f"{origin}: header and frame table disagree")
    if expected_digest not in (None, computed):
        raise ObjectCorrupt(f"{origin}: block digest is {computed.hex()}, committed was {bytes(expected_digest).hex()}")
    return BlockHeader(length, computed, frames)


def decode_frame(header: BlockHeader, index: int, stored: Buffer, *, origin: str = "block") -> bytes | memoryview:
    """Return the raw bytes of frame `index` from its stored bytes; ObjectCorrupt if they are not what was written.

    A frame that was stored raw is returned as a view of `stored`, not as a copy.
    """
    frame = header.frames[index]
    view = memoryview(stored).cast("B").toreadonly()
    if len(view) != frame.end - frame.start:
        raise ObjectCorrupt(f"{origin}: frame {index} has {len(view)} stored bytes of {frame.end - frame.start}")
    raw: bytes | memoryview = view
    if frame.is_zstd:
        raw = _decompress(view, frame_length(header.raw_length, index), index=index, origin=origin)
    if digest(raw) != frame.digest:
        raise ObjectCorrupt(f"{origin}: digest of frame {index} differs")
    return raw


def decode(payload: Buffer, *, expected_digest: bytes, raw_length: int, origin: str = "block") -> bytes | memoryview:
    """Return the raw bytes of a whole object, every digest verified; errors as `read_header` and `decode_frame`.

    A block of which no frame was compressed is returned as a view of `payload`, not as a copy.
    """
    view = memoryview(payload).cast("B").toreadonly()
    header = read_header(view, expected_digest=expected_digest, raw_length=raw_length, origin=origin)
    if len(view) != header.stored_length:
        raise ObjectCorrupt(f"{origin}: has {len(view)} bytes, its frame table ends at {header.stored_length}")
    parts = [
        decode_frame(header, index, view[frame.start : frame.end], origin=origin)
        for index, frame in enumerate(header.frames)
    ]
    if not any(frame.is_zstd for frame in header.frames):
        return view[header.frames[0].start :]
    return b"".join(parts) if len(parts) > 1 else parts[0]


def _frames(table: memoryview, *, kind: CodecKind, raw_length: int, origin: str) -> tuple[Frame, ...]:
    """Read the frame table; ObjectCorrupt unless the frames follow each other and no length is absurd."""
    frames: list[Frame] = []
    end = header_size(raw_length)
    for index, (offset, word, frame_digest) in enumerate(_ENTRY.iter_unpack(table)):
        stored_length, is_zstd, raw = word & ~_ZSTD_BIT, bool(word & _ZSTD_BIT), frame_length(raw_length, index)
        is_sound = 0 < stored_length < raw and kind is CodecKind.ZSTD if is_zstd else stored_length == raw
        if offset != end or not is_sound:
            raise ObjectCorrupt(f"{origin}: entry {index} of the frame table makes no sense")
        end = offset + stored_length
        frames.append(Frame(offset, end, is_zstd, frame_digest))
    return tuple(frames)


class _Contexts(threading.local):
    """Keep zstd contexts per thread: they are not thread safe, and to make one costs more than a small frame."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def _compressor(level: int) -> zstandard.ZstdCompressor:
    """Return this thread's compressor of a level."""
    compressor = _contexts.compressors.get(level)
    if compressor is None:
        # No checksum of zstd's own: BLAKE3 covers the raw bytes. The content size lets a reader bound its memory.
        compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
        _contexts.compressors[level] = compressor
    return compressor


def _compress(compressor: zstandard.ZstdCompressor, frame: memoryview) -> bytes | None:
    """Return the frame compressed, or None where it is better stored raw."""
    if len(frame) > SAMPLE_BYTES:
        # From the middle: the first bytes of a file are often a header unlike the rest.
        start = (len(frame) - SAMPLE_BYTES) // 2
        if len(compressor.compress(frame[start : start + SAMPLE_BYTES])) > SAMPLE_BYTES * WORTH:
            return None
    smaller = compressor.compress(frame)
    return smaller if len(smaller) <= len(frame) * WORTH else None


def _decompress(stored: memoryview, raw_length: int, *, index: int, origin: str) -> bytes:
    """Return a zstd frame decompressed, refusing before any allocation one that would not give `raw_length` bytes."""
    try:
        if zstandard.frame_content_size(stored) != raw_length:
            raise ObjectCorrupt(f"{origin}: frame {index} is not of {raw_length} bytes")
        return _contexts.decompressor.decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ObjectCorrupt(f"{origin}: frame {index} cannot be decompressed ({error})") from error
