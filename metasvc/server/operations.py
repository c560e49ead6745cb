"""What a request asks for, as a call of the session, and its result as a reply.

Owns the table of operations, and the check of what comes from outside: the engine was written for callers in its process,
where a kernel has looked at names before and numbers are what they say. Must not know connections.
"""

from __future__ import annotations

import errno as E
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from chunkstore.geometry import MAX_FILE_BYTES, block_count
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.engine.session import EngineSession
from metasvc.errors import FsError
from metasvc.model import (
    PATH_MAX_BYTES,
    READ_MAPS_MAX,
    Caller,
    Commit,
    FileMap,
    Ino,
    OpenFile,
    RenameFlags,
    SetAttr,
    SliceKind,
    VolumeFormat,
    WrittenSlice,
)
from metasvc.server import signing
from metasvc.server.confined import ConfinedMaps

MAX_ENTRIES: Final = 5000
"""Most inodes of one getattr."""
MAX_PAGE_ENTRIES: Final = 1024
"""Most entries of a page of a directory, which is what mounts ask for: 8 ms in which others wait."""
MAX_REFS: Final = 16_384
"""Most pieces of one commit: twice what a mount collects (slice_max_refs times pending_slices). 0.2 s of the event loop."""
MAX_SLICE_IDS: Final = 65_536
_DIGEST_BYTES: Final = 16
_INT64: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class Operation:
    """One kind of request."""

    call: Callable[[EngineSession, Any, Caller], Awaitable[Any]]
    """Takes the session, the message of the operation and who asks."""
    put: Callable[[Any, pb.Reply], None]
    """Writes the result into a reply."""
    keep: Callable[[Any, pb.Reply], None] | None = None
    """Writes what is kept of it for a client that asks again, if that is less."""
    directories: tuple[str, ...] = ()
    """The fields of the message that name directories which it changes: the reply tells what became of them."""
    inos: tuple[str, ...] = ()
    """The fields of the message that name inodes, those of `directories` included: whoever is confined must reach them all."""
    may_miss: bool = False
    """Its inodes are many, and those that do not exist are left out: so are those that are out of reach."""
    finds: bool = False
    """It answers inodes that it found by names: they must be within reach, too."""
    has_steps: bool = False
    """It is not one step of the engine: what it names must be within reach before it and behind it."""
    changes: bool = False
    """Only for those who may write."""
    is_long: bool = False
    """Its answer may be as long as a page of a directory."""
    confine: Callable[[ConfinedMaps, Any], Awaitable[Any]] | None = None
    """What is left of the result for whoever is confined: of all results with maps."""


def _refuse(reason: str) -> FsError:
    return FsError(E.EINVAL, reason)


def _ino(number: int) -> Ino:
    if not 0 < number < _INT64:
        raise FsError(E.ENOENT, "no inode has that number")
    return Ino(number)


def _range(start: int, end: int) -> tuple[int, int]:
    if not 0 <= start <= end <= MAX_FILE_BYTES:
        raise _refuse("that is no range of a file")
    return start, end


def _commit(session: EngineSession, message: pb.Commit) -> Commit:
    try:
        commit = wire.commit_of(message)
    except ValueError as error:
        raise _refuse(f"a slice of an unknown kind: {error}") from error
    if not 0 <= commit.end <= MAX_FILE_BYTES or (commit.mtime_ns is not None and not _fits(commit.mtime_ns)):
        raise _refuse("an end or time that no file has")
    if len({written.slice_id for written in commit.slices}) != len(commit.slices):
        raise _refuse("a slice is named twice")
    if sum(len(written.refs) for written in commit.slices) > MAX_REFS:
        raise _refuse(f"a commit of more than {MAX_REFS} pieces")
    check_written(commit.slices, session.format)
    return commit


