"""The seam between the vfs and a kernel: what a FUSE transport is. Two exist: pyfuse3 (portable), and later the kernel's own.

Must not know POSIX: handlers are a few lines over `client.vfs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from client.vfs.invalidation import Invalidations


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """Say where and how a volume appears in the file system."""

    mountpoint: Path
    """Absolute; an existing directory."""
    fsname: str
    """What mount(8) shows as the source: the volume's address."""
    allow_other: bool = True
    """Let other users in (needs root, or user_allow_other in /etc/fuse.conf)."""
    read_only: bool = False
    read_ahead_kb: int = 1024
    """The kernel's read-ahead for the mount, where we may set it: READs become this large."""
    max_background: int = 64
    """How many asynchronous requests (read-ahead) the kernel keeps in flight, where we may set it."""
    debug: bool = False
    """Let the FUSE library print every request."""


class Transport(Invalidations, Protocol):
    """One mount. `serve` runs once; everything is called on the event loop."""

    async def serve(self, *, ready: Callable[[], None]) -> None:
        """Mount, call `ready` when the kernel was answered first, answer requests until the mount is gone.

        Returns after umount(8), after stop(), and after an abort of the connection; the mount point is free then.
        OSError with a one-line message if it cannot be mounted. The caller flushes (leaves the vfs) afterwards.
        """
        ...

    async def stop(self, *, grace_s: float = 5.0) -> None:
        """Unmount: detach at once, let open files finish for `grace_s`, then cut them off. serve() returns soon after."""
        ...
