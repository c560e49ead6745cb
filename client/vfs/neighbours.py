"""Fetching small files before they are read: who reads a few of a directory with nothing cached goes on with others of it.

Owns which files of which directories are fetched ahead, what of that nobody has read yet, and how much that may be. Must not
know handles, the kernel, or where bytes lie.

A small file costs one request to the bucket, and a program that reads one after the other waits for each: 1.3 ms from a server
on the same two CPUs, 20 to 50 from S3. Eight at once take 0.6 ms each there, and an eighth of the waiting elsewhere.

Files that were written as inline slices lie in packs, many to a block: there the whole pack is fetched, as soon as a map
that was read ahead names it. Three requests (two in pieces, then the rest) and 60 ms for each 1,024 files of 4 KiB become
one that nobody waits for.

Rules. Only reads that wait for the bucket count. After `IN_A_ROW` of them in a directory, with no more than `PAUSE_S` between,
the files behind the last of them (in order of names, then from the first on) are fetched, `AT_ONCE` at a time; one is enough
while what was fetched ahead is being read. What was fetched and not read is at most a budget, at first `START_BYTES`: every
byte that is read adds one, and whatever lies unread for `PATIENCE_S` halves it. So reading at random in more than a cache holds
wastes a little, and reading a tree or a directory, in any order, waits for few of its files.

Who comes from a directory to the one behind it goes on so: when all of a directory was asked for and the budget has room, it is
the turn of those behind it. So names, maps and packs of a directory are there before its first file is opened: a directory of
500 files cost 10 ms in which nothing was read.

Interleavings. Everything here is a hint: slices never change, and whoever opens a file reads its map anew; a file that was
removed or written meanwhile costs a request in vain. One task (`_work`) fetches; reads only note what they want, and start it
if it rests. `_unread` has a slice from the start of its fetch until it is read or given up.
"""

from __future__ import annotations

import asyncio
import logging
import math
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, NamedTuple

from chunkstore.background import TaskSet
from chunkstore.errors import AtollError
from chunkstore.geometry import KIB, MIB, SliceId
from chunkstore.model import Place
from chunkstore.slices import ChunkStore, SliceInfo
from client.vfs.clock import Clock
from client.vfs.committed import places_of, source_of
from client.vfs.metrics import VfsMetrics
from client.vfs.writing import Writing
from metasvc.api import MetaClient
from metasvc.model import PACK_BYTES, READ_MAPS_MAX, FileMap, Ino

LARGEST_BYTES: Final = 1024 * KIB
"""Files up to this length are small: their blocks are fetched whole."""
IN_A_ROW: Final = 2
AT_ONCE: Final = 8
START_BYTES: Final = 16 * MIB
LEAST_BYTES: Final = 1 * MIB
MOST_BYTES: Final = 64 * MIB
CACHE_SHARE: Final = 8
"""At most one part in so many of the cache is fetched ahead."""
PAUSE_S: Final = 2.0
PATIENCE_S: Final = 30.0
LISTED_S: Final = 120.0
"""A directory is listed anew after so long: files may have come, or their bytes been evicted."""
_PAGE_ENTRIES: Final = 1000
_NAMES_MAX: Final = 50_000
"""So far a directory is listed to find what comes behind a file: 0.3 s of the owner's time."""
_MAPS_AT_ONCE: Final = 32
_DIRECTORIES_KEPT: Final = 16
_DIRECTORIES_AHEAD: Final = 4
_FILES_OF_NEXT: Final = 1024
"""So many files at most are asked for of a directory that nobody reads yet."""
_PAGES_ABOVE: Final = 5
_PACKS_KEPT: Final = 256
"""1 GiB of packs: what was evicted meanwhile is fetched again by who reads it."""

log = logging.getLogger(__name__)


class _Unread(NamedTuple):
    """A slice that was fetched ahead, or is being."""

    size_bytes: int
    since_s: float


