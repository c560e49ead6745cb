"""The committed map of one open file, as this client knows it: pages of it, and where each slice's bytes are.

Owns refs, slices and which parts were loaded; changed only by answers of the metadata session and by own commits.
Must not know unflushed data (client.vfs.writing) nor how maps are fetched: callers ask `missing` and feed `add`.

Invariants: `refs` is a layer (client.vfs.overlay) with refs in loaded parts only; every slice named by it is in `sources`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from chunkstore.geometry import CHUNK_BYTES, MAX_FILE_BYTES, SliceId
from chunkstore.model import Place
from chunkstore.slices import SliceInfo
from client.vfs import overlay
from client.vfs.overlay import Layer
from metasvc.model import MAP_PAGE_CHUNKS, FileMap, Ino, Slice, SliceKind, SliceRef, WrittenSlice

PAGE_BYTES: Final = MAP_PAGE_CHUNKS * CHUNK_BYTES
# Slices that nothing names any more are dropped from `sources` when they are more than this and most of it.
_DEAD_SOURCES: Final = 64

Source = bytes | SliceInfo
"""Where the bytes of a slice are: here (inline), or in the chunk store."""


def source_of(row: Slice | WrittenSlice, place: Place) -> Source:
    """Return where the bytes of a slice are, that is used at a place."""
    if row.kind == SliceKind.INLINE:
        return row.data
    return SliceInfo(row.slice_id, row.length, row.data, place)


def places_of(refs: Sequence[SliceRef], ino: Ino) -> dict[SliceId, Place]:
    """Return where slices are used in a file: of those that are used several times, where first."""
    found: dict[SliceId, Place] = {}
    for offset, slice_id, skip, _ in refs:
        if slice_id not in found:
            found[slice_id] = Place(ino, offset - skip)
    return found


class CommittedMap:
    """What is committed of one file, for the parts that were loaded."""

    __slots__ = ("_ino", "_pages", "known_from", "refs", "sources", "version")

    def __init__(self, first: FileMap, ino: Ino) -> None:
        """Begin with the map that open brought."""
        self._ino = ino
        self.refs: Layer = []
        self.sources: dict[SliceId, Source] = {}
        self.version = -1
        self.known_from = MAX_FILE_BYTES
        """From this offset on everything is known; pages below it are known if they are in `_pages`."""
        self._pages: set[int] = set()
        self.add(first)

    def missing(self, start: int, end: int) -> int | None:
        """Return the start of the first page in `[start, end)` that has to be loaded; None if nothing has."""
        if start >= self.known_from:
            return None
        for page in range(start // PAGE_BYTES, -(-min(end, self.known_from) // PAGE_BYTES)):
            if page not in self._pages:
                return page * PAGE_BYTES
        return None

    def add(self, loaded: FileMap) -> bool:
        """Take a part of the map, rounded to pages. A part of a newer version replaces all that was known.

        False for a part that is older than what is known (its answer was overtaken by a commit): ask again.
        """
        if loaded.map_version < self.version:
            return False
        if loaded.map_version > self.version:
            self.reset(loaded.map_version)
        if self.refs or len(loaded.refs) != 1:
            overlay.cut(self.refs, loaded.start, loaded.end)
            # Joined over the borders of chunks, so that a read needs few pieces.
            overlay.overlay_all(self.refs, loaded.refs)
        else:
            self.refs.append(loaded.refs[0])
        places = places_of(loaded.refs, self._ino)
        for slice_id, row in loaded.slices.items():
            self.sources[slice_id] = source_of(row, places.get(slice_id) or Place(self._ino, 0))
        if loaded.end >= MAX_FILE_BYTES:
            self.known_from = min(self.known_from, loaded.start)
        else:
            self._pages.update(range(loaded.start // PAGE_BYTES, loaded.end // PAGE_BYTES))
        return True

    def reset(self, version: int) -> None:
        """Forget everything; it is loaded again, as this version or a newer one, when it is read."""
        self.refs.clear()
        self.sources = {}
        self._pages.clear()
        self.known_from = MAX_FILE_BYTES
        self.version = version

    def forget(self) -> None:
        """Forget everything, so that it is loaded again although nothing says that it changed."""
        self.reset(self.version)

    def apply(self, written: Sequence[WrittenSlice], *, version: int) -> None:
        """Lay own slices over the map, as the commit did that made it this version."""
        for slice_ in written:
            if not slice_.refs:
                continue
            self.sources[slice_.slice_id] = source_of(slice_, places_of(slice_.refs, self._ino)[slice_.slice_id])
            for ref in slice_.refs:
                if self.known_from == 0:
                    overlay.overlay(self.refs, ref)
                else:
                    self._apply_where_known(ref.offset, ref.end, [ref])
        self.version = version
        if len(self.sources) > _DEAD_SOURCES:
            self._drop_dead_sources()

    def _apply_where_known(self, start: int, end: int, refs: Layer) -> None:
        while start < end:
            stop = min(end, (start // PAGE_BYTES + 1) * PAGE_BYTES)
            if self.missing(start, stop) is None:
                overlay.overlay_all(self.refs, overlay.clip(refs, start, stop))
            start = stop

    def cut_from(self, size: int, *, version: int) -> None:
        """Take away what lies at and behind a length, as the truncate did that made it this version."""
        overlay.cut(self.refs, size, MAX_FILE_BYTES)
        self.known_from = min(self.known_from, -(-size // PAGE_BYTES) * PAGE_BYTES)
        self.version = version

    def _drop_dead_sources(self) -> None:
        live = {ref[1] for ref in self.refs}
        if len(self.sources) > 2 * len(live) + _DEAD_SOURCES:
            self.sources = {slice_id: self.sources[slice_id] for slice_id in live}
