"""The values that go in and out of the chunk store: slices, their digests, durability, settings.

Pure values; knows no bucket, no disk and no event loop. `chunkstore.slices` shows them again beside the facade.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, NamedTuple

from chunkstore.block import DIGEST_BYTES, Codec
from chunkstore.geometry import DEFAULT_BLOCK_BYTES, KIB, MIB, SliceId, block_count

# A chunk map keeps offsets in a slice in 32 bits.
MAX_SLICE_BYTES: Final = (1 << 32) - 1


class Place(NamedTuple):
    """Say where a slice is used: its byte 0 would be at an offset of a file, negative where the file has not its beginning."""

    ino: int
    offset: int


class SliceInfo(NamedTuple):
    """Name a sealed slice that has objects, with what verifies every byte of it.

    `digests` are the 16-byte block digests (`chunkstore.block`) in order of the blocks, joined.
    """

    slice_id: SliceId
    length: int
    digests: bytes
    place: Place | None = None
    """By which file it was found. None: its writer has it, or whoever may read all."""

    def digest(self, index: int) -> bytes:
        """Return the committed digest of a block."""
        return self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]


class Sealed(NamedTuple):
    """Say what a slice has become: what close and fsync commit with the metadata.

    Exactly one of the two holds: `inline` has all bytes and `digests` is empty, or `inline` is None and the slice has blocks.
    """

    slice_id: SliceId
    length: int
    inline: bytes | None
    digests: bytes

    @property
    def info(self) -> SliceInfo:
        """Return what reads it; only for a slice that is not inline."""
        return SliceInfo(self.slice_id, self.length, self.digests)


class Durability(Enum):
    """Say where data are when `seal` returns. (PEER: local and on another member; it comes with the cache group.)"""

    OBJECT = "object"
    """In the bucket."""
    LOCAL = "local"
    """On this node's disk, fdatasynced, to be uploaded in the background and after a restart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkStoreConfig:
    """Hold the settings of an open chunk store: those of the volume's format, and those of this node."""

    volume_uuid: str
    cache_dir: Path
    """The directory for all volumes; this volume's images lie in `cache_dir / volume_uuid`."""
    codec: Codec
    block_bytes: int = DEFAULT_BLOCK_BYTES
    inline_limit_bytes: int = 32 * KIB
    """Slices up to this length are handed back by `seal` instead of being stored."""
    durability: Durability = Durability.OBJECT
    cache_limit_bytes: int | None = None
    """Bound on the space of the images; None: 80 % of the file system that holds them."""
    free_ratio_floor: float = 0.10
    """Share of that file system which is always left free."""
    max_uploads: int = 16
    """Blocks being uploaded at once."""
    max_fetches: int = 24
    """Blocks being fetched at once. Prefetches begin none beyond it, and take at most three quarters of `read_memory_bytes`."""
    write_memory_bytes: int = 48 * MIB
    """Bound on written bytes that are held in memory: beyond it `append` waits."""
    read_memory_bytes: int = 40 * MIB
    """Bound on fetched bytes that are held in memory at once."""
    max_open_images: int = 512
    """Bound on open file descriptors of images."""
    scrub_bytes_per_s: int = 8 * MIB
    """How fast the scrub reads images; 0 turns it off."""
    disk_threads: int = 16
    codec_threads: int | None = None
    """None: as many as there are cores, at most 4."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.inline_limit_bytes > self.block_bytes:
            raise ValueError(f"inline limit {self.inline_limit_bytes} is more than a block of {self.block_bytes} bytes")


def has_all_digests(info: SliceInfo, block_bytes: int) -> bool:
    """Return whether a slice info carries one digest for each of its blocks."""
    return len(info.digests) == DIGEST_BYTES * block_count(info.length, block_bytes)