def check_written(slices: Sequence[WrittenSlice], volume_format: VolumeFormat) -> None:
    """Refuse slices that cannot be. EINVAL."""
    for written in slices:
        if not 0 < written.slice_id < _INT64:
            raise _refuse("no slice has that id")
        if len(written.data) != _data_bytes(written.length, written.kind, volume_format):
            raise _refuse(f"slice {written.slice_id}: its bytes, or digests, do not fit its length")
        for ref in written.refs:
            if (
                ref.slice_id != written.slice_id
                or not ref.length
                or ref.slice_offset + ref.length > written.length
                or ref.end > MAX_FILE_BYTES
            ):
                raise _refuse(f"slice {written.slice_id}: a piece that it does not have")


def _data_bytes(length: int, kind: SliceKind, volume_format: VolumeFormat) -> int:
    """Return how many bytes come with a slice of a length."""
    if not length or (kind is SliceKind.INLINE and length > volume_format.inline_limit_bytes):
        raise _refuse("a slice of a length that it cannot have")
    return length if kind is SliceKind.INLINE else block_count(length, volume_format.block_bytes) * _DIGEST_BYTES


def _fits(time_ns: int) -> bool:
    return -_INT64 <= time_ns < _INT64


def _changes(message: pb.SetAttr) -> SetAttr:
    changes = wire.set_attr_of(message)
    if changes.mode is not None and changes.mode & ~0o7777:
        raise _refuse("a mode with more than permission bits")
    return changes


def _nothing(_: Any, into: pb.Reply) -> None:
    """Write the result of what answers nothing."""


def _put_inode(inode: Any, into: pb.Reply) -> None:
    wire.put_inodes([inode], into.inodes)


def _put_inodes(inodes: Any, into: pb.Reply) -> None:
    wire.put_inodes([inode for inode in inodes if inode is not None], into.inodes)


def _put_leased(leased: Any, into: pb.Reply) -> None:
    into.leased.extend(leased)


def _put_leased_page(found: Any, into: pb.Reply) -> None:
    wire.put_page(found[0], into)
    _put_leased(found[1], into)


def _put_value(value: bytes, into: pb.Reply) -> None:
    into.value = value


def _put_names(names: list[bytes], into: pb.Reply) -> None:
    into.names.extend(names)


def _put_count(count: int, into: pb.Reply) -> None:
    into.count = count


def _put_ids(ids: range, into: pb.Reply) -> None:
    into.first, into.count = ids.start, len(ids)


def _put_map(found: Any, into: pb.Reply) -> None:
    wire.put_map(found, into.map)


def _put_maps(found: Any, into: pb.Reply) -> None:
    for ino, each in found.items():
        wire.put_map(each, into.maps.add(ino=ino).map)


def _put_without_map(answer: OpenFile, into: pb.Reply) -> None:
    """Write an open file whose map the client has to read: it may be megabytes, and all kept replies are one row."""
    nothing = FileMap(answer.map.map_version, [], {}, 0, 0)
    wire.put_open(answer._replace(map=nothing), into)


def _put_copied_without_map(result: Any, into: pb.Reply) -> None:
    into.count = result[0]
    _put_without_map(result[1], into)


def _put_copied(result: Any, into: pb.Reply) -> None:
    into.count = result[0]
    wire.put_open(result[1], into)


def _put_statfs(found: Any, into: pb.Reply) -> None:
    into.statfs.total_bytes, into.statfs.used_bytes = found.total_bytes, found.used_bytes
    into.statfs.total_inodes, into.statfs.used_inodes = found.total_inodes, found.used_inodes


def _put_opened(answer: Any, into: pb.Reply) -> None:
    wire.put_open(answer, into)
    into.opens = True


async def _resolve(session: EngineSession, message: pb.Resolve, _: Caller) -> Any:
    if len(message.path) > PATH_MAX_BYTES:
        raise FsError(E.ENAMETOOLONG)
    return await session.resolve(_ino(message.start), list(message.path))


async def _getattr(session: EngineSession, message: pb.GetAttr, _: Caller) -> Any:
    if len(message.inos) > MAX_ENTRIES:
        raise _refuse(f"more than {MAX_ENTRIES} inodes at once")
    if message.one:
        return [await session.getattr(_ino(message.inos[0] if message.inos else 0))]
    return await session.getattr_many([_ino(number) for number in message.inos])


