"""Reading one file: from pending slices, inline bytes and the chunk store, and what to fetch ahead.

Owns nothing that lasts but the read-ahead state of a handle. Must not know handles, names or the kernel.

A read that needs no waiting (inline bytes, a slice being written, an image whose bytes are in memory) is answered by
`try_read` without a task switch; `read` does the rest. A read sees each byte as some write left it; a read beside a write
may see part of it, as POSIX allows.
"""

from __future__ import annotations

from typing import Final

from chunkstore.errors import AtollError, ObjectMissing
from chunkstore.geometry import KIB, MIB, Buffer
from chunkstore.slices import ChunkStore
from client.vfs import overlay
from client.vfs.committed import PAGE_BYTES, Source
from client.vfs.overlay import Piece
from client.vfs.writing import PendingSlice, Writing
from metasvc.api import MetaClient

# A map is read again this often while commits overtake the answers. Each try needs another commit in between.
_MAP_TRIES: Final = 16


class FileReader:
    """Read files of one volume."""

    def __init__(self, meta: MetaClient, chunks: ChunkStore) -> None:
        """Take what files are read from."""
        self._meta = meta
        self._chunks = chunks

    def try_read(self, file: Writing, start: int, end: int) -> Buffer | None:
        """Return the bytes `[start, end)`, cut at the length, if they are one piece that needs no waiting; else None."""
        if end > file.size:
            end = file.size
        if start >= end:
            return b""
        committed = file.committed
        if file.pending or committed.known_from:
            return None
        refs = committed.refs
        index = overlay.first_behind(refs, start)
        if index == len(refs):
            return bytes(end - start)
        offset, slice_id, skip, length = refs[index]
        if offset > start or offset + length < end:
            return bytes(end - start) if offset >= end else None
        skip += start - offset
        source = committed.sources[slice_id]
        if type(source) is bytes:
            return source[skip : skip + end - start]
        return self._chunks.try_read(source, skip, skip + end - start)  # type: ignore[arg-type]

    async def read(self, file: Writing, start: int, end: int) -> Buffer:
        """Return the bytes `[start, end)`, cut at the length. Holes are zeros.

        ObjectMissing, ObjectCorrupt, BucketUnavailable, BucketDenied. A missing object is looked for once more in a fresh
        map: a compaction may have put another slice in its place.
        """
        try:
            return await self._read(file, start, end)
        except ObjectMissing:
            await self.load(file, start, min(end, file.size), fresh=True)
            return await self._read(file, start, end)

    async def _read(self, file: Writing, start: int, end: int) -> Buffer:
        while True:
            end = min(end, file.size)
            if start >= end:
                return b""
            await self.load(file, start, end)
            pieces = overlay.pieces(file.layers(), start, end)
            sources = [self._source(file, piece) for piece in pieces]
            parts = [self._try_piece(source, piece) for source, piece in zip(sources, pieces, strict=True)]
            if None in parts and not await self._fetch(file, pieces, sources, parts):
                continue
            found = [part for part in parts if part is not None]
            return found[0] if len(found) == 1 else b"".join(found)

    def _source(self, file: Writing, piece: Piece) -> PendingSlice | Source | None:
        if piece.slice_id is None:
            return None
        pending = file.sources.get(piece.slice_id)
        return pending if pending is not None else file.committed.sources[piece.slice_id]

    def _try_piece(self, source: PendingSlice | Source | None, piece: Piece) -> Buffer | None:
        length = piece.end - piece.start
        first = piece.slice_offset
        if source is None:
            return bytes(length)
        if isinstance(source, bytes):
            return source[first : first + length]
        if isinstance(source, PendingSlice):
            return source.writer.try_read(first, first + length)
        return self._chunks.try_read(source, first, first + length)

    async def _fetch(
        self,
        file: Writing,
        pieces: list[Piece],
        sources: list[PendingSlice | Source | None],
        parts: list[Buffer | None],
    ) -> bool:
        """Put in the parts that need waiting. False if a slice was given up meanwhile (a truncate): cut pieces again."""
        missing = [index for index, part in enumerate(parts) if part is None]
        # Views of a slice that is being written change with it: copied before the first await.
        parts[:] = [part if part is None or isinstance(part, bytes) else bytes(part) for part in parts]
        for index in missing[1:]:
            # They are fetched side by side although they are awaited one after the other.
            source, piece = sources[index], pieces[index]
            if source is not None and not isinstance(source, bytes | PendingSlice):
                self._chunks.prefetch(source, piece.slice_offset, piece.slice_offset + piece.end - piece.start)
        for index in missing:
            source, piece = sources[index], pieces[index]
            first, past = piece.slice_offset, piece.slice_offset + piece.end - piece.start
            if isinstance(source, PendingSlice):
                data: Buffer = b""
                try:
                    data = await source.writer.read(first, past)
                except Exception:
                    if piece.slice_id in file.sources:
                        raise
                if len(data) < past - first:
                    return False
                parts[index] = data
            else:
                assert source is not None
                assert not isinstance(source, bytes)
                parts[index] = await self._chunks.read(source, first, past)
        return True

    async def load(self, file: Writing, start: int, end: int, *, fresh: bool = False) -> None:
        """See to it that the map of `[start, end)` is known. One trip for each GiB that is not."""
        committed = file.committed
        if fresh:
            committed.forget()
        overtaken = 0
        while (page := committed.missing(start, end)) is not None:
            if overtaken == _MAP_TRIES:
                raise AtollError(f"the map of inode {file.inode.ino} changes faster than it can be read; try again")
            loaded = await self._meta.read_map(file.inode.ino, start=page, end=page + PAGE_BYTES)
            overtaken += not committed.add(loaded)

    async def next_data(self, file: Writing, position: int) -> int | None:
        """Return the first offset at or behind a position that holds data (not a hole); None if there is none."""
        while position < file.size:
            stop = min(file.size, (position // PAGE_BYTES + 1) * PAGE_BYTES)
            await self.load(file, position, stop)
            found = overlay.next_data(file.layers(), position)
            if found is not None and found < stop:
                return found
            position = stop
        return None

    async def next_hole(self, file: Writing, position: int) -> int:
        """Return the first offset at or behind a position that is in a hole; the end of the file is one."""
        while position < file.size:
            stop = min(file.size, (position // PAGE_BYTES + 1) * PAGE_BYTES)
            await self.load(file, position, stop)
            found = overlay.next_hole(file.layers(), position)
            if found < stop:
                return found
            position = stop
        return file.size

    def prefetch(self, file: Writing, start: int, end: int) -> int:
        """Start fetching what is committed in a range, where the map is known. Never waits, never raises.

        Return the offset up to which it came; short of `end` it is to be asked again, when memory is free.
        """
        committed = file.committed
        if committed.missing(start, end) is not None:
            return end
        for piece in overlay.pieces([committed.refs], start, end):
            if piece.slice_id is not None:
                source = committed.sources[piece.slice_id]
                if not isinstance(source, bytes):
                    past = piece.slice_offset + piece.end - piece.start
                    reached = self._chunks.prefetch(source, piece.slice_offset, past)
                    if reached < past:
                        return piece.start + reached - piece.slice_offset
        return end


class ReadAhead:
    """Decide for one handle what to fetch ahead. Pure: offsets in, a range out.

    Sequential reading doubles the window up to its maximum; a jump closes it. The kernel sends its own read-ahead as
    several requests at once, which arrive in any order: near the frontier counts as sequential.
    """

    __slots__ = ("_ahead", "_frontier", "_max", "_window")

    FIRST_BYTES: Final = 512 * KIB
    SLACK_BYTES: Final = 4 * MIB

    def __init__(self, max_bytes: int) -> None:
        """Begin as if reading had stopped at offset 0; a file read from its beginning is sequential at once."""
        self._max = max_bytes
        self._window = 0
        self._frontier = 0
        self._ahead = 0

    def advise(self, start: int, end: int, size: int) -> tuple[int, int] | None:
        """Note a read of `[start, end)` of a file of this length; return what to fetch ahead now, if anything."""
        if not self._max:
            return None
        frontier = self._frontier
        if start > frontier + self.SLACK_BYTES or start < frontier - self.SLACK_BYTES:
            self._window = 0
            self._frontier = self._ahead = end
            return None
        if end <= frontier:
            return None
        self._frontier = end
        self._window = min(self._max, max(self._window * 2, self.FIRST_BYTES))
        first = max(self._ahead, end)
        past = min(size, end + self._window)
        # In steps of half a window: one call of prefetch for many reads.
        if past - first <= 0 or (first - end > self._window // 2 and past < size):
            return None
        self._ahead = past
        return first, past

    def stopped(self, reached: int) -> None:
        """Note that what was advised was begun only up to an offset: the rest is advised again."""
        self._ahead = min(self._ahead, reached)
