"""Extended attributes that the vfs answers itself: `user.atoll.*`. They do not appear in listxattr and cannot be set.

Owns their names and what their values look like. `durability` is one word, the weakest state of any byte of the file:

    dirty    written here and not committed yet: lost in a crash of this node
    local    committed; some of it lies on this node only, waiting for upload
    object   committed; in the bucket
    inline   committed; small enough to be kept with the metadata (an empty file too)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from chunkstore.geometry import SliceId
from client.vfs.committed import CommittedMap
from metasvc.model import Ino

CAPABILITY: Final = b"security.capability"
"""What Linux asks for before it lets somebody write: not ours, but asked for so often that its absence is kept."""
PREFIX: Final = b"user.atoll."
DURABILITY: Final = b"user.atoll.durability"
INODE: Final = b"user.atoll.inode"
SLICES: Final = b"user.atoll.slices"
NAMES: Final = (DURABILITY, INODE, SLICES)


def durability(committed: CommittedMap, *, is_dirty: bool, is_staged: Callable[[SliceId], bool]) -> bytes:
    """Return the state of a file whose map is wholly loaded."""
    if is_dirty:
        return b"dirty"
    blocks = {ref.slice_id for ref in committed.refs if not isinstance(committed.sources[ref.slice_id], bytes)}
    if not blocks:
        return b"inline"
    return b"local" if any(is_staged(slice_id) for slice_id in blocks) else b"object"


def value(
    name: bytes, ino: Ino, committed: CommittedMap, *, is_dirty: bool, is_staged: Callable[[SliceId], bool]
) -> bytes | None:
    """Return the value of a virtual attribute of a file whose map is wholly loaded; None if there is no such name."""
    if name == INODE:
        return b"%d" % ino
    if name == SLICES:
        return b"%d" % len({ref.slice_id for ref in committed.refs})
    if name == DURABILITY:
        return durability(committed, is_dirty=is_dirty, is_staged=is_staged)
    return None
