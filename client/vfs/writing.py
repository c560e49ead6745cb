"""What was written to one file and is not committed yet, shared by all handles of the file.

Owns the pending slices of an inode, oldest first, the length and mtime that applications see, and the order of commits.
Must not know handles, names or the kernel.

How it goes. A write appends its bytes to the slice being written (a log of all that is written, wherever in the file it
belongs) and lays a ref over that slice's layer; bytes of the slice that are still mutable are replaced in place. A flush
closes that slice (later writes begin a new one), seals the closed ones, which makes their bytes durable, and commits them
in one operation of the metadata. Reads see, newest first: the slice being written, the closed ones, the committed map.

Invariants
- Slices are committed in the order in which they were begun, each with every range it was written with: a newer slice that
  overlays an older one does not shorten it, because the newer one may be lost in a crash after the older was acknowledged.
- A slice leaves `pending` in the same stretch in which its refs enter the committed map, so a reader finds its bytes in one
  of the two at any time.
- A failed flush changes nothing: all slices stay pending, whoever flushes next tries them again. The one exception are slices
  of a session that the service has ended (it did not hear of this client for too long): nobody can commit them any more. They
  leave `pending` for good, `losses` grows, and each descriptor that was open for writing hears of it once (ESTALE).

Interleavings
- `changing` serialises what changes the pending slices or the length: writes, truncates, and the moment at which a flush
  closes the current slice. It is held over the back-pressure of a write (the writer must not be called meanwhile) and over
  a truncate's trip to the owner (a write must not slip between the two).
- `flushing` is held by whoever seals and commits, hence one commit of a file at a time. Order: `flushing`, then `changing`.
  A write never waits for `flushing` while it holds `changing`.
- A cancelled flush leaves a commit behind whose answer nobody awaits: it runs to its end as a task of its own, and the
  next one that takes `flushing` awaits it before anything else.
"""

from __future__ import annotations

import asyncio
import errno
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

from chunkstore.errors import AtollError
from chunkstore.geometry import MAX_FILE_BYTES, Buffer, SliceId
from chunkstore.slices import ChunkStore, Sealed, SliceWriter
from client.vfs import overlay
from client.vfs.clock import Clock
from client.vfs.committed import CommittedMap
from client.vfs.options import VfsOptions
from client.vfs.overlay import Layer
from client.vfs.slice_ids import SliceIds
from metasvc.api import MetaClient
from metasvc.errors import FsError
from metasvc.model import Caller, Commit, Inode, OpenFile, SessionId, SetAttr, SliceKind, SliceRef, WrittenSlice


class DirtyFiles(Protocol):
    """Who wants to know which files have pending slices: the background flush."""

    def became_dirty(self, file: Writing) -> None:
        """Take note of a file that has something pending now."""
        ...

    def became_clean(self, file: Writing) -> None:
        """Take note that nothing is pending any more."""
        ...

    def wants_flush(self, file: Writing) -> None:
        """Flush this file soon: a slice of it is full."""
        ...

    def lost(self, file: Writing, lost_bytes: int) -> None:
        """Take note that written bytes cannot be committed any more."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all files of a vfs share."""

    meta: MetaClient
    chunks: ChunkStore
    options: VfsOptions
    clock: Clock
    slice_ids: SliceIds
    dirty: DirtyFiles
    next_caller: Callable[[], Caller]
    """Credentials of a commit: root, because who may write was decided when the file was opened."""
    committed: Callable[[], None]
    """Called after each commit, when the attributes that the owner has of a file have changed."""