async def _allocate(session: EngineSession, message: pb.AllocateSlices, _: Caller) -> range:
    if not 0 < message.count <= MAX_SLICE_IDS:
        raise _refuse(f"slice ids are given out 1 to {MAX_SLICE_IDS} at a time")
    return await session.allocate_slices(message.count)


async def _reserve(session: EngineSession, message: pb.Reserve, _: Caller) -> int:
    if message.end < 0:
        raise _refuse("no file ends there")
    return await session.reserve(_ino(message.ino), end=message.end)


async def _punch(session: EngineSession, message: pb.Punch, caller: Caller) -> Any:
    start, end = _range(message.start, message.end)
    return await session.punch(caller, _ino(message.ino), start=start, end=end)


async def _copy_range(session: EngineSession, message: pb.CopyRange, caller: Caller) -> Any:
    _range(message.start, message.start + message.length)
    _range(message.target_start, message.target_start + message.length)
    return await session.copy_range(
        caller, _ino(message.source), message.start, _ino(message.target), message.target_start, message.length
    )


async def _rename(session: EngineSession, message: pb.Rename, caller: Caller) -> None:
    if message.flags & ~(RenameFlags.NOREPLACE | RenameFlags.EXCHANGE):
        raise _refuse("unknown flags of rename")
    await session.rename(
        caller,
        _ino(message.parent),
        message.name,
        _ino(message.new_parent),
        message.new_name,
        flags=RenameFlags(message.flags),
    )


async def _mknod(session: EngineSession, message: pb.MakeNode, caller: Caller) -> Any:
    if message.mode >= 1 << 16 or message.rdev >= 1 << 32 or stat.S_ISLNK(message.mode):
        raise _refuse("a mode or device number that no file has")
    return await session.mknod(caller, _ino(message.parent), message.name, mode=message.mode, rdev=message.rdev)


async def _create(session: EngineSession, message: pb.Create, caller: Caller) -> Any:
    return await session.create(
        caller, _ino(message.parent), message.name, mode=message.mode & 0o7777, exclusive=message.exclusive
    )


async def _read_map(session: EngineSession, message: pb.ReadMap, _: Caller) -> Any:
    start, end = _range(message.start, min(message.end, MAX_FILE_BYTES))
    return await session.read_map(_ino(message.ino), start=start, end=end)


async def _read_maps(session: EngineSession, message: pb.ReadMaps, _: Caller) -> Any:
    if len(message.inos) > READ_MAPS_MAX:
        raise _refuse(f"more than {READ_MAPS_MAX} maps at once")
    return await session.read_maps([_ino(number) for number in message.inos])


async def _readdir(session: EngineSession, message: pb.ReadDir, _: Caller) -> Any:
    after = message.after if message.HasField("after") else None
    ino = _ino(message.ino)
    leased = session.lease([ino], give=True) if message.lease else []
    page = await session.readdir(ino, after=after, limit=max(1, min(message.limit, MAX_PAGE_ENTRIES)))
    return page, leased


async def _extend_leases(session: EngineSession, message: pb.ExtendLeases, _: Caller) -> Any:
    if len(message.inos) > MAX_ENTRIES:
        raise _refuse(f"more than {MAX_ENTRIES} leases at once")
    return session.lease([Ino(number) for number in message.inos], give=False)


_IN: Final = ("parent",)
_OF: Final = ("ino",)
_Call = Callable[[EngineSession, Any, Caller], Awaitable[Any]]


def _changes_in(
    call: _Call,
    put: Any,
    *,
    directories: tuple[str, ...] = _IN,
    inos: tuple[str, ...] = (),
    confine: Any = None,
) -> Operation:
    """Return an operation that changes directories."""
    named = (*directories, *inos)
    return Operation(call, put, directories=directories, inos=named, changes=True, confine=confine)


