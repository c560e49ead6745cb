"""One coroutine per system call, on inode numbers and handles. Signatures; bodies follow."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from chunkstore.slices import ChunkStore
from client.vfs.clock import Clock
from client.vfs.invalidation import Invalidations
from client.vfs.options import VfsOptions
from client.vfs.virtual import VirtualFile
from metasvc.api import MetaClient
from metasvc.model import Caller, Ino


class Vfs:
    """Answer system calls on one volume. One event loop; enter it (`async with`) before the first call.

    Composition: open `meta` and `chunks` before and close them after. Leaving flushes what was written, for at most
    `options.shutdown_flush_s`.
    """

    def __init__(
        self,
        meta: MetaClient,
        chunks: ChunkStore,
        *,
        log: Any,
        options: VfsOptions | None = None,
        clock: Clock | None = None,
        virtual_files: Sequence[VirtualFile] = (),
    ) -> None:
        """Take what it stands on. `log` is a structlog logger bound to the volume. `.atoll/accesslog` is always there."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        """Start the background work."""
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Flush, then stop the background work. Data that could not be made durable are logged, file by file."""
        raise NotImplementedError

    async def flush_all(self, *, timeout_s: float) -> list[Ino]:
        """Make all written data durable; return the inodes of those that failed or were not done in time."""
        raise NotImplementedError

    def attach(self, invalidations: Invalidations) -> None:
        """Take the transport that is told about changes from elsewhere."""
        raise NotImplementedError

    def entry_changed(self, parent: Ino, name: bytes) -> None:
        """Say that a name was added, replaced or removed past the vfs (trash restore, clone)."""
        raise NotImplementedError

    def inode_changed(self, ino: Ino) -> None:
        """Say that attributes or content of an inode were changed past the vfs."""
        raise NotImplementedError

    def caller(self, uid: int, gid: int, *, umask: int = 0) -> Caller:
        """Return the credentials for one call that changes something, with the next request id of this session."""
        raise NotImplementedError

    def metrics_text(self) -> str:
        """Return the counters of requests and of the vfs as Prometheus text."""
        raise NotImplementedError
