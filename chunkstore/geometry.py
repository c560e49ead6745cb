"""The arithmetic of bytes: chunks of a file, blocks of a slice, frames of a block, keys of objects.

Owns the sizes that every part must agree on and the shape of an object's key. Pure: no I/O, no imports beyond `typing`.
All ranges are half-open, `[start, end)`. A file is cut into chunks of 64 MiB; a slice (an immutable run of bytes) is cut
into blocks of `block_bytes` (by the volume's format), the last one shorter; a block is cut into frames of 256 KiB, the last
one shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, NewType

KIB: Final = 1 << 10
MIB: Final = 1 << 20

CHUNK_BYTES: Final = 64 * MIB
FRAME_BYTES: Final = 256 * KIB
MIN_BLOCK_BYTES: Final = 64 * KIB
MAX_BLOCK_BYTES: Final = 16 * MIB
DEFAULT_BLOCK_BYTES: Final = 4 * MIB
# A chunk index is a non-negative signed 32-bit integer, which every store has a column type for: 128 PiB.
MAX_FILE_BYTES: Final = CHUNK_BYTES << 31
# Slices per directory level of the key; a listing of one such prefix is one unit of garbage collection.
SLICES_PER_PREFIX: Final = 1 << 20

SliceId = NewType("SliceId", int)
BlockIndex = NewType("BlockIndex", int)

# What may be handed over as bytes. (collections.abc.Buffer is Python 3.12.)
Buffer = bytes | bytearray | memoryview


class BlockRange(NamedTuple):
    """Name the part `[start, end)` of one block; offsets count from the block's first raw byte."""

    block_index: BlockIndex
    start: int
    end: int


class ObjectId(NamedTuple):
    """Say which block of which slice of which volume an object key stands for."""

    volume_uuid: str
    slice_id: SliceId
    block_index: BlockIndex


def is_block_size(block_bytes: int) -> bool:
    """Return whether a volume may be formatted with this block size: a power of two of 64 KiB to 16 MiB."""
    return MIN_BLOCK_BYTES <= block_bytes <= MAX_BLOCK_BYTES and block_bytes & (block_bytes - 1) == 0


def block_count(length_bytes: int, block_bytes: int) -> int:
    """Return how many blocks a slice of this length has; an empty slice has none."""
    return -(-length_bytes // block_bytes)


def block_length(length_bytes: int, index: int, block_bytes: int) -> int:
    """Return the raw length in bytes of block `index` of a slice; IndexError where the slice has no such block."""
    start = index * block_bytes
    if index < 0 or start >= length_bytes:
        raise IndexError(f"a slice of {length_bytes} bytes in blocks of {block_bytes} has no block {index}")
    return min(block_bytes, length_bytes - start)


def blocks_of_range(start: int, end: int, block_bytes: int) -> Iterator[BlockRange]:
    """Yield, in order, the part of each block that the bytes `[start, end)` of a slice touch; none for an empty range."""
    position = start
    while position < end:
        index, offset = divmod(position, block_bytes)
        step = min(block_bytes - offset, end - position)
        yield BlockRange(BlockIndex(index), offset, offset + step)
        position += step


def frame_count(raw_length: int) -> int:
    """Return how many frames a block (or anything else cut into frames) of this raw length has."""
    return -(-raw_length // FRAME_BYTES)


def frame_length(raw_length: int, index: int) -> int:
    """Return the raw length in bytes of frame `index`; IndexError where there is no such frame."""
    start = index * FRAME_BYTES
    if index < 0 or start >= raw_length:
        raise IndexError(f"{raw_length} bytes have no frame {index}")
    return min(FRAME_BYTES, raw_length - start)


def frames_of_range(start: int, end: int) -> range:
    """Return the indexes of the frames that the bytes `[start, end)` touch; empty for an empty range."""
    return range(start // FRAME_BYTES, -(-end // FRAME_BYTES)) if start < end else range(0)


def block_key(volume_uuid: str, slice_id: SliceId, index: int) -> str:
    """Return the object key of a block, relative to the bucket's prefix.

    `{volume uuid}/{slice id // 2^20:x}/{slice id:x}.{block index}`, the index in decimal.
    """
    return f"{volume_uuid}/{slice_id // SLICES_PER_PREFIX:x}/{slice_id:x}.{index}"


def parse_block_key(key: str) -> ObjectId | None:
    """Return what a key stands for, or None if `block_key` gives this key for nothing."""
    volume_uuid, _, rest = key.partition("/")
    _, _, name = rest.partition("/")
    slice_hex, _, index_text = name.partition(".")
    try:
        slice_id, index = SliceId(int(slice_hex, 16)), BlockIndex(int(index_text))
    except ValueError:
        return None
    # int() takes signs, underscores, spaces and leading zeros; writing the key again refuses them all.
    if not volume_uuid or slice_id < 0 or index < 0 or block_key(volume_uuid, slice_id, index) != key:
        return None
    return ObjectId(volume_uuid, slice_id, index)
