"""The frames of a slice: how many, where, and which of them a block or a range has. Pure arithmetic.

A frame here is the unit of presence in an image: 256 KiB, or a whole block in volumes whose blocks are smaller. It never
straddles blocks, so frame `i` of a block as `chunkstore.block` counts them is frame `first_frame(block) + i` of the slice.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from chunkstore.geometry import FRAME_BYTES, MIB, block_count, block_length

# A small image is read and verified whole (1 MiB: 0.25 ms of BLAKE3), which spares it a side file: one file instead of two.
SMALL_IMAGE_BYTES: Final = 1 * MIB


def is_small(length: int, block_bytes: int) -> bool:
    """Return whether the image of a slice of this length is a single file without a side file."""
    return length <= SMALL_IMAGE_BYTES and length <= block_bytes


class Layout(NamedTuple):
    """Say how a slice of `length` bytes in blocks of `block_bytes` is cut."""

    length: int
    block_bytes: int

    @property
    def frame_bytes(self) -> int:
        """Return the length of all frames but the last."""
        return min(FRAME_BYTES, self.block_bytes)

    @property
    def frame_count(self) -> int:
        """Return how many frames the slice has."""
        return -(-self.length // self.frame_bytes)

    @property
    def block_count(self) -> int:
        """Return how many blocks the slice has."""
        return block_count(self.length, self.block_bytes)

    def block_length(self, index: int) -> int:
        """Return the raw length of a block."""
        return block_length(self.length, index, self.block_bytes)

    def first_frame(self, block_index: int) -> int:
        """Return the first frame of a block."""
        return block_index * (self.block_bytes // self.frame_bytes)

    def frames_of_block(self, block_index: int) -> range:
        """Return the frames of a block."""
        first = self.first_frame(block_index)
        return range(first, min(self.first_frame(block_index + 1), self.frame_count))

    def frames_of_range(self, start: int, end: int) -> range:
        """Return the frames that the bytes `[start, end)` touch."""
        return range(start // self.frame_bytes, -(-end // self.frame_bytes))

    def frame_range(self, frame: int) -> tuple[int, int]:
        """Return the bytes `[start, end)` of the slice that a frame holds."""
        start = frame * self.frame_bytes
        return start, min(start + self.frame_bytes, self.length)

    def block_of_frame(self, frame: int) -> int:
        """Return the block that a frame belongs to."""
        return frame * self.frame_bytes // self.block_bytes
