"""Content: chunk maps, commits of written slices, truncate, punch, sharing, removal. Rules on a Tx.

Invariants (checked by metasvc.engine.check): ``Slice.refs`` is the number of refs in all chunk maps that name
the slice; a slice with none has no row, and a Garbage row instead if it has objects; no ref reaches beyond
its slice, and the refs of a file end at or before its length.
"""

from __future__ import annotations

import errno as E
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from chunkstore.geometry import CHUNK_BYTES, KIB, MAX_FILE_BYTES, SliceId
from metasvc.engine import accounts, chunkmap
from metasvc.engine.tx import Tx, refuse
from metasvc.model import (
    MAP_PAGE_CHUNKS,
    Caller,
    Chunk,
    Commit,
    FileMap,
    Garbage,
    Ino,
    Inode,
    OpenFile,
    Packable,
    SessionId,
    Slice,
    SliceKind,
    SliceRef,
    Sustained,
    WrittenSlice,
    pack_refs,
    space_of,
    unpack_refs,
)
from metasvc.store.tables import CHUNK, GARBAGE, INODE, PACKABLE, SLICE, SUSTAINED, XATTR

SETID_BITS: Final = 0o6000
_FEW_PIECES: Final = 64
_FEW_BYTES: Final = 64 * KIB


# -- maps ---------------------------------------------------------------------------------------------


def regular(tx: Tx, ino: Ino) -> Inode:
    """Return the inode of a regular file. ENOENT, EISDIR, EINVAL."""
    inode = tx.inode(ino)
    if not inode.is_file:
        refuse(E.EISDIR if inode.is_dir else E.EINVAL)
    return inode


def read_map(tx: Tx, ino: Ino, start: int, end: int) -> FileMap:
    """Return the chunk map of [start, end), widened to chunks, at most MAP_PAGE_CHUNKS of them."""
    return _map_of(tx, tx.inode(ino), start, end)


def read_maps(tx: Tx, inos: Sequence[Ino]) -> dict[Ino, FileMap]:
    """Return the first chunk of each of these files that is there and has few pieces, which come with few bytes."""
    tx.require([(INODE, ino) for ino in inos])
    found = [tx.get(INODE, ino) for ino in inos]
    files: list[Inode] = [inode for inode in found if inode is not None and inode.is_file]
    tx.require([(CHUNK, (inode.ino, 0)) for inode in files])
    pieces = {inode.ino: get_chunk(tx, inode.ino, 0) for inode in files}
    few = [inode for inode in files if len(pieces[inode.ino]) <= _FEW_PIECES]
    tx.require([(SLICE, ref.slice_id) for inode in few for ref in pieces[inode.ino]])
    maps = {inode.ino: _map_of(tx, inode, 0, CHUNK_BYTES) for inode in few}
    return {
        ino: found for ino, found in maps.items() if sum(len(row.data) for row in found.slices.values()) <= _FEW_BYTES
    }


def open_file(tx: Tx, ino: Ino) -> OpenFile:
    """Return what an open answers: attributes and the first part of the map."""
    inode = tx.inode(ino)
    return _opened(tx, inode)


def sustain(tx: Tx, session_id: SessionId, inode: Inode) -> None:
    """Keep an inode that has no name (and is not in the trash) for a session that opens it."""
    if inode.nlink == 0 and inode.parent == 0 and tx.get(SUSTAINED, (session_id, inode.ino)) is None:
        tx.put(SUSTAINED, Sustained(session_id, inode.ino))


def _opened(tx: Tx, inode: Inode) -> OpenFile:
    found = _map_of(tx, inode, 0, MAP_PAGE_CHUNKS * CHUNK_BYTES)
    return OpenFile(inode, found, promised_end=0 if accounts.is_limited(tx) else MAX_FILE_BYTES)


