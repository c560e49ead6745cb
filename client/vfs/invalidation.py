"""How the vfs tells a kernel about changes that did not come through that kernel. Implemented by the transports."""

from __future__ import annotations

from typing import Protocol

from metasvc.model import Ino


class Invalidations(Protocol):
    """Drop what a kernel keeps. Never blocks the caller and never raises; what the kernel does not know is fine."""

    def entry(self, parent: Ino, name: bytes) -> None:
        """Forget a name (or its absence) and the attributes of its directory."""
        ...

    def inode(self, ino: Ino) -> None:
        """Forget attributes and pages of an inode."""
        ...
