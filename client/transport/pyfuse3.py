"""The FUSE transport over pyfuse3. Signatures; bodies follow.

Import it late: pyfuse3 needs libfuse3 and takes its time. One mount per process, as pyfuse3 has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from client.transport import MountOptions
from client.vfs.vfs import Vfs
from metasvc.model import Ino


class Pyfuse3Transport:
    """Serve a vfs at a mount point through libfuse3. See client.transport.Transport."""

    def __init__(self, vfs: Vfs, options: MountOptions, *, log: Any) -> None:
        """Take the vfs, which is entered before serve() and left after it. Touches nothing yet."""
        raise NotImplementedError

    async def serve(self, *, ready: Callable[[], None]) -> None:
        """Mount and answer requests until unmounted."""
        raise NotImplementedError

    async def stop(self, *, grace_s: float = 5.0) -> None:
        """Unmount."""
        raise NotImplementedError

    def entry(self, parent: Ino, name: bytes) -> None:
        """Forget a name."""
        raise NotImplementedError

    def inode(self, ino: Ino) -> None:
        """Forget attributes and pages."""
        raise NotImplementedError
