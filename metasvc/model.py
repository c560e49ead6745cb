"""Values of the name space: ids, inodes, dentries, chunk maps, and what operations take and give.

This module knows no store, no engine and no wire. Everything here is immutable. Values that are also rows
of a store are NamedTuples (a row is written thousands of times a second, and a NamedTuple goes into a
database driver as it is); the rest are frozen dataclasses.

Conventions: sizes in bytes, times in nanoseconds since the epoch, names and xattr names are ``bytes``,
ranges are half-open, ``mode`` is a full ``st_mode`` with its file type bits.
"""

from __future__ import annotations

import enum
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, NewType

from chunkstore.geometry import CHUNK_BYTES, SliceId

Ino = NewType("Ino", int)
SessionId = NewType("SessionId", int)
TrashId = NewType("TrashId", int)

ROOT_INO: Final = Ino(1)
IN_TRASH: Final = Ino(2)
"""Stands as ``parent`` of inodes that lie in the trash; no inode has this number."""
FIRST_INO: Final = Ino(16)
"""Numbers below are reserved."""
NAME_MAX_BYTES: Final = 255
PATH_MAX_BYTES: Final = 4096
SYMLINK_MAX_BYTES: Final = 4095
LINK_MAX: Final = 65_000
XATTR_NAME_MAX_BYTES: Final = 255
XATTR_VALUE_MAX_BYTES: Final = 65_536
SPACE_UNIT_BYTES: Final = 4096
"""Space is charged in units of this: a file of 1 byte uses 4096 of a quota."""


