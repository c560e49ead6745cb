"""What an administrator asks of the owner of a volume: the second seam beside MetaClient.

Implemented by metasvc.engine directly, and by client.meta over the wire. Long walks are async iterators that hold
no lock and see a moving volume; what they promise is said at each.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Protocol

from chunkstore.geometry import SliceId
from metasvc.model import (
    Caller,
    DumpPart,
    Garbage,
    Ino,
    Inode,
    MetaStatus,
    Problem,
    Quota,
    Slice,
    SliceRef,
    StatFs,
    Trashed,
    TrashId,
    Usage,
    VolumeFormat,
    WrittenSlice,
)


class MetaAdmin(Protocol):
    """Administration of one volume."""

    async def status(self) -> MetaStatus:
        """Return sessions, usage and counters."""
        ...

    async def resolve(self, path: Sequence[bytes]) -> Inode:
        """Return the inode of a path from the root; symlinks are not followed. ENOENT, ENOTDIR."""
        ...

    async def paths_of(self, ino: Ino, *, limit: int = 16) -> list[bytes]:
        """Return absolute paths of an inode, at most ``limit``; empty if it has no name."""
        ...

    async def usage(self, ino: Ino) -> Usage:
        """Add up a tree, by walking its directories (files are counted in their directory's row)."""
        ...

    async def configure(
        self, *, capacity_bytes: int | None, max_inodes: int | None, trash_days: float | None
    ) -> VolumeFormat:
        """Change limits of the volume; None leaves one alone."""
        ...

    async def quota_set(self, ino: Ino, *, max_bytes: int | None, max_inodes: int | None) -> Quota:
        """Set a directory quota (None keeps a limit, 0 lifts it); what is used is counted first. ENOTDIR."""
        ...

    async def quota_remove(self, ino: Ino) -> None:
        """Remove a directory quota. ENOENT if there is none."""
        ...

    async def quotas(self) -> list[Quota]:
        """Return all directory quotas."""
        ...

    async def trash_list(self, *, after: TrashId | None, limit: int) -> list[Trashed]:
        """Return trash by age, oldest first."""
        ...

    async def trash_restore(self, caller: Caller, trash_id: TrashId) -> bytes:
        """Put a removed name back, with the directories above it that are in the trash too; its path.

        ENOENT (no such id, or its directory is gone for good), EEXIST (the name is taken), EPERM (somebody
        else removed it and the caller is not root).
        """
        ...

    async def trash_expire(self, *, before_ns: int, limit: int) -> int:
        """Remove trash older than a time for good, oldest first; how many entries."""
        ...

    async def clone(self, caller: Caller, source: Ino, parent: Ino, name: bytes) -> Usage:
        """Copy a file or tree without copying bytes. EEXIST, EDQUOT, ENOSPC, EINVAL (into itself).

        The copy appears under its name when it is complete; a crash leaves nothing behind.
        """
        ...

    async def check(self, *, repair: bool) -> AsyncIterator[Problem]:
        """Compare rows with each other: names and inodes, link counts, counters, quotas, slices and references.

        Exact only on a volume that nobody changes meanwhile; the engine holds back changes for the time.
        """
        ...
        yield  # type: ignore[misc]

    def dump(self) -> AsyncGenerator[DumpPart, None]:
        """Yield the bytes of a dump: all rows but those of live clients, as they were after one batch. Nobody is held back.

        It is whole if it ends with a trailer, which metasvc.api.dump_stream.Unpacker tells. Close it (aclosing) if it is not
        read to its end. DumpTooSlow if more changed than memory may take while parts waited to be taken: retryable.
        """
        ...

    # -- for the jobs that touch objects -------------------------------------------------------------

    async def live_slices(self, *, after: SliceId | None, limit: int) -> list[Slice]:
        """Return slices named by some chunk, by id. A slice that lives throughout a walk is in it."""
        ...

    async def slice_owner(self, slice_id: SliceId) -> Sequence[tuple[Ino, SliceRef]]:
        """Find the files that name a slice (a walk over all chunks: for messages of fsck only)."""
        ...

    async def garbage(self, *, before_ns: int, limit: int) -> list[Garbage]:
        """Return slices whose objects may be deleted now."""
        ...

    async def garbage_deleted(self, slice_ids: Sequence[SliceId]) -> None:
        """Forget garbage whose objects are gone."""
        ...

    async def is_live(self, slice_id: SliceId) -> bool:
        """Return whether some chunk names a slice now."""
        ...

    async def is_pending(self, slice_id: SliceId) -> bool:
        """Return whether an id was handed out to a session that may still commit it (gc leaves it alone)."""
        ...

    async def is_garbage(self, slice_id: SliceId) -> bool:
        """Return whether a slice is garbage of which the objects were not deleted yet: its turn comes."""
        ...

    async def compaction_candidates(self, *, limit: int) -> list[tuple[Ino, int]]:
        """Return (inode, chunk index) of chunks whose list of slices has grown long."""
        ...

    async def replace_refs(
        self, ino: Ino, chunk: int, *, expected: Sequence[SliceRef], written: Sequence[WrittenSlice]
    ) -> bool:
        """Put a compacted chunk in place of ``expected`` (offsets in the file) if the map still is that; else False.

        Times and length stay.
        """
        ...

    async def statfs(self, ino: Ino) -> StatFs:
        """As MetaClient.statfs."""
        ...