class _Directory:
    """The small files of a directory as far as it was listed, and which of them were asked for."""

    __slots__ = ("above", "after", "asked", "inos", "is_listed", "last_s", "left", "listed_s", "misses", "sizes")

    def __init__(self) -> None:
        self.misses = 0
        """Reads that waited for the bucket, without a pause between."""
        self.last_s = -math.inf
        self.start_over(-math.inf)

    def start_over(self, now_s: float) -> None:
        """Forget what was listed."""
        self.inos: array[int] = array("Q")
        self.sizes: array[int] = array("I")
        self.asked = bytearray()
        self.left = 0
        """How many of them were not asked for."""
        self.after: bytes | None = None
        self.above: Ino | None = None
        """The directory that it is in, once somebody wanted to know."""
        self.is_listed = False
        self.listed_s = now_s

    @property
    def asked_count(self) -> int:
        """How many files were asked for."""
        return len(self.asked) - self.left

    def has_more(self, now_s: float) -> bool:
        """Return whether there is something left to fetch, as far as is known."""
        return bool(self.left) or not self.is_listed or now_s - self.listed_s > LISTED_S

    def position(self, ino: Ino) -> int | None:
        """Return where a file is among those listed. 10 ns for each of them."""
        try:
            return self.inos.index(ino)
        except ValueError:
            return None

    def take(self, start: int, room_bytes: int, *, short_bytes: int) -> list[Ino]:
        """Return some files from a position on, round once, that were not asked for and fit; they are asked for now.

        More of them if none is longer than ``short_bytes``.
        """
        found: list[Ino] = []
        most = READ_MAPS_MAX
        count = len(self.inos) if self.left else 0
        for step in range(count):
            index = (start + step) % count
            if self.asked[index]:
                continue
            room_bytes -= self.sizes[index]
            if self.sizes[index] > short_bytes:
                most = _MAPS_AT_ONCE
            if room_bytes < 0 or len(found) >= most:
                break
            self.asked[index] = 1
            self.left -= 1
            found.append(Ino(self.inos[index]))
        return found


class _Beside:
    """The directories of a directory, in order."""

    def __init__(self, above: Ino | None, inos: list[Ino], listed_s: float) -> None:
        self.above = above
        self.listed_s = listed_s
        self._inos = inos
        self._positions = {ino: position for position, ino in enumerate(inos)}

    def behind(self, before: Ino, now: Ino) -> list[Ino]:
        """Return the directories that come next to who went from one to another: none, unless that is the one behind it."""
        position = self._positions.get(now, 0)
        if not position or self._inos[position - 1] != before:
            return []
        return self._inos[position + 1 : position + 1 + _DIRECTORIES_AHEAD]