def _map_of(tx: Tx, inode: Inode, start: int, end: int) -> FileMap:
    first = start // CHUNK_BYTES
    past = min(-(-end // CHUNK_BYTES), first + MAP_PAGE_CHUNKS)
    past_size = -(-inode.size_bytes // CHUNK_BYTES)
    refs: list[SliceRef] = []
    if inode.is_file and inode.size_bytes:
        indexes = range(first, min(past, past_size))
        tx.require([(CHUNK, (inode.ino, index)) for index in indexes])
        for index in indexes:
            chunk: Chunk | None = tx.get(CHUNK, (inode.ino, index))
            if chunk is not None:
                refs += chunkmap.in_file(unpack_refs(chunk.refs), index)
    ids = {ref.slice_id for ref in refs}
    tx.require([(SLICE, slice_id) for slice_id in ids])
    slices = {slice_id: row for slice_id in ids if (row := tx.slice(slice_id)) is not None}
    if past >= past_size:
        past = MAX_FILE_BYTES // CHUNK_BYTES  # nothing lies beyond the length
    return FileMap(inode.map_version, refs, slices, first * CHUNK_BYTES, past * CHUNK_BYTES)


def get_chunk(tx: Tx, ino: Ino, index: int) -> list[SliceRef]:
    """Return the refs of a chunk, offsets in the chunk."""
    chunk: Chunk | None = tx.get(CHUNK, (ino, index))
    return unpack_refs(chunk.refs) if chunk is not None else []


def put_chunk(tx: Tx, ino: Ino, index: int, refs: list[SliceRef]) -> None:
    """Replace the refs of a chunk; the caller counts them."""
    if refs:
        tx.put(CHUNK, Chunk(ino, index, pack_refs(refs)))
    else:
        tx.delete(CHUNK, (ino, index))


# -- references ---------------------------------------------------------------------------------------


def settle(tx: Tx, delta: dict[int, int], written: Iterable[WrittenSlice] = ()) -> None:
    """Bring the reference counts of slices up to date; those without references become garbage."""
    new = {slice_.slice_id: slice_ for slice_ in written}
    tx.require([(SLICE, slice_id) for slice_id, change in delta.items() if change and slice_id not in new])
    for slice_id, change in delta.items():
        if slice_id in new:
            continue
        if change:
            row = tx.slice(slice_id)
            assert row is not None, f"slice {slice_id} is named by a chunk and has no row"
            if row.refs + change > 0:
                tx.put(SLICE, row._replace(refs=row.refs + change))
            else:
                _bury(tx, row)
    for slice_ in new.values():
        refs = delta.get(slice_.slice_id, 0)
        row = Slice(slice_.slice_id, slice_.length, refs, int(slice_.kind), slice_.data)
        if refs > 0:
            tx.put(SLICE, row)
        elif slice_.kind is not SliceKind.INLINE:
            tx.put(GARBAGE, Garbage(slice_.slice_id, slice_.length, tx.now_ns))


def _note_packable(tx: Tx, ino: Ino, delta: Mapping[int, int], written: Iterable[WrittenSlice]) -> None:
    """Remember where inline slices are, for the job that gathers them (metasvc.engine.packing)."""
    for slice_ in written:
        if slice_.kind is SliceKind.INLINE and delta.get(slice_.slice_id, 0) > 0:
            index = slice_.refs[0].offset // CHUNK_BYTES
            tx.put(PACKABLE, Packable(slice_.slice_id, ino, index, tx.now_ns))


def _bury(tx: Tx, row: Slice) -> None:
    tx.delete(SLICE, row.slice_id)
    if row.kind == SliceKind.INLINE:
        tx.delete(PACKABLE, row.slice_id)
    else:
        tx.put(GARBAGE, Garbage(row.slice_id, row.length, tx.now_ns))


# -- changing -----------------------------------------------------------------------------------------


def was_applied(tx: Tx, slice_id: SliceId, *, or_gone: bool) -> bool:
    """Return whether a slice that is to be committed was committed before: whoever got no answer brings it again.

    ``or_gone``: whether one without a trace was committed, and is gone.
    """
    tx.require([(SLICE, slice_id), (GARBAGE, slice_id)])
    return or_gone or tx.slice(slice_id) is not None or tx.get(GARBAGE, slice_id) is not None


def without_slices(change: Commit, slice_ids: Collection[SliceId]) -> Commit:
    """Return what is left of a commit when some of its slices were committed before: they are in place, or gone."""
    if not slice_ids:
        return change
    left = tuple(written for written in change.slices if written.slice_id not in slice_ids)
    if change.append:
        # What was appended moved the end of the file already.
        return replace(change, slices=left, end=max((ref.end for each in left for ref in each.refs), default=0))
    return replace(change, slices=left)


def commit(tx: Tx, caller: Caller, ino: Ino, change: Commit) -> Inode:
    """Apply what close and fsync bring: slices, length, times. EDQUOT/ENOSPC, EFBIG."""
    inode = regular(tx, ino)
    base = inode.size_bytes if change.append else 0
    refs = [ref._replace(offset=ref.offset + base) for slice_ in change.slices for ref in slice_.refs]
    end = max(change.end + base if change.end else 0, max((ref.end for ref in refs), default=0))
    if end > MAX_FILE_BYTES:
        refuse(E.EFBIG)
    if change.size_epoch != inode.size_epoch and not change.append:
        # Written before this session learned of a truncate: what lies beyond the length is cut off.
        refs = chunkmap.clip(refs, 0, inode.size_bytes)
        end = min(end, inode.size_bytes)
    touched = chunkmap.by_chunk(refs)
    tx.require([(CHUNK, (ino, index)) for index in touched])
    delta: dict[int, int] = {}
    for index, new_refs in touched.items():
        old = get_chunk(tx, ino, index)
        merged = chunkmap.overlay(old, new_refs)
        chunkmap.count_slices(old, delta, -1)
        chunkmap.count_slices(merged, delta, +1)
        put_chunk(tx, ino, index, merged)
    settle(tx, delta, change.slices)
    _note_packable(tx, ino, delta, change.slices)
    size = max(inode.size_bytes, end)
    growth = space_of(size) - inode.space_bytes
    accounts.room_for_growth(tx, inode, growth - tx.around.granted_bytes(ino))
    accounts.charge_growth(tx, inode, growth)
    mode = inode.mode
    if caller.uid != 0 and change.slices:
        mode = without_setid(mode)
    inode = tx.inode(ino)._replace(
        size_bytes=size,
        mode=mode,
        map_version=inode.map_version + bool(change.slices),
        mtime_ns=inode.mtime_ns if change.mtime_ns is None else change.mtime_ns,
        # Not now_ns: a flush in the background must not look like a change after the write (tar, rsync, make).
        ctime_ns=inode.ctime_ns if change.mtime_ns is None else max(change.mtime_ns, inode.ctime_ns),
    )
    tx.put(INODE, inode)
    return inode


def without_setid(mode: int) -> int:
    """Return the mode without setuid, and without setgid where it is not mandatory locking."""
    mode &= ~0o4000
    if mode & 0o010:
        mode &= ~0o2000
    return mode


def resize(tx: Tx, inode: Inode, size: int) -> Inode:
    """Truncate or extend; the inode with its new length (stored). EFBIG, EDQUOT, ENOSPC."""
    if size < 0:
        refuse(E.EINVAL)
    if size > MAX_FILE_BYTES:
        refuse(E.EFBIG)
    growth = space_of(size) - inode.space_bytes
    accounts.room_for_growth(tx, inode, growth)
    epoch = inode.size_epoch
    version = inode.map_version
    if size < inode.size_bytes:
        _cut(tx, inode.ino, size, inode.size_bytes)
        epoch += 1
        version += 1
    accounts.charge_growth(tx, inode, growth)
    resized = tx.inode(inode.ino)._replace(size_bytes=size, size_epoch=epoch, map_version=version)
    tx.put(INODE, resized)
    return resized


def _cut(tx: Tx, ino: Ino, start: int, end: int) -> None:
    """Take a range out of the map: it reads as zeros."""
    if start >= end:
        return
    first, last = start // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
    if last - first >= MAP_PAGE_CHUNKS:
        indexes = [index for index in tx.group(CHUNK, ino) if first <= index <= last]
    else:
        indexes = list(range(first, last + 1))
        tx.require([(CHUNK, (ino, index)) for index in indexes])
    delta: dict[int, int] = {}
    for index in indexes:
        old = get_chunk(tx, ino, index)
        if not old:
            continue
        base = index * CHUNK_BYTES
        kept = chunkmap.cut(old, max(0, start - base), min(CHUNK_BYTES, end - base))
        chunkmap.count_slices(old, delta, -1)
        chunkmap.count_slices(kept, delta, +1)
        put_chunk(tx, ino, index, kept)
    settle(tx, delta)


def punch(tx: Tx, caller: Caller, ino: Ino, start: int, end: int) -> OpenFile:
    """Make a range read as zeros; length and charge stay."""
    inode = regular(tx, ino)
    if start < 0 or end < start:
        refuse(E.EINVAL)
    _cut(tx, ino, start, min(end, inode.size_bytes))
    inode = inode._replace(
        map_version=inode.map_version + 1,
        mtime_ns=tx.now_ns,
        ctime_ns=tx.ctime_ns(inode),
        mode=without_setid(inode.mode) if caller.uid else inode.mode,
    )
    tx.put(INODE, inode)
    return _opened(tx, inode)


def copy_range(
    tx: Tx, caller: Caller, source: Ino, start: int, target: Ino, target_start: int, length: int
) -> tuple[int, OpenFile]:
    """Share the slices of a range with another place. EINVAL (overlap), EFBIG, EDQUOT, ENOSPC."""
    origin, inode = regular(tx, source), regular(tx, target)
    length = max(0, min(length, origin.size_bytes - start))
    if start < 0 or target_start < 0:
        refuse(E.EINVAL)
    if source == target and start < target_start + length and target_start < start + length:
        refuse(E.EINVAL)
    if target_start + length > MAX_FILE_BYTES:
        refuse(E.EFBIG)
    if length == 0:
        return 0, _opened(tx, inode)
    size = max(inode.size_bytes, target_start + length)
    growth = space_of(size) - inode.space_bytes
    accounts.room_for_growth(tx, inode, growth)

    indexes = range(start // CHUNK_BYTES, -(-(start + length) // CHUNK_BYTES))
    tx.require([(CHUNK, (source, index)) for index in indexes])
    refs: list[SliceRef] = []
    for index in indexes:
        refs += chunkmap.in_file(get_chunk(tx, source, index), index)
    shift = target_start - start
    moved = [ref._replace(offset=ref.offset + shift) for ref in chunkmap.clip(refs, start, start + length)]
    _cut(tx, target, target_start, target_start + length)
    delta: dict[int, int] = {}
    touched = chunkmap.by_chunk(moved)
    tx.require([(CHUNK, (target, index)) for index in touched])
    for index, new_refs in touched.items():
        old = get_chunk(tx, target, index)
        merged = chunkmap.overlay(old, new_refs)
        chunkmap.count_slices(old, delta, -1)
        chunkmap.count_slices(merged, delta, +1)
        put_chunk(tx, target, index, merged)
    settle(tx, delta)
    accounts.charge_growth(tx, inode, growth)
    inode = tx.inode(target)._replace(
        size_bytes=size,
        map_version=inode.map_version + 1,
        mtime_ns=tx.now_ns,
        ctime_ns=tx.ctime_ns(inode),
        mode=without_setid(inode.mode) if caller.uid else inode.mode,
    )
    tx.put(INODE, inode)
    return length, _opened(tx, inode)


def replace_refs(tx: Tx, ino: Ino, index: int, expected: list[SliceRef], written: tuple[WrittenSlice, ...]) -> bool:
    """Put a compacted chunk in the place of ``expected``, if the map still is that. Times and length stay.

    If it is not, the written slices become garbage.
    """
    row: Inode | None = tx.get(INODE, ino)
    old = get_chunk(tx, ino, index) if row is not None else []
    if row is None or chunkmap.in_file(old, index) != expected:
        settle(tx, {}, written)
        return False
    merged: list[SliceRef] = []
    base = index * CHUNK_BYTES
    for slice_ in written:
        merged = chunkmap.overlay(merged, [ref._replace(offset=ref.offset - base) for ref in slice_.refs])
    delta: dict[int, int] = {}
    chunkmap.count_slices(old, delta, -1)
    chunkmap.count_slices(merged, delta, +1)
    put_chunk(tx, ino, index, merged)
    settle(tx, delta, written)
    _note_packable(tx, ino, delta, written)
    tx.put(INODE, row._replace(map_version=row.map_version + 1))
    return True


# -- the end of an inode ------------------------------------------------------------------------------


def remove_or_sustain(tx: Tx, inode: Inode) -> None:
    """Let go of an inode without names: remove it, or sustain it while sessions have it open."""
    holders = tx.around.sessions_holding(inode.ino)
    if holders:
        tx.put(INODE, inode._replace(parent=Ino(0)))
        for session_id in holders:
            tx.put(SUSTAINED, Sustained(session_id, inode.ino))
    else:
        remove(tx, inode)


def remove(tx: Tx, inode: Inode) -> None:
    """Remove an inode with xattrs, chunks and references for good."""
    ino = inode.ino
    tx.require([], [(XATTR, ino), (CHUNK, ino)])
    for name in tx.group(XATTR, ino):
        tx.delete(XATTR, (ino, name))
    delta: dict[int, int] = {}
    for index, chunk in tx.group(CHUNK, ino).items():
        chunkmap.count_slices(unpack_refs(chunk.refs), delta, -1)
        tx.delete(CHUNK, (ino, index))
    settle(tx, delta)
    tx.delete(INODE, ino)
    accounts.charge_volume(tx, bytes_more=-inode.space_bytes, inodes_more=-1)


def release(tx: Tx, session_id: int, ino: Ino, *, last: bool) -> None:
    """End the sustaining of an inode by a session; ``last`` if no other session holds it.

    An inode in the trash stays there: it is not nameless but waiting.
    """
    row = tx.get(SUSTAINED, (session_id, ino))
    if row is None:
        return
    tx.delete(SUSTAINED, (session_id, ino))
    if last:
        inode: Inode | None = tx.get(INODE, ino)
        if inode is not None and inode.nlink == 0 and inode.parent == 0:
            remove(tx, inode)