def _changes_of(
    call: _Call, put: Any, keep: Any = None, *, inos: tuple[str, ...] = _OF, confine: Any = None
) -> Operation:
    """Return an operation that changes inodes."""
    return Operation(call, put, keep, inos=inos, changes=True, confine=confine)


OPERATIONS: Final[dict[str, Operation]] = {
    "lookup": Operation(lambda s, m, c: s.lookup(_ino(m.parent), m.name), _put_inode, inos=_IN, finds=True),
    "resolve": Operation(_resolve, _put_inodes, inos=("start",), finds=True),
    "getattr": Operation(_getattr, _put_inodes, inos=("inos",), may_miss=True),
    "readdir": Operation(_readdir, _put_leased_page, inos=_OF, has_steps=True, is_long=True),
    "extend_leases": Operation(_extend_leases, _put_leased, inos=("inos",), may_miss=True, has_steps=True),
    "mknod": _changes_in(_mknod, _put_inode),
    "symlink": _changes_in(lambda s, m, c: s.symlink(c, _ino(m.parent), m.name, m.target), _put_inode),
    "readlink": Operation(lambda s, m, c: s.readlink(_ino(m.ino)), _put_value, inos=_OF),
    "link": _changes_in(lambda s, m, c: s.link(c, _ino(m.ino), _ino(m.parent), m.name), _put_inode, inos=_OF),
    "unlink": _changes_in(lambda s, m, c: s.unlink(c, _ino(m.parent), m.name), _nothing),
    "rmdir": _changes_in(lambda s, m, c: s.rmdir(c, _ino(m.parent), m.name), _nothing),
    "rename": _changes_in(_rename, _nothing, directories=("parent", "new_parent")),
    "setattr": _changes_of(lambda s, m, c: s.setattr(c, _ino(m.ino), _changes(m)), _put_inode),
    "getxattr": Operation(lambda s, m, c: s.getxattr(_ino(m.ino), m.name), _put_value, inos=_OF),
    "listxattr": Operation(lambda s, m, c: s.listxattr(_ino(m.ino)), _put_names, inos=_OF),
    "setxattr": _changes_of(lambda s, m, c: s.setxattr(c, _ino(m.ino), m.name, m.value, flags=m.flags), _nothing),
    "removexattr": _changes_of(lambda s, m, c: s.removexattr(c, _ino(m.ino), m.name), _nothing),
    "statfs": Operation(lambda s, m, c: s.statfs(_ino(m.ino)), _put_statfs, inos=_OF),
    "open": Operation(
        lambda s, m, c: s.open(_ino(m.ino), again=m.again), _put_opened, inos=_OF, confine=ConfinedMaps.of_open
    ),
    "create": _changes_in(_create, _put_opened, confine=ConfinedMaps.of_open),
    "release": Operation(lambda s, m, c: s.release(_ino(m.ino)), _nothing),
    "read_map": Operation(_read_map, _put_map, inos=_OF, confine=ConfinedMaps.of_map),
    "read_maps": Operation(
        _read_maps, _put_maps, inos=("inos",), may_miss=True, confine=ConfinedMaps.of_maps, is_long=True
    ),
    "allocate_slices": _changes_of(_allocate, _put_ids, inos=()),
    "reserve": _changes_of(_reserve, _put_count),
    "commit": _changes_of(lambda s, m, c: s.commit(c, _ino(m.ino), _commit(s, m)), _put_inode),
    "punch": _changes_of(_punch, wire.put_open, _put_without_map, confine=ConfinedMaps.of_open),
    "copy_range": _changes_of(
        _copy_range,
        _put_copied,
        _put_copied_without_map,
        inos=("source", "target"),
        confine=ConfinedMaps.of_copied,
    ),
    "block_access": Operation(signing.block_access, signing.put_urls),
    "sign_get": Operation(signing.sign_get, signing.put_urls, inos=_OF, has_steps=True),
    "sign_own": Operation(signing.sign_own, signing.put_urls),
    # Changes no row; only for those who may write.
    "sign_put": Operation(signing.sign_put, signing.put_urls, changes=True),
}
"""By the name of the field in Request."""