class Neighbours:
    """Fetch small files ahead of those who read directories of them. Close it before the chunk store."""

    def __init__(self, meta: MetaClient, chunks: ChunkStore, clock: Clock, metrics: VfsMetrics) -> None:
        """Take what files are found and fetched with."""
        self._meta = meta
        self._chunks = chunks
        self._clock = clock
        self._metrics = metrics
        self._tasks = TaskSet()
        self._work: asyncio.Task[None] | None = None
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._most_bytes = min(MOST_BYTES, chunks.cache_limit_bytes // CACHE_SHARE)
        self._budget_bytes = min(START_BYTES, self._most_bytes)
        self._short_bytes = meta.format.inline_limit_bytes
        self._directories: OrderedDict[Ino, _Directory] = OrderedDict()
        self._wanted: dict[Ino, Ino] = {}
        """Directories to fetch from, and the file behind which to begin."""
        self._unread: OrderedDict[SliceId, _Unread] = OrderedDict()
        self._unread_bytes = 0
        self._packs: OrderedDict[SliceId, None] = OrderedDict()
        """Packs that were fetched whole."""
        self._read_s = -math.inf
        """When something was last read that had been fetched ahead."""
        self._parent: Ino | None = None
        """The directory of which a file was read last."""
        self._came_from: Ino | None = None
        """The directory that was read before that one."""
        self._beside = _Beside(None, [], -math.inf)

    async def close(self) -> None:
        """Stop fetching."""
        await self._tasks.close()

    # -- what reads say ---------------------------------------------------------------------------------------------------

    def read_at_once(self, file: Writing) -> None:
        """Note that the beginning of a file was read without waiting. 0.2 us where nothing was fetched ahead."""
        is_first = self._arrives(file.inode.parent)
        info = _first_slice(file) if self._unread or is_first else None
        if info is None:
            return
        if info.slice_id in self._unread:
            self._was_read(info.slice_id, file)
        elif is_first:
            # The first of a directory may lie in the pack of the one before.
            now_s = self._clock.monotonic_s()
            if now_s - self._read_s <= PAUSE_S and self._unread_bytes <= self._budget_bytes // 2:
                self._want(file, now_s)

    def missed(self, file: Writing) -> None:
        """Note that the beginning of a file has to be waited for."""
        if not file.inode.parent or file.size > LARGEST_BYTES or (info := _first_slice(file)) is None:
            return
        self._arrives(file.inode.parent)
        if info.slice_id in self._unread:
            self._was_read(info.slice_id, file)
        elif not self._is_there(info, file.size):
            now_s = self._clock.monotonic_s()
            directory = self._directory(file.inode.parent)
            directory.misses = directory.misses + 1 if now_s - directory.last_s <= PAUSE_S else 1
            directory.last_s = now_s
            if directory.misses >= IN_A_ROW or now_s - self._read_s <= PAUSE_S:
                self._want(file, now_s)

    def _arrives(self, parent: Ino) -> bool:
        """Take note of where a file is read; whether that is another directory than that of the one before."""
        if not parent or parent == self._parent:
            return False
        self._came_from, self._parent = self._parent, parent
        return True

    def _was_read(self, slice_id: SliceId, file: Writing) -> None:
        size_bytes = self._unread.pop(slice_id).size_bytes
        self._unread_bytes -= size_bytes
        self._metrics.neighbour_read_bytes += size_bytes
        self._budget_bytes = min(self._most_bytes, self._budget_bytes + size_bytes)
        self._read_s = self._clock.monotonic_s()
        if self._unread_bytes <= self._budget_bytes // 2:
            self._want(file, self._read_s)

    def _directory(self, ino: Ino) -> _Directory:
        directory = self._directories.get(ino)
        if directory is None:
            directory = self._directories[ino] = _Directory()
            if len(self._directories) > _DIRECTORIES_KEPT:
                self._directories.popitem(last=False)
        else:
            self._directories.move_to_end(ino)
        return directory

    def _want(self, file: Writing, now_s: float) -> None:
        """Fetch what lies behind a file, if there is anything."""
        parent = file.inode.parent
        if not self._directory(parent).has_more(now_s) and self._came_from is None:
            return
        self._give_up_old(now_s)
        self._wanted[parent] = file.inode.ino
        if self._work is None:
            self._work = self._tasks.start(self._fetch_wanted(), name="small files ahead", raises=(AtollError,))
            self._work.add_done_callback(self._rested)

    def _rested(self, task: asyncio.Task[None]) -> None:
        self._work = None
        if not task.cancelled() and (error := task.exception()) is not None:
            # Whoever reads the directory meets it as well.
            self._wanted.clear()
            log.debug("fetching small files ahead: %s", error)

    def _give_up_old(self, now_s: float) -> None:
        """Let go of what lies unread for too long; then less is fetched ahead."""
        before = self._metrics.neighbour_unread_bytes
        while self._unread and now_s - next(iter(self._unread.values())).since_s > PATIENCE_S:
            _, old = self._unread.popitem(last=False)
            self._unread_bytes -= old.size_bytes
            self._metrics.neighbour_unread_bytes += old.size_bytes
        if self._metrics.neighbour_unread_bytes > before:
            self._budget_bytes = min(self._most_bytes, max(LEAST_BYTES, self._budget_bytes // 2))

    # -- fetching ---------------------------------------------------------------------------------------------------------

    async def _fetch_wanted(self) -> None:
        while self._wanted:
            parent = next(iter(self._wanted))
            if await self._fetch_behind(parent, self._wanted.pop(parent)) and not self._wanted:
                await self._go_on(parent)

    async def _go_on(self, parent: Ino) -> None:
        """Fetch from the directories behind one, if its reader came there from the one before it."""
        if self._came_from is None:
            return
        here = self._directory(parent)
        if here.above is None:
            here.above = (await self._meta.getattr(parent)).parent
        above = here.above
        now_s = self._clock.monotonic_s()
        if self._beside.above != above or now_s - self._beside.listed_s > LISTED_S:
            self._beside = _Beside(above, await self._subdirectories(above), now_s)
        for other in self._beside.behind(self._came_from, parent):
            directory = self._directory(other)
            if not await self._fetch_from(other, directory, 0, most=_FILES_OF_NEXT) or self._wanted:
                return

    async def _subdirectories(self, ino: Ino) -> list[Ino]:
        """Return the directories in a directory, in order, as far as its first thousands of entries."""
        found: list[Ino] = []
        after: bytes | None = None
        for _ in range(_PAGES_ABOVE):
            page = await self._meta.readdir(ino, after=after, limit=_PAGE_ENTRIES)
            found += [entry.inode.ino for entry in page.entries if entry.inode.is_dir]
            if page.end or not page.entries:
                break
            after = page.entries[-1].name
        return found

    async def _fetch_behind(self, parent: Ino, ino: Ino) -> bool:
        """Fetch from a directory until the budget is used up (then False), or nothing is left."""
        directory = self._directory(parent)
        now_s = self._clock.monotonic_s()
        if now_s - directory.listed_s > LISTED_S:
            directory.start_over(now_s)
        while (position := directory.position(ino)) is None and not directory.is_listed:
            await self._list(parent, directory)
        start = 0 if position is None else position + 1
        if position is not None and not directory.asked[position]:
            directory.asked[position] = 1
            directory.left -= 1
        return await self._fetch_from(parent, directory, start, most=_NAMES_MAX)

    async def _fetch_from(self, parent: Ino, directory: _Directory, start: int, *, most: int) -> bool:
        """Fetch files of a directory from a position on until so many were asked for; False where the budget is used up."""
        while directory.asked_count < most:
            room_bytes = self._budget_bytes - self._unread_bytes
            inos = directory.take(start, room_bytes, short_bytes=self._short_bytes) if room_bytes > 0 else []
            if inos:
                if not await self._fetch(inos):
                    return False
            elif directory.left:
                return False
            elif directory.is_listed:
                return True
            else:
                await self._list(parent, directory)
        return True

    async def _list(self, parent: Ino, directory: _Directory) -> None:
        """Bring the next page of a directory."""
        page = await self._meta.readdir(parent, after=directory.after, limit=_PAGE_ENTRIES)
        for entry in page.entries:
            inode = entry.inode
            if inode.is_file and 0 < inode.size_bytes <= LARGEST_BYTES:
                directory.inos.append(inode.ino)
                directory.sizes.append(inode.size_bytes)
                directory.asked.append(0)
                directory.left += 1
        directory.after = page.entries[-1].name if page.entries else None
        directory.is_listed = page.end or not page.entries or len(directory.inos) >= _NAMES_MAX

    async def _fetch(self, inos: Sequence[Ino]) -> bool:
        """Fetch files, some at once; False where there is no room for more."""
        for ino, found in (await self._meta.read_maps(inos)).items():
            for info, start, end in _pieces(found, ino):
                if self._is_there(info, end - start):
                    continue
                await self._slots.acquire()
                if not self._start(info, start, end):
                    self._slots.release()
                    return False
        return True

    def _is_there(self, info: SliceInfo, wanted_bytes: int) -> bool:
        """Return whether a slice need not be fetched, as far as is known; of a pack a part may be there."""
        if info.slice_id in self._unread or info.slice_id in self._packs:
            return True
        return not _is_pack(info, wanted_bytes) and self._chunks.may_have(info.slice_id)

    def _start(self, info: SliceInfo, start: int, end: int) -> bool:
        """Start to fetch a slice. No await between the look at `_unread` and here, but for a slot."""
        if info.slice_id in self._unread:
            self._slots.release()
            return True
        is_pack = _is_pack(info, end - start)
        if is_pack:
            start, end = 0, info.length
        if self._chunks.prefetch(info, start, end, in_pieces=is_pack) < end:
            return False
        if is_pack:
            self._packs[info.slice_id] = None
            if len(self._packs) > _PACKS_KEPT:
                self._packs.popitem(last=False)
        size_bytes = end - start
        self._unread[info.slice_id] = _Unread(size_bytes, self._clock.monotonic_s())
        self._unread_bytes += size_bytes
        self._metrics.neighbour_fetched_bytes += size_bytes
        self._tasks.start(self._wait(info, start, end), name=f"slice {info.slice_id} ahead")
        return True

    async def _wait(self, info: SliceInfo, start: int, end: int) -> None:
        try:
            await self._chunks.settled(info, start, end)
        finally:
            self._slots.release()


def _first_slice(file: Writing) -> SliceInfo | None:
    """Return the slice in the bucket with which a file begins, if nothing of it is being written."""
    committed = file.committed
    if file.pending or committed.known_from or not committed.refs:
        return None
    source = committed.sources[committed.refs[0][1]]
    return source if isinstance(source, SliceInfo) else None


def _is_pack(info: SliceInfo, wanted_bytes: int) -> bool:
    """Return whether a slice, of which a small file has so much, is fetched whole: other files have the rest."""
    return wanted_bytes < info.length <= PACK_BYTES


def _pieces(found: FileMap, ino: Ino) -> list[tuple[SliceInfo, int, int]]:
    """Return what of which slices in the bucket a file is made of, each slice once."""
    if len(found.refs) == 1:
        offset, slice_id, skip, length = found.refs[0]
        source = source_of(found.slices[slice_id], Place(ino, offset - skip))
        return [(source, skip, skip + length)] if isinstance(source, SliceInfo) else []
    spans: dict[SliceId, tuple[int, int]] = {}
    for _, slice_id, skip, length in found.refs:
        start, end = spans.get(slice_id, (skip, skip + length))
        spans[slice_id] = min(start, skip), max(end, skip + length)
    places = places_of(found.refs, ino)
    sources = ((source_of(found.slices[slice_id], places[slice_id]), span) for slice_id, span in spans.items())
    return [(source, *span) for source, span in sources if isinstance(source, SliceInfo)]
