"""The stored block: encode, decode, and verify, whole or frame by frame. `docs/format.md` has it byte by byte.

Owns version 1 of the format and the rule that no byte leaves here unverified. Pure functions on bytes: no I/O, no keys, no
slices. BLAKE3 and zstd release the GIL, so callers run these on a bounded executor, never on an event loop.

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
    view = memoryview(raw)
    return [digest(view[start : start + FRAME_BYTES]) for start in range(0, len(view), FRAME_BYTES)]


def block_digest(digests: Sequence[bytes], raw_length: int) -> bytes:
    """Return the digest of a block from those of its frames: what is committed with its slice."""
    return digest(b"".join(digests) + _RAW_LENGTH.pack(raw_length))


def digest_of(raw: Buffer) -> bytes:
    """Return the block digest of raw bytes: the same that `encode` gives, with any codec."""
    return block_digest(frame_digests(raw), len(memoryview(raw)))


def header_size(raw_length: int) -> int:
    """Return how many bytes header, frame table and header digest take for a block of this raw length."""
    return _HEAD.size + _ENTRY.size * frame_count(raw_length) + DIGEST_BYTES


def encode(raw: Buffer, *, codec: Codec) -> EncodedBlock:
    """Return the object of a block of 1 byte to 16 MiB, and its digest."""


def read_header(
    head: Buffer, *, expected_digest: bytes | None, raw_length: int | None, origin: str = "block"
) -> BlockHeader:
    """Verify and return the header at the start of an object; `head` needs `header_size(raw_length)` bytes, may have more.

    `expected_digest` and `raw_length` come from the chunk map and authenticate the frame table; None (both) only where there
    is no map, as in a scan of a bucket. `origin` names the object in errors. ObjectCorrupt says what differs;
    FormatUnsupported for a newer version or codec.
    """


def decode_frame(header: BlockHeader, index: int, stored: Buffer, *, origin: str = "block") -> bytes | memoryview:
    """Return the raw bytes of frame `index` from its stored bytes; ObjectCorrupt if they are not what was written."""


def decode(payload: Buffer, *, expected_digest: bytes, raw_length: int, origin: str = "block") -> bytes | memoryview:
    """Return the raw bytes of a whole object, every digest verified; errors as `read_header` and `decode_frame`."""
