"""What can be chosen about a vfs. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from chunkstore.geometry import MIB
from metasvc.model import ROOT_INO, Ino

# A sole session sees every change itself, so that the kernel may keep names and attributes. An hour, not forever: an
# entry that should have been invalidated and was not heals by itself.
SOLE_SESSION_TIMEOUT_S: Final = 3600.0
SHARED_TIMEOUT_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VfsOptions:
    """Hold the settings of one vfs."""

    root: Ino = ROOT_INO
    """The directory at which the volume appears (`--subdir`); nothing above it can be reached by name."""
    entry_timeout_s: float = SHARED_TIMEOUT_S
    """How long the kernel may keep a name."""
    attr_timeout_s: float = SHARED_TIMEOUT_S
    """How long the kernel may keep attributes."""
    negative_timeout_s: float = 0.0
    """How long the kernel may keep the absence of a name."""
    read_only: bool = False
    """Refuse every change with EROFS."""
    flush_age_s: float = 5.0
    """Written data older than this are committed in the background, so that a crash loses little."""
    flush_interval_s: float = 1.0
    """How often the background looks for such data."""
    flush_tasks: int = 8
    """How many files are flushed at once in the background."""
    shutdown_flush_s: float = 600.0
    """How long leaving the vfs waits for written data to become durable before it gives up and says so."""
    slice_max_bytes: int = 1024 * MIB
    """A slice that got this long is committed and the next one begun (a chunk map keeps offsets in 32 bits)."""
    slice_max_refs: int = 2048
    """A slice in this many pieces (random writes) is committed and the next one begun: laying 8,192 pieces over a file that
    has as many keeps the owner's loop busy for 0.2 s."""
    pending_slices: int = 4
    """A write waits (and reports failure) while this many slices of its file wait for commit."""
    slice_ids: int = 256
    """How many slice ids are reserved at once."""
    readahead_max_bytes: int = 32 * MIB
    """Largest window of sequential read-ahead of one handle; 0 turns it off."""
    readdir_page: int = 1000
    """Entries asked for in one trip by readdir."""
    remembered_versions: int = 65_536
    """For how many closed files the map version last seen by the kernel is remembered (page cache kept on open)."""

    @classmethod
    def sole_session(cls, *, root: Ino = ROOT_INO, read_only: bool = False) -> VfsOptions:
        """Return the settings for the only session of a volume (an embedded volume): the kernel caches names long."""
        return cls(
            root=root,
            entry_timeout_s=SOLE_SESSION_TIMEOUT_S,
            attr_timeout_s=SOLE_SESSION_TIMEOUT_S,
            negative_timeout_s=SOLE_SESSION_TIMEOUT_S,
            read_only=read_only,
        )
