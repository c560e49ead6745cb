"""The side file of a big image: the state and the digest of each of its frames. `docs/format.md` has it byte by byte.

Owns version 1 of the format. Plain functions on bytes: no descriptors, no event loop.

    header (64) | one byte of state per frame | 16 bytes of digest per frame

A state is a byte, not a bit, so that frames are marked by writing their own bytes and nothing is read, changed and written.
The order on disk while frames come in: data -> digests -> states, each write begun when the one before has returned. In one
boot the page cache keeps that order even if the process is killed, so PRESENT means present. Over a boot nothing keeps it
(nothing is fsynced), so a side file of another boot turns PRESENT into UNCHECKED when it is opened, states first, then the
header with the new boot id; and UNCHECKED frames are used only after their bytes were compared with their digests, and these
with the block's digest from the chunk map. A torn, stale or made-up side file is therefore a miss, never wrong bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final, NamedTuple
from uuid import UUID

from chunkstore.block import DIGEST_BYTES, digest
from chunkstore.errors import FormatUnsupported
from chunkstore.geometry import SliceId
from chunkstore.images.layout import Layout

MAGIC: Final = b"ATLI"
VERSION: Final = 1

ABSENT: Final = 0
PRESENT: Final = 1
UNCHECKED: Final = 2

# magic, version, flags, slice id, length, block bytes, frame bytes, boot id
_HEAD: Final = Struct("<4sHHQQII16s")
HEADER_BYTES: Final = _HEAD.size + DIGEST_BYTES

_PRESENT_TO_UNCHECKED: Final = bytes((ABSENT, UNCHECKED, UNCHECKED)) + bytes(253)
_KNOWN_STATES: Final = bytes((ABSENT, PRESENT, UNCHECKED)) + bytes(253)


class SideFile(NamedTuple):
    """Hold what a side file says: its states as of now, and whether they must be written back first."""

    states: bytearray
    is_of_this_boot: bool


def states_offset(first_frame: int) -> int:
    """Return where the state of a frame lies."""
    return HEADER_BYTES + first_frame


def digests_offset(layout: Layout, first_frame: int) -> int:
    """Return where the digest of a frame lies."""
    return HEADER_BYTES + layout.frame_count + first_frame * DIGEST_BYTES


def size_bytes(layout: Layout) -> int:
    """Return the length of a side file that has all digests; one without the last ones may be shorter."""
    return digests_offset(layout, layout.frame_count)


def pack_header(slice_id: SliceId, layout: Layout, boot_id: UUID) -> bytes:
    """Return the header, digest of itself included."""
    head = _HEAD.pack(MAGIC, VERSION, 0, slice_id, layout.length, layout.block_bytes, layout.frame_bytes, boot_id.bytes)
    return head + digest(head)


def pack(
    slice_id: SliceId, layout: Layout, boot_id: UUID, *, states: bytes | bytearray, digests: Sequence[bytes]
) -> bytes:
    """Return a whole side file."""
    assert len(states) == len(digests) == layout.frame_count
    return b"".join((pack_header(slice_id, layout, boot_id), states, *digests))


def unpack(data: bytes, slice_id: SliceId, layout: Layout, *, boot_id: UUID) -> SideFile | None:
    """Return what the first `states_offset(frame_count)` bytes of a side file say; None if they are not this slice's.

    FormatUnsupported for a newer version.
    """
    if len(data) < states_offset(layout.frame_count) or data[: len(MAGIC)] != MAGIC:
        return None
    head = data[: _HEAD.size]
    if digest(head) != data[_HEAD.size : HEADER_BYTES]:
        return None
    _, version, flags, its_slice, length, block_bytes, frame_bytes, its_boot = _HEAD.unpack(head)
    if version > VERSION or flags:
        raise FormatUnsupported(f"side file of slice {slice_id}: version {version} was written by a newer version")
    if (its_slice, length, block_bytes, frame_bytes) != (
        slice_id,
        layout.length,
        layout.block_bytes,
        layout.frame_bytes,
    ):
        return None
    states = data[HEADER_BYTES : states_offset(layout.frame_count)]
    is_of_this_boot = its_boot == boot_id.bytes
    return SideFile(
        bytearray(states.translate(_KNOWN_STATES if is_of_this_boot else _PRESENT_TO_UNCHECKED)), is_of_this_boot
    )