def space_of(size_bytes: int) -> int:
    """Return the space in bytes that a regular file of this length is charged with.

    Space follows the length, holes included, so that a quota can be enforced when a file grows (write,
    fallocate, truncate) and never first at close.
    """
    return -(-size_bytes // SPACE_UNIT_BYTES) * SPACE_UNIT_BYTES


class Inode(NamedTuple):
    """One inode: what stat(2) shows, and what the engine keeps beside it."""

    ino: Ino
    mode: int
    """Full st_mode: file type and permission bits."""
    nlink: int
    """Names of a file; 2 + subdirectories for a directory; 0 = unlinked (open, or in the trash)."""
    uid: int
    gid: int
    rdev: int
    """Device number of a special file, else 0."""
    size_bytes: int
    """Length of a regular file or symlink target; for a directory the number of its entries."""
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    parent: Ino
    """The directory that holds its only name; 0 if it has several (see Link) or none; IN_TRASH. Root: itself."""
    child_bytes: int
    """Directories: space of the regular files named in it (not below), each name counted. Else 0."""
    map_version: int
    """Grows by one with every change of the chunk map, of content or of representation."""
    size_epoch: int
    """Grows by one with every truncate that lowered the length."""

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def space_bytes(self) -> int:
        """What this inode is charged with: see space_of(); 0 for all but regular files."""
        return space_of(self.size_bytes) if stat.S_ISREG(self.mode) else 0


class Dentry(NamedTuple):
    """One name in a directory."""

    parent: Ino
    name: bytes
    ino: Ino
    type: int
    """File type bits (S_IFMT) of the inode, so that readdir needs no inode."""


class SliceRef(NamedTuple):
    """A piece of a chunk map: ``length`` bytes at ``offset`` of the chunk come from a slice.

    Within a chunk refs are sorted by offset and never overlap; bytes in no ref are zeros.
    """

    offset: int
    """Offset in the chunk (chunk map) or in the file (everywhere outside metasvc.engine), in bytes."""
    slice_id: SliceId
    slice_offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


_REF = struct.Struct("<IQII")
REF_BYTES: Final = _REF.size


class Chunk(NamedTuple):
    """The map of one 64 MiB window of a file."""

    ino: Ino
    chunk_index: int
    refs: bytes
    """SliceRefs packed as ``<IQII`` (offset in chunk, slice id, offset in slice, length)."""


def pack_refs(refs: list[SliceRef]) -> bytes:
    """Pack the refs of one chunk, offsets relative to the chunk."""
    return b"".join([_REF.pack(*ref) for ref in refs])


def unpack_refs(packed: bytes) -> list[SliceRef]:
    """Inverse of pack_refs()."""
    return [
        SliceRef(offset, SliceId(slice_id), skip, length) for offset, slice_id, skip, length in _REF.iter_unpack(packed)
    ]


class SliceKind(enum.IntEnum):
    """Where the bytes of a slice lie."""

    INLINE = 0
    """In ``Slice.data`` itself."""
    BLOCKS = 1
    """One object per block; ``Slice.data`` holds the 16-byte digests of the blocks, in order."""


class Slice(NamedTuple):
    """An immutable run of bytes, written once."""

    slice_id: SliceId
    length: int
    refs: int
    """How many SliceRefs of all chunk maps of the volume point at it (0 is never stored)."""
    kind: int
    """A SliceKind."""
    data: bytes
    """The bytes themselves (INLINE) or the block digests (BLOCKS)."""


class Xattr(NamedTuple):
    """One extended attribute. POSIX ACLs are the names system.posix_acl_access and …_default."""

    ino: Ino
    name: bytes
    value: bytes


class Link(NamedTuple):
    """How many names a multiply linked file has in one directory. Rows exist only while nlink > 1."""

    ino: Ino
    parent: Ino
    names: int


class Session(NamedTuple):
    """One mounted client."""

    session_id: SessionId
    host: str
    pid: int
    mountpoint: str
    """Empty for a command that opened the volume itself."""
    started_ns: int
    secret: bytes = b""
    """Whoever knows it may go on with the session from elsewhere; empty for a session in the owner's process."""


class SliceRange(NamedTuple):
    """Slice ids that were handed out to a session: only it may commit them, and only while it lives."""

    session_id: SessionId
    first: int
    id_count: int


class Replies(NamedTuple):
    """What a session over the wire may ask again: the replies that it has not confirmed."""

    session_id: SessionId
    confirmed: int
    """No request below this number will be repeated."""
    packed: bytes
    """Replies to requests from that number on that changed something: metasvc.api.atoll_pb2.FromService, encoded."""


class Sustained(NamedTuple):
    """An inode without names that a session still has open: removed when that session lets go of it."""

    session_id: SessionId
    ino: Ino


class Trashed(NamedTuple):
    """A removed name whose inode is kept until the trash expires or it is restored."""

    trash_id: TrashId
    """Grows with time of deletion: scanning by id is scanning by age."""
    deleted_ns: int
    ino: Ino
    parent: Ino
    """The directory it was removed from; that directory may be in the trash itself."""
    name: bytes
    uid: int
    """Who removed it, and may restore it."""


class Garbage(NamedTuple):
    """A slice that no chunk map names any more; its objects are deleted after ``not_before_ns``."""

    slice_id: SliceId
    length: int
    not_before_ns: int


class Packable(NamedTuple):
    """An inline slice that may be gathered into a pack, with the chunk that named it first: a hint, it may name it no more."""

    slice_id: SliceId
    ino: Ino
    chunk_index: int
    written_ns: int


class Pack(NamedTuple):
    """A slice that was gathered from small ones, and whom to ask for what is left of it."""

    slice_id: SliceId
    refs: int
    """How many refs it was made for; its Slice says how many there are now."""
    members: bytes
    """The chunks that they were in: pack_members()."""


_MEMBER = struct.Struct("<QI")


def pack_members(members: Iterable[tuple[Ino, int]]) -> bytes:
    """Return (inode, chunk index) pairs as they are stored: 12 bytes each, little-endian."""
    return b"".join(_MEMBER.pack(ino, index) for ino, index in members)


def unpack_members(packed: bytes) -> list[tuple[Ino, int]]:
    """Return what was stored by pack_members()."""
    return [(Ino(ino), index) for ino, index in _MEMBER.iter_unpack(packed)]


class Quota(NamedTuple):
    """Limits of one directory tree and what it uses now. 0 = unlimited."""

    ino: Ino
    max_bytes: int
    max_inodes: int
    used_bytes: int
    used_inodes: int
    """Inodes below the directory, itself not counted."""


class Counter(NamedTuple):
    """A number of the volume that is exact because there is one writer."""

    name: str
    value: int


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the credentials of a request and its identity for applying it once.

    ``request_id`` is numbered per session from 1; a repeated id is the same request again.
    """

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    """Supplementary groups where known; the transport may leave them out."""
    umask: int = 0
    request_id: int = 0
    """0 for requests that change nothing."""


class Entry(NamedTuple):
    """A name with the inode behind it."""

    name: bytes
    inode: Inode


@dataclass(frozen=True, slots=True)
class DirPage:
    """Some entries of a directory in order of their names, ``.`` and ``..`` not among them."""

    entries: list[Entry]
    end: bool
    """True if nothing follows the last entry."""


class FileMap(NamedTuple):
    """The chunk map of a range of a file, with the slices it names.

    ``refs`` have offsets in the file, are sorted and do not overlap. What no ref covers is a hole.
    """

    map_version: int
    refs: list[SliceRef]
    slices: dict[SliceId, Slice]
    start: int
    """The map is complete for offsets in [start, end)."""
    end: int


class OpenFile(NamedTuple):
    """Answer of open and create: all that the first read needs, in one trip."""

    inode: Inode
    map: FileMap
    """Covers the beginning of the file: all of it if it has at most MAP_PAGE_CHUNKS chunks."""
    promised_end: int = 0
    """Up to where it may grow without asking for room first: all files may where there is no limit."""
    is_new: bool = False
    """Made by this operation, so it has no xattrs but those of a default ACL."""


MAP_PAGE_CHUNKS: Final = 16
"""open() and read_map() answer up to this many chunks (1 GiB) of a map at once."""
PACK_BYTES: Final = 4 * 1024 * 1024
"""The most that a pack holds: bytes of many small files in one slice."""
READ_MAPS_MAX: Final = 256
"""So many maps are read at once: 17 MB if each has 64 pieces and 64 KiB of digests and inline bytes."""


@dataclass(frozen=True, slots=True)
class SetAttr:
    """What setattr changes; None = unchanged. Times in ns; ``*_now`` take the engine's clock."""

    mode: int | None = None
    """Permission bits only (07777)."""
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    atime_now: bool = False
    mtime_now: bool = False


@dataclass(frozen=True, slots=True)
class WrittenSlice:
    """A new slice that a session has written, with the file ranges that it covers."""

    slice_id: SliceId
    length: int
    kind: SliceKind
    data: bytes
    refs: tuple[SliceRef, ...]
    """``offset`` is in the file; later refs overlay earlier ones; all name this slice."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What close and fsync make durable, at once."""

    slices: tuple[WrittenSlice, ...]
    """In the order written: later ones overlay earlier ones."""
    end: int
    """End of own writes in bytes: the length becomes at least this (0 = do not touch)."""
    size_epoch: int
    """The size epoch that the session had seen when it wrote: see Inode.size_epoch."""
    mtime_ns: int | None = None
    """Time of the last write; None leaves the times alone."""
    append: bool = False
    """O_APPEND: refs are relative to 0 and are placed at the end of file by the owner."""


class RenameFlags(enum.IntFlag):
    """Flags of renameat2(2)."""

    NONE = 0
    NOREPLACE = 1
    EXCHANGE = 2


@dataclass(frozen=True, slots=True)
class StatFs:
    """Space and inodes as statfs(2) shows them: of the volume, or of the quota of a subtree."""

    total_bytes: int
    used_bytes: int
    total_inodes: int
    used_inodes: int


@dataclass(frozen=True, slots=True)
class VolumeFormat:
    """What was chosen when the volume was formatted. Stored as JSON with its own version."""

    uuid: str
    tenant: str
    name: str
    bucket_url: str
    """Design section 7; relative ``file:objects`` for the default bucket of an embedded volume."""
    block_bytes: int
    compression: str
    """``none`` or ``zstd:N``."""
    inline_limit_bytes: int
    capacity_bytes: int
    """0 = unlimited."""
    max_inodes: int
    """0 = unlimited."""
    trash_days: float
    """0 = removed at once."""
    created_ns: int
    version: int = 1
    loading: bool = False
    """Being filled from a dump, or left by a load that did not come to its end: nobody opens it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding of fsck."""

    code: str
    """Stable, kebab-case: for example ``dentry-without-inode``."""
    ino: Ino
    text: str
    repairable: bool = False


@dataclass(frozen=True, slots=True)
class DumpPart:
    """Some bytes of a dump, in order, and what they are: for progress."""

    data: bytes
    rows: int = 0
    """Rows and keys in them."""
    table: str = ""
    """Which table is being read."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a directory tree or a file holds."""

    files: int = 0
    directories: int = 0
    size_bytes: int = 0
    """Sum of lengths."""
    space_bytes: int = 0
    """Sum of what quotas are charged with."""


class TenantUse(NamedTuple):
    """What all volumes of a tenant hold together, by what their owners said last, and what they may hold."""

    used_bytes: int
    used_inodes: int
    max_bytes: int
    """0: no limit."""
    max_inodes: int
    """0: no limit."""


@dataclass(frozen=True, slots=True)
class MetaStatus:
    """What the owner of a volume says of itself."""

    format: VolumeFormat
    epoch: int
    """Grows with each change of the owner."""
    owner: str
    """Where the owner is reached, atoll://HOST:PORT of a service; else what it is."""
    sessions: list[Session]
    statfs: StatFs
    trash_bytes: int
    trash_inodes: int
    garbage_slices: int
    counters: dict[str, int] = field(default_factory=dict)
    """Operations, batches and the like, for metrics: monotonic."""
    tenant: TenantUse | None = None
    """Of a service's volume, for administrators."""


def chunk_index(offset: int) -> int:
    """Return the index of the chunk that holds a file offset."""
    return offset // CHUNK_BYTES
