"""The tables of a volume: which rows there are and how they are keyed.

A store knows these and no rule about them. Every key starts with the volume (bound when the store is
opened, hence not in the rows here). A *grouped* table has a two-part key (group, member): all rows of one
group can be loaded together and scanned in order of the member (integers by value, bytes by memcmp).
The columns are documented where the row types are defined: metasvc.model. Values are ``int`` of 64 bits with sign, ``bytes``
of any content, and ``str`` that is Unicode (no lone surrogates, no NUL): what came from os.fsdecode() must be made so first.

================  ==========================  ==========================================================
table             key                         one row for
================  ==========================  ==========================================================
inode             ino                         each inode that has a name, is sustained or is in the trash
dentry            (parent, name)              each name
chunk             (ino, chunk_index)          each 64 MiB window of a file that holds any slice
slice             slice_id                    each slice that some chunk names
xattr             (ino, name)                 each extended attribute, ACLs among them
link              (ino, parent)               each directory of a file that has more than one name
session           session_id                  each client that is, or was, mounted and is not yet cleaned up
sustained         (session_id, ino)           each nameless inode that a session has open
trashed           trash_id                    each removed name in the trash, ids in order of time
garbage           slice_id                    each slice whose objects are to be deleted
slice_range       (session_id, first)         each run of slice ids that a session may commit
replies           session_id                  each session over the wire that changed something
packable          slice_id                    each inline slice that was written and not looked at by the job that packs
pack              slice_id                    each slice that was gathered from small ones
quota             ino                         each directory with a quota
counter           name                        each counter: used_bytes, used_inodes, next_ino …
================  ==========================  ==========================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from metasvc.model import (
    Chunk,
    Counter,
    Dentry,
    Garbage,
    Inode,
    Link,
    Pack,
    Packable,
    Quota,
    Replies,
    Session,
    Slice,
    SliceRange,
    Sustained,
    Trashed,
    Xattr,
)

Key = tuple[Any, ...]
"""The key columns of a row, in order: one or two values."""
Row = tuple[Any, ...]
"""A row is the NamedTuple of its table; drivers may treat it as a plain tuple in order of ``columns``."""


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One table: its row type, and how many leading columns are its key. Compared by identity."""

    name: str
    row: type[Any]
    columns: tuple[str, ...]
    key_columns: tuple[str, ...]
    key_size: int
    grouped: bool

    def key_of(self, row: Row) -> Key:
        """Return the key of a row."""
        return row[: self.key_size]

    def __repr__(self) -> str:
        return f"Table({self.name})"


def _table(name: str, row: Any, key_size: int) -> Table:
    columns: tuple[str, ...] = row._fields
    return Table(name, row, columns, columns[:key_size], key_size, key_size == 2)


INODE: Final = _table("inode", Inode, 1)
DENTRY: Final = _table("dentry", Dentry, 2)
CHUNK: Final = _table("chunk", Chunk, 2)
SLICE: Final = _table("slice", Slice, 1)
XATTR: Final = _table("xattr", Xattr, 2)
LINK: Final = _table("link", Link, 2)
SESSION: Final = _table("session", Session, 1)
SUSTAINED: Final = _table("sustained", Sustained, 2)
TRASHED: Final = _table("trashed", Trashed, 1)
GARBAGE: Final = _table("garbage", Garbage, 1)
QUOTA: Final = _table("quota", Quota, 1)
COUNTER: Final = _table("counter", Counter, 1)

SLICE_RANGE: Final = _table("slice_range", SliceRange, 2)
REPLIES: Final = _table("replies", Replies, 1)
PACKABLE: Final = _table("packable", Packable, 1)
PACK: Final = _table("pack", Pack, 1)

TABLES: Final = (
    INODE,
    DENTRY,
    CHUNK,
    SLICE,
    XATTR,
    LINK,
    SESSION,
    SUSTAINED,
    TRASHED,
    GARBAGE,
    QUOTA,
    COUNTER,
    SLICE_RANGE,
    REPLIES,
    PACKABLE,
    PACK,
)


class Batch(NamedTuple):
    """All changes of one commit: for each table the rows to put (insert or replace) and the keys to delete.

    A key is in at most one of the two. Deleting a key that is absent is no error.
    """

    puts: dict[Table, list[Row]]
    deletes: dict[Table, list[Key]]
