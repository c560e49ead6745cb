"""Which slices of a volume live, as a table that is small enough for a mount's memory.

Owns the table of one *group*: the 2^20 consecutive slice ids whose objects share one prefix of the bucket. 4 MiB, whatever is
in it. Objects come from a listing in the order of their names, which is not the order of slice ids, so comparing needs random
access to a whole group.
"""

from __future__ import annotations

from array import array
from typing import Final

from chunkstore.block import header_size
from chunkstore.geometry import SLICES_PER_PREFIX, ObjectId, SliceId, block_count, block_length
from metasvc.api.admin import MetaAdmin
from metasvc.model import Slice, SliceKind

PAGE: Final = 5000


class LiveGroup:
    """The lengths of the live slices of one group that have objects."""

    def __init__(self, number: int, block_bytes: int) -> None:
        """Begin with none. ``number`` is slice id // 2^20."""
        self.number = number
        self.count = 0
        self._block_bytes = block_bytes
        # A slice has less than 4 GiB (chunkstore.model.MAX_SLICE_BYTES); 0: not live, or inline.
        self._lengths = array("I", bytes(4 * SLICES_PER_PREFIX))

    @classmethod
    async def load(cls, admin: MetaAdmin, number: int, block_bytes: int) -> LiveGroup:
        """Read the group from the owner: a scan of its slices, 5,000 to a trip."""
        group = cls(number, block_bytes)
        after = SliceId(number * SLICES_PER_PREFIX - 1)
        while page := await admin.live_slices(after=after, limit=PAGE):
            for row in page:
                if row.slice_id // SLICES_PER_PREFIX != number:
                    return group
                group.add(row)
            after = page[-1].slice_id
        return group

    def add(self, row: Slice) -> None:
        """Note one slice of the group."""
        if row.kind == SliceKind.BLOCKS:
            self._lengths[row.slice_id % SLICES_PER_PREFIX] = row.length
            self.count += 1

    def length(self, slice_id: SliceId) -> int:
        """Return the length in bytes of a slice of the group; 0 if it is not live or has no objects."""
        return self._lengths[slice_id % SLICES_PER_PREFIX]

    def names(self, found: ObjectId) -> bool:
        """Return whether a live slice has this block."""
        return found.block_index < block_count(self.length(found.slice_id), self._block_bytes)

    def has_plausible_size(self, found: ObjectId, size_bytes: int) -> bool:
        """Return whether an object of a block that is named has a size that such a block can have."""
        raw = block_length(self.length(found.slice_id), found.block_index, self._block_bytes)
        return header_size(raw) < size_bytes <= header_size(raw) + raw


def has_block(row: Slice, block_index: int, block_bytes: int) -> bool:
    """Return whether a slice has an object of this index."""
    return row.kind == SliceKind.BLOCKS and block_index < block_count(row.length, block_bytes)


async def live_slice(admin: MetaAdmin, slice_id: SliceId) -> Slice | None:
    """Return a slice if it is live now. One trip."""
    page = await admin.live_slices(after=SliceId(slice_id - 1), limit=1)
    return page[0] if page and page[0].slice_id == slice_id else None
