"""The virtual files under `.atoll/` at the root: what they are called, and where their content comes from.

Owns names and inode numbers. Must not know what is in them: content is a callable that the composition root injects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VirtualFile:
    """Describe one read-only virtual file: `read` is called once per open and must not block."""

    name: bytes
    read: Callable[[], bytes]
    mode: int = 0o444