class PendingSlice:
    """A slice being written or waiting for commit, with the file ranges that it covers."""

    __slots__ = ("end", "refs", "sealed", "session_id", "since_s", "was_sent", "writer")

    def __init__(self, writer: SliceWriter, session_id: SessionId, since_s: float) -> None:
        self.writer = writer
        self.session_id = session_id
        """The session that may commit it."""
        self.refs: Layer = []
        self.end = 0
        """End of own writes: what the length must at least become."""
        self.since_s = since_s
        self.sealed: Sealed | None = None
        self.was_sent = False
        """A commit of it was sent: it may be part of the file, whatever became of the answer."""

    async def put(self, offset: int, data: Buffer) -> None:
        """Take bytes for a file offset, waiting for room if need be. Cut `data` by `span` before: one call of the writer.

        The range is covered only when the writer has taken all bytes. After an exception what it took is dead weight in the
        slice and the file is as it was, but for bytes replaced in place.
        """
        writer = self.writer
        place = self._mutable_place(offset)
        if place is not None:
            waits = writer.overwrite(place, data)
            if waits is not None:
                await waits
        else:
            place = writer.length
            waits = writer.append(data)
            if waits is not None:
                await waits
            overlay.overlay(self.refs, SliceRef(offset, writer.slice_id, place, len(data)))
        self.end = max(self.end, offset + len(data))

    def span(self, offset: int, end: int) -> int:
        """Return up to where bytes from `offset` on go into the slice in one call: all in place, or all appended."""
        refs = self.refs
        index = overlay.first_behind(refs, offset)
        mutable_from = self.writer.mutable_from
        if index < len(refs) and refs[index][0] <= offset:
            ref = refs[index]
            if ref[2] + offset - ref[0] >= mutable_from:
                return min(end, ref[0] + ref[3])
            index += 1
        # Appended up to the next range that could be replaced in place.
        while index < len(refs) and refs[index][0] < end:
            if refs[index][2] >= mutable_from:
                return refs[index][0]
            index += 1
        return end

    def _mutable_place(self, offset: int) -> int | None:
        """Return where in the slice the byte of a file offset lies, if it can be replaced there."""
        refs = self.refs
        index = overlay.first_behind(refs, offset)
        if index < len(refs):
            ref = refs[index]
            if ref[0] <= offset:
                place = ref[2] + offset - ref[0]
                if place >= self.writer.mutable_from:
                    return place
        return None

    def written(self) -> WrittenSlice:
        """Return what is committed of a sealed slice."""
        sealed = self.sealed
        assert sealed is not None, "a slice is sealed before it is committed"
        if sealed.inline is not None:
            return WrittenSlice(sealed.slice_id, sealed.length, SliceKind.INLINE, sealed.inline, tuple(self.refs))
        return WrittenSlice(sealed.slice_id, sealed.length, SliceKind.BLOCKS, sealed.digests, tuple(self.refs))


