"""Values of the model as messages, and back.

Owns the mapping between metasvc.model and atoll.proto for what travels on the stream of a session; both ends use it. Must not
know connections. Numbers out of a message may be anything: what a value of the model may be is checked where it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from google.protobuf.message import Message

from chunkstore.errors import AtollError
from chunkstore.geometry import SliceId
from metasvc.api import atoll_pb2 as pb
from metasvc.errors import Fenced, FsError, OutOfSpace, SchemaTooNew, StoreError, VolumeExists, VolumeMissing
from metasvc.model import (
    Caller,
    Commit,
    DirPage,
    Entry,
    FileMap,
    Ino,
    Inode,
    OpenFile,
    SetAttr,
    Slice,
    SliceKind,
    SliceRef,
    StatFs,
    WrittenSlice,
)

R = TypeVar("R")

_REF: Final = struct.Struct("<QQII")
# What `_make` does, without a call of Python for each: 0.3 us of 2.5 that a name of a listing takes here.
_NEW_INODE: Final = partial(tuple.__new__, Inode)
_NEW_ENTRY: Final = partial(tuple.__new__, Entry)
_NEW_REF: Final = partial(tuple.__new__, SliceRef)
_NEW_SLICE: Final = partial(tuple.__new__, Slice)


# -- inodes ---------------------------------------------------------------------------------------------------------------


def put_inodes(inodes: Sequence[Inode], into: pb.Inodes) -> None:
    """Write inodes as columns."""
    if not inodes:
        return
    (
        into.ino[:],
        into.mode[:],
        into.nlink[:],
        into.uid[:],
        into.gid[:],
        into.rdev[:],
        into.size_bytes[:],
        into.atime_ns[:],
        into.mtime_ns[:],
        into.ctime_ns[:],
        into.parent[:],
        into.child_bytes[:],
        into.map_version[:],
        into.size_epoch[:],
    ) = zip(*inodes, strict=True)


def inodes_of(message: pb.Inodes) -> list[Inode]:
    """Read inodes. StoreError if the columns have several lengths."""
    try:
        rows = zip(
            message.ino,
            message.mode,
            message.nlink,
            message.uid,
            message.gid,
            message.rdev,
            message.size_bytes,
            message.atime_ns,
            message.mtime_ns,
            message.ctime_ns,
            message.parent,
            message.child_bytes,
            message.map_version,
            message.size_epoch,
            strict=True,
        )
        return list(map(_NEW_INODE, rows))
    except ValueError as error:
        raise StoreError("the service sent inodes whose columns differ in length") from error


def inode_of(reply: pb.Reply) -> Inode:
    """Read the one inode of a reply. StoreError if there is another number of them."""
    found = inodes_of(reply.inodes)
    if len(found) != 1:
        raise StoreError(f"the service sent {len(found)} inodes where one was asked for")
    return found[0]


def page_of(reply: pb.Reply) -> DirPage:
    """Read a page of a directory."""
    inodes = inodes_of(reply.inodes)
    if len(inodes) != len(reply.names):
        raise StoreError(f"the service sent {len(reply.names)} names for {len(inodes)} inodes")
    return DirPage(list(map(_NEW_ENTRY, zip(reply.names, inodes, strict=True))), reply.end)


def put_page(page: DirPage, into: pb.Reply) -> None:
    """Write a page of a directory."""
    into.names.extend([entry.name for entry in page.entries])
    put_inodes([entry.inode for entry in page.entries], into.inodes)
    into.end = page.end


# -- maps -----------------------------------------------------------------------------------------------------------------


def pack_file_refs(refs: Iterable[SliceRef]) -> bytes:
    """Pack refs whose offsets are in the file."""
    return b"".join([_REF.pack(*ref) for ref in refs])


def unpack_file_refs(packed: bytes) -> list[SliceRef]:
    """Inverse of pack_file_refs(). StoreError for what is not made of whole refs."""
    try:
        return list(map(_NEW_REF, _REF.iter_unpack(packed)))
    except struct.error as error:
        raise StoreError("a chunk map ends within a ref") from error


def put_map(found: FileMap, into: pb.FileMap) -> None:
    """Write a chunk map with its slices."""
    into.map_version = found.map_version
    into.refs = pack_file_refs(found.refs)
    into.start, into.end = found.start, found.end
    for slice_id, length, refs, kind, data in found.slices.values():
        into.slices.add(slice_id=slice_id, length=length, refs=refs, kind=kind, data=data)


def map_of(message: pb.FileMap) -> FileMap:
    """Read a chunk map. 2 us for one slice."""
    slices: dict[SliceId, Slice] = {}
    for each in message.slices:
        found = _NEW_SLICE((each.slice_id, each.length, each.refs, each.kind, each.data))
        slices[found[0]] = found
    return FileMap(message.map_version, unpack_file_refs(message.refs), slices, message.start, message.end)


def put_open(answer: OpenFile, into: pb.Reply) -> None:
    """Write what operations answer that return an open file."""
    put_inodes([answer.inode], into.inodes)
    put_map(answer.map, into.map)
    into.promised_end, into.is_new = answer.promised_end, answer.is_new


def open_of(reply: pb.Reply) -> OpenFile:
    """Read what open and create answer."""
    return OpenFile(inode_of(reply), map_of(reply.map), reply.promised_end, reply.is_new)


# -- what requests carry --------------------------------------------------------------------------------------------------


def caller_message(caller: Caller) -> pb.Caller:
    """Write credentials; the number of the request travels with the request."""
    return pb.Caller(uid=caller.uid, gid=caller.gid, groups=caller.groups, umask=caller.umask)


def caller_of(message: pb.Caller, number: int) -> Caller:
    """Read credentials."""
    return Caller(message.uid, message.gid, tuple(message.groups), message.umask, number)


def set_attr_of(message: pb.SetAttr) -> SetAttr:
    """Read what setattr changes."""
    has = message.HasField
    return SetAttr(
        mode=message.mode if has("mode") else None,
        uid=message.uid if has("uid") else None,
        gid=message.gid if has("gid") else None,
        size_bytes=message.size_bytes if has("size_bytes") else None,
        atime_ns=message.atime_ns if has("atime_ns") else None,
        mtime_ns=message.mtime_ns if has("mtime_ns") else None,
        atime_now=message.atime_now,
        mtime_now=message.mtime_now,
    )


def set_attr_message(caller: Caller, ino: Ino, changes: SetAttr) -> pb.SetAttr:
    """Write what setattr changes."""
    return pb.SetAttr(
        caller=caller_message(caller),
        ino=ino,
        mode=changes.mode,
        uid=changes.uid,
        gid=changes.gid,
        size_bytes=changes.size_bytes,
        atime_ns=changes.atime_ns,
        mtime_ns=changes.mtime_ns,
        atime_now=changes.atime_now,
        mtime_now=changes.mtime_now,
    )


def written_message(written: WrittenSlice) -> pb.WrittenSlice:
    """Write a written slice."""
    return pb.WrittenSlice(
        slice_id=written.slice_id,
        length=written.length,
        kind=int(written.kind),
        data=bytes(written.data),
        refs=pack_file_refs(written.refs),
    )


def commit_message(caller: Caller, ino: Ino, commit: Commit) -> pb.Commit:
    """Write a commit."""
    return pb.Commit(
        caller=caller_message(caller),
        ino=ino,
        slices=map(written_message, commit.slices),
        end=commit.end,
        size_epoch=commit.size_epoch,
        mtime_ns=commit.mtime_ns,
        append=commit.append,
    )


def written_of(message: pb.WrittenSlice) -> WrittenSlice:
    """Read a written slice. ValueError for an unknown kind of slice, StoreError for torn refs."""
    refs = tuple(unpack_file_refs(message.refs))
    return WrittenSlice(SliceId(message.slice_id), message.length, SliceKind(message.kind), message.data, refs)


def commit_of(message: pb.Commit) -> Commit:
    """Read a commit. Errors as written_of()."""
    return Commit(
        tuple(map(written_of, message.slices)),
        message.end,
        message.size_epoch,
        message.mtime_ns if message.HasField("mtime_ns") else None,
        message.append,
    )


def statfs_of(reply: pb.Reply) -> StatFs:
    """Read the space of a volume."""
    found = reply.statfs
    return StatFs(found.total_bytes, found.used_bytes, found.total_inodes, found.used_inodes)


# -- rows whose message has fields of the same names ----------------------------------------------------------------------


def put_row(row: Any, into: Message) -> None:
    """Write those fields of a flat value that its message has."""
    for name in into.DESCRIPTOR.fields_by_name:
        value = getattr(row, name, None)
        if value is not None:
            setattr(into, name, value)


def row_of(kind: type[R], message: Message) -> R:
    """Read a flat value; fields that its message lacks keep their defaults."""
    has = message.DESCRIPTOR.fields_by_name
    names: Iterable[str] = kind._fields if hasattr(kind, "_fields") else kind.__dataclass_fields__  # type: ignore[attr-defined]
    return kind(**{name: getattr(message, name) for name in names if name in has})


# -- errors ---------------------------------------------------------------------------------------------------------------


_PLAIN_ERRORS: Final[dict[str, type[AtollError]]] = {
    each.code: each for each in (VolumeMissing, VolumeExists, SchemaTooNew, Fenced)
}


class _Coded(Protocol):
    errno: int
    code: str
    message: str


def put_failure(error: AtollError, into: pb.Failure) -> None:
    """Write an error."""
    into.errno, into.code, into.message = error.errno, error.code, error.message


def error_of(failure: _Coded) -> AtollError:
    """Read an error: those of POSIX as they were, all else as a StoreError with its text."""
    detail = failure.message.partition(": ")[2]
    if failure.code == FsError.code:
        return FsError(failure.errno, detail)
    if failure.code == OutOfSpace.code:
        return OutOfSpace(failure.errno, detail)
    known = _PLAIN_ERRORS.get(failure.code, StoreError)
    return known(failure.message, errno=failure.errno)
