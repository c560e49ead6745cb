"""The seam between clients and the owner of a volume: compound metadata operations.

``MetaClient`` is what everything in client/ sees. metasvc.engine implements it in the same process,
client.meta over the wire. One object is one session. All methods are coroutines and may be called
concurrently; an operation that changes something is durable, and visible to every later call of any
session, before its coroutine returns.

Cancellation: a cancelled call may or may not have been applied; nothing is applied in part.

Errors: FsError with the errno POSIX names for the system call of the same name; StoreError, Fenced when
the owner is gone for good. Every method may raise ENOENT or ESTALE for an inode that does not exist;
only further errors are listed. Permission bits and sticky directories are *not* checked here: the kernel does
it for mounts (``default_permissions``, ACLs included); who calls without a kernel has to do it. What the kernel
does not do (setgid inheritance, ACL inheritance, clearing of setuid bits) is done here.

Cost: one round trip each, and one commit for each that changes something, shared with others in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from metasvc.model import (
    Caller,
    Commit,
    DirPage,
    FileMap,
    Ino,
    Inode,
    OpenFile,
    RenameFlags,
    SessionId,
    SetAttr,
    StatFs,
    VolumeFormat,
)

__all__ = ["MetaClient"]


class MetaClient(Protocol):
    """A session of one volume."""

    @property
    def format(self) -> VolumeFormat:
        """The volume's format."""
        ...

    @property
    def session_id(self) -> SessionId:
        """This session."""
        ...

    @property
    def root(self) -> Ino:
        """The directory that the session reaches, with what is below it: the volume's root but for a token of a subtree."""
        ...

    @property
    def is_read_only(self) -> bool:
        """Whether all changes are refused (EROFS), because the token allows none."""
        ...

    # -- names ---------------------------------------------------------------------------------------

    async def lookup(self, parent: Ino, name: bytes) -> Inode:
        """Return the inode of a name; ``.`` and ``..`` work. ENOENT, ENOTDIR, ENAMETOOLONG."""
        ...

    async def resolve(self, start: Ino, path: Sequence[bytes]) -> list[Inode]:
        """Walk several components in one trip; the inode of each. Symlinks are not followed (ENOTDIR if in the middle)."""
        ...

    async def getattr(self, ino: Ino) -> Inode:
        """Return an inode."""
        ...

    async def getattr_many(self, inos: Sequence[Ino]) -> list[Inode | None]:
        """Return many inodes in one trip; None for those that do not exist."""
        ...

    async def readdir(self, ino: Ino, *, after: bytes | None, limit: int) -> DirPage:
        """Return up to ``limit`` entries with names > ``after``, with attributes. ENOTDIR.

        Names that exist from the first page to the last are returned exactly once.
        """
        ...

    async def mknod(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, rdev: int = 0) -> Inode:
        """Create a regular or special file; ``mode`` with type bits. EEXIST, ENOTDIR, ENOSPC, EDQUOT, ENAMETOOLONG.

        The umask applies unless the parent has a default ACL, which is then inherited. The group follows
        the parent if that has setgid.
        """
        ...

    async def mkdir(self, caller: Caller, parent: Ino, name: bytes, *, mode: int) -> Inode:
        """Create a directory. Errors as mknod, and EMLINK."""
        ...

    async def symlink(self, caller: Caller, parent: Ino, name: bytes, target: bytes) -> Inode:
        """Create a symbolic link. Errors as mknod; ENAMETOOLONG for a target over 4095 bytes."""
        ...

    async def readlink(self, ino: Ino) -> bytes:
        """Return the target of a symbolic link. EINVAL."""
        ...

    async def link(self, caller: Caller, ino: Ino, parent: Ino, name: bytes) -> Inode:
        """Make another name. EEXIST, EPERM (directory), EMLINK, EDQUOT."""
        ...

    async def unlink(self, caller: Caller, parent: Ino, name: bytes) -> None:
        """Remove a name. EISDIR, EPERM/EACCES never.

        The last name's inode goes to the trash if the volume has one, is sustained while a session has it
        open, else removed with its content.
        """
        ...

    async def rmdir(self, caller: Caller, parent: Ino, name: bytes) -> None:
        """Remove an empty directory. ENOTDIR, ENOTEMPTY, EINVAL (``.``), ENOTEMPTY (``..``)."""
        ...

    async def rename(
        self, caller: Caller, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, *, flags: RenameFlags
    ) -> None:
        """Rename as renameat2(2). EEXIST, EINVAL (into itself), EISDIR, ENOTDIR, ENOTEMPTY, EXDEV.

        EXDEV: a directory that would move between different directory quotas (copy instead).
        """
        ...

    # -- attributes ----------------------------------------------------------------------------------

    async def setattr(self, caller: Caller, ino: Ino, changes: SetAttr) -> Inode:
        """Change attributes; ``size_bytes`` truncates or extends. EFBIG, EISDIR, EINVAL, EDQUOT, ENOSPC.

        Callers flush what they wrote themselves before a truncate.
        """
        ...

    async def getxattr(self, ino: Ino, name: bytes) -> bytes:
        """Return the value of an attribute. ENODATA."""
        ...

    async def listxattr(self, ino: Ino) -> list[bytes]:
        """Return the names of all attributes."""
        ...

    async def setxattr(self, caller: Caller, ino: Ino, name: bytes, value: bytes, *, flags: int) -> None:
        """Set an attribute; flags as XATTR_CREATE, XATTR_REPLACE. EEXIST, ENODATA, ERANGE, E2BIG, EOPNOTSUPP.

        Setting system.posix_acl_access also sets the permission bits, as ACLs demand.
        """
        ...

    async def removexattr(self, caller: Caller, ino: Ino, name: bytes) -> None:
        """Remove an attribute. ENODATA."""
        ...

    async def statfs(self, ino: Ino) -> StatFs:
        """Return space and inodes of the volume, or of the nearest directory quota at or above an inode."""
        ...

    # -- content -------------------------------------------------------------------------------------

    async def open(self, ino: Ino, *, reading: bool = False) -> OpenFile:
        """Open: while a session has an inode open it is sustained after its last name went.

        ``reading``: nothing is written by this open. Then the answer may come from a lease, and promises no room.
        Returns attributes and map in one trip, with the bytes of inline slices. Each open needs a release.
        """
        ...

    async def create(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, exclusive: bool) -> OpenFile:
        """Create a regular file and open it; without ``exclusive`` an existing regular file is opened.

        EEXIST; without ``exclusive`` EISDIR for a directory, EINVAL for what else is no regular file: a symbolic link for one.
        """
        ...

    async def release(self, ino: Ino) -> None:
        """Undo one open; the last one of a nameless inode removes it. Never fails for an unknown inode.

        May return before that is done: over the wire the owner learns of it with the next request, or 20 ms later.
        """
        ...

    async def read_map(self, ino: Ino, *, start: int, end: int) -> FileMap:
        """Return the chunk map of at least [start, min(end, start + 1 GiB)), both rounded to chunks."""
        ...

    async def read_maps(self, inos: Sequence[Ino]) -> dict[Ino, FileMap]:
        """Return the chunk maps of many small files in one trip, at most ``READ_MAPS_MAX``: of each its first chunk.

        What is no regular file, or no more, is left out, and so is what lies in more than 64 pieces or comes with more
        than 64 KiB of digests and inline bytes.
        """
        ...

    async def allocate_slices(self, count: int) -> range:
        """Reserve slice ids for this session; never handed out again."""
        ...

    async def reserve(self, ino: Ino, *, end: int) -> int:
        """Make sure that the file may grow to ``end``: charge quotas before write(2) returns.

        Returns the end up to which writes may now go without asking again (>= ``end``; more where there is
        plenty). ENOSPC (volume), EDQUOT (a directory quota), EFBIG. What commit does not use is given back at
        release() of the last open.
        """
        ...

    async def commit(self, caller: Caller, ino: Ino, commit: Commit) -> Inode:
        """Make written slices part of a file: map, length, times at once. EDQUOT/ENOSPC only without reserve().

        Returns the inode as it is now, and not the map: whoever committed knows what the map became if
        ``map_version`` grew by exactly one and ``size_epoch`` not at all, and reads it again otherwise.
        ctime becomes the later of what it was and ``mtime_ns``: a flush in the background is no change that shows.

        Slices clipped by a later truncate (size epoch) are dropped where they lie beyond it. Applied once
        per slice id: slices whose id is in the map or was in it are ignored when repeated with the same
        request id.
        """
        ...

    async def punch(self, caller: Caller, ino: Ino, *, start: int, end: int) -> OpenFile:
        """Make a range read as zeros; the length stays."""
        ...

    async def copy_range(
        self, caller: Caller, source: Ino, start: int, target: Ino, target_start: int, length: int
    ) -> tuple[int, OpenFile]:
        """Share slices of one file with another (clone, copy_file_range): bytes copied, and the target.

        Both flushed before by their writers. EINVAL for overlapping ranges of one file; EDQUOT, ENOSPC.
        """
        ...