class Writing:
    """The written side of one open inode."""

    __slots__ = (
        "_commit",
        "_committed_size",
        "_current",
        "_granted_end",
        "_size_epoch",
        "_unsure",
        "_with",
        "changing",
        "committed",
        "flushing",
        "inode",
        "losses",
        "mtime_ns",
        "no_capability_until_s",
        "pages_version",
        "pending",
        "size",
        "sources",
    )

    def __init__(self, around: Surroundings, opened: OpenFile) -> None:
        """Begin with what open answered."""
        self._with = around
        self.inode = opened.inode
        """The inode by the last answer that this object saw; chmod and the like pass it by."""
        self.committed = CommittedMap(opened.map, opened.inode.ino)
        self.pending: list[PendingSlice] = []
        self.sources: dict[SliceId, PendingSlice] = {}
        """The pending slices by id."""
        self.size = opened.inode.size_bytes
        """The length as applications see it, unflushed writes included."""
        self.mtime_ns: int | None = None
        """Time of the last write that is not committed; None if the committed mtime holds."""
        self.no_capability_until_s = -math.inf
        """Until when `security.capability` is known not to be set: the kernel asks for it before each write(2)."""
        self.losses = 0
        """How often pending slices were lost with the session that they belonged to."""
        self.changing = asyncio.Lock()
        self.flushing = asyncio.Lock()
        self._current: PendingSlice | None = None
        self._granted_end = max(opened.inode.size_bytes, opened.promised_end)
        self._committed_size = opened.inode.size_bytes
        self._size_epoch = opened.inode.size_epoch
        self._commit: asyncio.Task[None] | None = None
        self._unsure: tuple[int, tuple[PendingSlice, ...]] | None = None
        """A truncate whose answer was lost: the length, and what was pending then."""
        self.pages_version = -1
        """The version of the map that the pages in a kernel are good for; own changes move it on, those of others do not."""

    # -- what applications see -----------------------------------------------------------------------------------------

    @property
    def is_dirty(self) -> bool:
        """Return whether anything is not committed."""
        return bool(self.pending)

    @property
    def dirty_since_s(self) -> float:
        """Return when the oldest pending slice was begun, on the monotonic clock."""
        return self.pending[0].since_s

    def layers(self) -> list[Layer]:
        """Return the layers of the file, newest first."""
        return [*(slice_.refs for slice_ in reversed(self.pending)), self.committed.refs]

    def shown(self, inode: Inode) -> Inode:
        """Return attributes as applications must see them: with the length and times of unflushed writes."""
        known = self.inode
        if (
            inode.map_version < known.map_version
            or inode.size_epoch < known.size_epoch
            or inode.ctime_ns < known.ctime_ns
        ):
            # Asked for before something that this file knows already: a page of a directory, a neighbour.
            inode = inode._replace(
                size_bytes=known.size_bytes,
                mtime_ns=known.mtime_ns,
                ctime_ns=max(inode.ctime_ns, known.ctime_ns),
            )
        if not self.pending:
            return inode
        mtime_ns = self.mtime_ns
        if mtime_ns is None:
            return inode._replace(size_bytes=self.size)
        return inode._replace(size_bytes=self.size, mtime_ns=mtime_ns, ctime_ns=max(inode.ctime_ns, mtime_ns))

    def reopened(self, opened: OpenFile) -> None:
        """Take what another open of the same inode answered, unless it was overtaken by something newer."""
        inode = opened.inode
        if inode.map_version < self.committed.version or inode.size_epoch < self._size_epoch:
            return
        if inode.map_version > self.committed.version:
            self.committed.add(opened.map)
        elif inode.ctime_ns < self.inode.ctime_ns:
            return
        self._take_inode(inode)

    def noticed(self, inode: Inode) -> None:
        """Take attributes that came with the answer of a call which did not go through this object."""
        if inode.size_epoch < self._size_epoch or inode.ctime_ns < self.inode.ctime_ns:
            return
        if inode.map_version > self.committed.version:
            self.committed.reset(inode.map_version)
        self._take_inode(inode)

    def _take_inode(self, inode: Inode) -> None:
        self.inode = inode
        self._committed_size = inode.size_bytes
        self._size_epoch = inode.size_epoch
        if not self.pending:
            self.size = inode.size_bytes
            self.mtime_ns = None
        else:
            # It may be longer by what another client has written.
            self.size = max(inode.size_bytes, *(slice_.end for slice_ in self.pending))

    # -- writing -------------------------------------------------------------------------------------------------------

    async def write(self, offset: int | None, data: Buffer) -> None:
        """Write bytes at an offset, or at the end of the file (None). EFBIG, EDQUOT, ENOSPC; errors of a flush.

        Waits for a flush, and raises what made it fail, while too many slices of this file wait for commit.
        """
        length = len(data)
        if not length:
            return
        around = self._with
        while len(self.pending) >= around.options.pending_slices:
            await self.flush()
        async with self.changing:
            start = self.size if offset is None else offset
            end = start + length
            if end > self._granted_end:
                self._granted_end = await around.meta.reserve(self.inode.ino, end=end)
            current = self._current
            if current is not None and (
                current.writer.length + length > around.options.slice_max_bytes
                or len(current.refs) >= around.options.slice_max_refs
            ):
                current = self._current = None
                around.dirty.wants_flush(self)
            if current is None:
                current = await self._begin()
            position = start
            view = data
            while True:
                stop = current.span(position, end)
                await current.put(position, view if stop == end else memoryview(view)[: stop - position])
                if stop > self.size:
                    self.size = stop
                self.mtime_ns = around.clock.wall_ns()
                if stop == end:
                    return
                view = memoryview(view)[stop - position :]
                position = stop

    async def _begin(self) -> PendingSlice:
        around = self._with
        slice_id = await around.slice_ids.take()
        slice_ = PendingSlice(around.chunks.writer(slice_id), around.meta.session_id, around.clock.monotonic_s())
        self.pending.append(slice_)
        self.sources[slice_id] = slice_
        self._current = slice_
        if len(self.pending) == 1:
            around.dirty.became_dirty(self)
        return slice_

    def _remove(self, slices: tuple[PendingSlice, ...]) -> None:
        self.pending = [slice_ for slice_ in self.pending if slice_ not in slices]
        for slice_ in slices:
            del self.sources[slice_.writer.slice_id]
        if not self.pending:
            self._with.dirty.became_clean(self)

    # -- flushing ------------------------------------------------------------------------------------------------------

    async def flush(self) -> None:
        """Make all that was written before this call durable and committed. Nothing to do: no trip, no waiting.

        Errors of sealing (BucketUnavailable …) and of the commit; everything stays pending then, but for slices of a session
        that has ended (ESTALE).
        """
        if not self.pending and self._commit is None:
            return
        async with self._flush_turn():
            async with self.changing:
                batch, mtime_ns = self._close_current()
            try:
                await self._seal_and_commit(batch, mtime_ns)
            except FsError as error:
                if error.errno == errno.ESTALE:
                    async with self.changing:
                        await self._lose_ended()
                raise

    async def _lose_ended(self) -> None:
        """Let go of slices whose session has ended. Call with `flushing` and `changing` held."""
        around = self._with
        lost = tuple(slice_ for slice_ in self.pending if slice_.session_id != around.meta.session_id)
        if not lost:
            return
        try:
            inode = await around.meta.getattr(self.inode.ino)
        except FsError:
            inode = self.inode  # removed meanwhile
        # No await from here on until the file is whole again.
        if self._current in lost:
            self._current = None
        self._remove(lost)
        self.losses += 1
        self.committed.reset(max(inode.map_version, self.committed.version))
        self.pages_version = -1
        self._take_inode(inode)
        around.committed()
        around.dirty.lost(self, sum(ref[3] for slice_ in lost for ref in slice_.refs))
        for slice_ in lost:
            if slice_.sealed is None:
                await slice_.writer.discard()
            # One that was sealed may have been committed, its answer lost: then its objects are named by the map. If not, they
            # are swept as what no map names.

    @asynccontextmanager
    async def _flush_turn(self) -> AsyncIterator[None]:
        async with self.flushing:
            left_behind = self._commit
            if left_behind is not None:
                await asyncio.wait([left_behind])
                left_behind.exception()  # its slices are still pending then, and are tried again
            if self._unsure is not None:
                async with self.changing:
                    empty = await self._make_sure()
                for slice_ in empty:
                    await self._give_up(slice_)
            yield

    async def _make_sure(self) -> tuple[PendingSlice, ...]:
        """Find out whether the truncate was made whose answer was lost: a commit with the epoch of before would be cut off.

        Return the slices of which it left nothing.
        """
        assert self._unsure is not None
        size, before = self._unsure
        inode = await self._with.meta.getattr(self.inode.ino)
        self._unsure = None
        if inode.size_epoch == self._size_epoch:
            return ()
        self.committed.reset(inode.map_version)
        empty = self._cut(tuple(slice_ for slice_ in self.pending if slice_ in before), size)
        self._take_inode(inode)
        return empty

    def _cut(self, slices: tuple[PendingSlice, ...], size: int) -> tuple[PendingSlice, ...]:
        """Cut pending slices off at a length; those of which nothing is left are pending no more, and returned."""
        for slice_ in slices:
            overlay.cut(slice_.refs, size, MAX_FILE_BYTES)
            slice_.end = min(slice_.end, size)
        empty = tuple(slice_ for slice_ in slices if not slice_.refs)
        if self._current in empty:
            self._current = None
        self._remove(empty)
        return empty

    def _close_current(self) -> tuple[tuple[PendingSlice, ...], int | None]:
        self._current = None
        return tuple(self.pending), self.mtime_ns

    async def _seal_and_commit(self, batch: tuple[PendingSlice, ...], mtime_ns: int | None) -> None:
        if not batch:
            return
        for slice_ in batch:
            if slice_.sealed is None and slice_.refs:
                slice_.sealed = await slice_.writer.seal()
        self._commit = asyncio.ensure_future(self._commit_batch(batch, mtime_ns))
        await asyncio.shield(self._commit)

    async def _commit_batch(self, batch: tuple[PendingSlice, ...], mtime_ns: int | None) -> None:
        around = self._with
        try:
            written = tuple(slice_.written() for slice_ in batch if slice_.refs)
            if written:
                change = Commit(
                    slices=written,
                    end=max(slice_.end for slice_ in batch),
                    size_epoch=self._size_epoch,
                    mtime_ns=mtime_ns,
                )
                for slice_ in batch:
                    slice_.was_sent = True
                inode = await around.meta.commit(around.next_caller(), self.inode.ino, change)
                # No await from here to _remove(): see the invariants.
                if inode.map_version == self.committed.version + 1 and inode.size_epoch == self._size_epoch:
                    self._pages_move_on(inode.map_version)
                    self.committed.apply(written, version=inode.map_version)
                else:
                    self.committed.reset(inode.map_version)
                self._remove(batch)
                self._take_inode(inode)
                around.committed()
            else:
                self._remove(batch)
        finally:
            self._commit = None
        for slice_ in batch:
            if not slice_.refs:
                await self._give_up(slice_)

    def _pages_move_on(self, version: int) -> None:
        """Keep the pages of a kernel, which made the same change, good for the version that it made of the map."""
        if self.pages_version == self.committed.version:
            self.pages_version = version

    async def _give_up(self, slice_: PendingSlice) -> None:
        """Drop a slice that will not be committed."""
        if slice_.sealed is None:
            await slice_.writer.discard()
        elif slice_.sealed.inline is None and not slice_.was_sent:
            # One that was sent may be named by a map; if none does, its objects are found by gc.
            try:
                await self._with.chunks.delete(slice_.sealed.slice_id, slice_.sealed.length)
            except AtollError:
                pass  # its objects are named by no map: gc finds them

    # -- what needs a still file ---------------------------------------------------------------------------------------

    async def reserve(self, end: int) -> None:
        """Make sure that later writes up to `end` find room. EFBIG, EDQUOT, ENOSPC."""
        async with self.changing:
            if end > self._granted_end:
                self._granted_end = await self._with.meta.reserve(self.inode.ino, end=end)

    async def resize(self, caller: Caller, changes: SetAttr) -> Inode:
        """Change attributes, the length among them. Pending data behind the new length are dropped, never committed."""
        size = changes.size_bytes
        assert size is not None
        async with self._flush_turn(), self.changing:
            try:
                inode = await self._with.meta.setattr(caller, self.inode.ino, changes)
            except BaseException:
                self._unsure = size, tuple(self.pending)
                self._current = None  # later writes are not cut off by it
                raise
            cut_down = size < self._committed_size
            expected = (self.committed.version + cut_down, self._size_epoch + cut_down)
            if (inode.map_version, inode.size_epoch) == expected:
                self._pages_move_on(inode.map_version)
                self.committed.cut_from(size, version=inode.map_version)
            else:
                self.committed.reset(inode.map_version)
            empty = self._cut(tuple(self.pending), size)
            self.mtime_ns = None
            self._take_inode(inode)
            self.size = size
        for slice_ in empty:
            await self._give_up(slice_)
        return self.shown(inode)

    async def set_times(self, caller: Caller, changes: SetAttr) -> Inode:
        """Change attributes other than the length. A time that is set stays, whatever was written before."""
        async with self._flush_turn():
            before = self.mtime_ns
            inode = await self._with.meta.setattr(caller, self.inode.ino, changes)
            if (changes.mtime_ns is not None or changes.mtime_now) and self.mtime_ns == before:
                self.mtime_ns = None
        return self.shown(inode)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[None]:
        """Flush, then keep the file as it is for as long as this is entered: for changes that the owner makes."""
        async with self._flush_turn(), self.changing:
            try:
                await self._seal_and_commit(*self._close_current())
            except FsError as error:
                if error.errno == errno.ESTALE:
                    await self._lose_ended()
                raise
            yield

    def changed(self, opened: OpenFile) -> None:
        """Take what a change by the owner answered. Called inside `still`."""
        self.committed.reset(opened.map.map_version)
        self.committed.add(opened.map)
        self._take_inode(opened.inode)
