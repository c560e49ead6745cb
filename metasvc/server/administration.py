"""What an administrator asks, as a call of MetaAdmin, and its result as a message.

Owns the mapping, and which operation needs which rights (metasvc.server.rights); what the operations do is said in
metasvc/api/admin.py. Errors of an operation, and the refusal of those who may not ask for it, are part of its answer.
"""

from __future__ import annotations

import errno as E
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from enum import Enum
from typing import Any, Final

from chunkstore.errors import AtollError
from chunkstore.geometry import CHUNK_BYTES, MAX_FILE_BYTES, SliceId
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.api.admin import MetaAdmin
from metasvc.api.volume_format import dump_format
from metasvc.errors import FsError
from metasvc.model import Ino, TrashId
from metasvc.server.audit import audited
from metasvc.server.operations import check_written
from metasvc.server.rights import Rights

_MAX_ROWS: Final = 5000
_INT64: Final = 1 << 63


def _ino(number: int) -> Ino:
    if not 0 < number < _INT64:
        raise FsError(E.ENOENT, "no inode has that number")
    return Ino(number)


def _slice_id(number: int) -> SliceId:
    if not 0 < number < _INT64:
        raise FsError(E.EINVAL, "no slice has that id")
    return SliceId(number)


def _limit(number: int) -> int:
    return max(1, min(number, _MAX_ROWS))


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


async def _status(admin: MetaAdmin, _: Any) -> pb.AdminReply:
    found = await admin.status()
    status = pb.Status(
        format=pb.VolumeFormat(json=dump_format(found.format)),
        epoch=found.epoch,
        owner=found.owner,
        trash_bytes=found.trash_bytes,
        trash_inodes=found.trash_inodes,
        garbage_slices=found.garbage_slices,
        counters=found.counters,
    )
    wire.put_row(found.statfs, status.statfs)
    for session in found.sessions:
        wire.put_row(session, status.sessions.add())
    return pb.AdminReply(status=status)


async def _resolve(admin: MetaAdmin, asked: pb.AdminResolve) -> pb.AdminReply:
    reply = pb.AdminReply()
    wire.put_inodes([await admin.resolve(list(asked.path))], reply.inodes)
    return reply


async def _paths_of(admin: MetaAdmin, asked: pb.PathsOf) -> pb.AdminReply:
    return pb.AdminReply(paths=await admin.paths_of(_ino(asked.ino), limit=_limit(asked.limit)))


async def _usage(admin: MetaAdmin, ino: int) -> pb.AdminReply:
    reply = pb.AdminReply()
    wire.put_row(await admin.usage(_ino(ino)), reply.usage)
    return reply


async def _configure(admin: MetaAdmin, asked: pb.Configure) -> pb.AdminReply:
    found = await admin.configure(
        capacity_bytes=_optional(asked, "capacity_bytes"),
        max_inodes=_optional(asked, "max_inodes"),
        trash_days=_optional(asked, "trash_days"),
    )
    return pb.AdminReply(format=pb.VolumeFormat(json=dump_format(found)))


async def _quota_set(admin: MetaAdmin, asked: pb.SetQuota) -> pb.AdminReply:
    reply = pb.AdminReply()
    found = await admin.quota_set(
        _ino(asked.ino), max_bytes=_optional(asked, "max_bytes"), max_inodes=_optional(asked, "max_inodes")
    )
    wire.put_row(found, reply.quotas.add())
    return reply


async def _quota_remove(admin: MetaAdmin, ino: int) -> pb.AdminReply:
    await admin.quota_remove(_ino(ino))
    return pb.AdminReply()


async def _quotas(admin: MetaAdmin, _: Any) -> pb.AdminReply:
    reply = pb.AdminReply()
    for quota in await admin.quotas():
        wire.put_row(quota, reply.quotas.add())
    return reply


async def _trash_list(admin: MetaAdmin, asked: pb.TrashList) -> pb.AdminReply:
    reply = pb.AdminReply()
    after = TrashId(asked.after) if asked.HasField("after") else None
    for row in await admin.trash_list(after=after, limit=_limit(asked.limit)):
        wire.put_row(row, reply.trashed.add())
    return reply


async def _trash_restore(admin: MetaAdmin, asked: pb.TrashRestore) -> pb.AdminReply:
    path = await admin.trash_restore(wire.caller_of(asked.caller, 0), TrashId(asked.trash_id))
    return pb.AdminReply(paths=[path])


async def _trash_expire(admin: MetaAdmin, asked: pb.TrashExpire) -> pb.AdminReply:
    return pb.AdminReply(count=await admin.trash_expire(before_ns=asked.before_ns, limit=_limit(asked.limit)))


async def _clone(admin: MetaAdmin, asked: pb.Clone) -> pb.AdminReply:
    reply = pb.AdminReply()
    found = await admin.clone(wire.caller_of(asked.caller, 0), _ino(asked.source), _ino(asked.parent), asked.name)
    wire.put_row(found, reply.usage)
    return reply


async def _live_slices(admin: MetaAdmin, asked: pb.LiveSlices) -> pb.AdminReply:
    reply = pb.AdminReply()
    after = SliceId(asked.after) if asked.HasField("after") else None
    for row in await admin.live_slices(after=after, limit=_limit(asked.limit)):
        wire.put_row(row, reply.slices.add())
    return reply


async def _slice_owner(admin: MetaAdmin, slice_id: int) -> pb.AdminReply:
    reply = pb.AdminReply()
    for ino, ref in await admin.slice_owner(SliceId(slice_id)):
        owner = reply.owners.add(ino=ino)
        wire.put_row(ref, owner)
    return reply


async def _garbage(admin: MetaAdmin, asked: pb.GarbageList) -> pb.AdminReply:
    reply = pb.AdminReply()
    for row in await admin.garbage(before_ns=asked.before_ns, limit=_limit(asked.limit)):
        wire.put_row(row, reply.garbage.add())
    return reply


async def _garbage_deleted(admin: MetaAdmin, asked: pb.SliceIds) -> pb.AdminReply:
    await admin.garbage_deleted([_slice_id(number) for number in asked.slice_ids])
    return pb.AdminReply()


async def _is_pending(admin: MetaAdmin, slice_id: int) -> pb.AdminReply:
    return pb.AdminReply(flag=await admin.is_pending(SliceId(slice_id)))


async def _is_garbage(admin: MetaAdmin, slice_id: int) -> pb.AdminReply:
    return pb.AdminReply(flag=await admin.is_garbage(_slice_id(slice_id)))


async def _is_live(admin: MetaAdmin, slice_id: int) -> pb.AdminReply:
    return pb.AdminReply(flag=await admin.is_live(_slice_id(slice_id)))


async def _compaction_candidates(admin: MetaAdmin, limit: int) -> pb.AdminReply:
    reply = pb.AdminReply()
    for ino, chunk in await admin.compaction_candidates(limit=_limit(limit)):
        reply.chunks.add(ino=ino, chunk=chunk)
    return reply


async def _replace_refs(admin: MetaAdmin, asked: pb.ReplaceRefs) -> pb.AdminReply:
    try:
        written = [wire.written_of(each) for each in asked.written]
    except ValueError as error:
        raise FsError(E.EINVAL, f"a slice of an unknown kind: {error}") from error
    check_written(written, (await admin.status()).format)
    if asked.chunk > MAX_FILE_BYTES // CHUNK_BYTES:
        raise FsError(E.EINVAL, "no file has that chunk")
    expected = wire.unpack_file_refs(asked.expected)
    done = await admin.replace_refs(_ino(asked.ino), asked.chunk, expected=expected, written=written)
    return pb.AdminReply(flag=done)


async def _statfs(admin: MetaAdmin, ino: int) -> pb.AdminReply:
    reply = pb.AdminReply()
    wire.put_row(await admin.statfs(_ino(ino)), reply.statfs)
    return reply


class _Right(Enum):
    """What somebody needs who asks for an operation."""

    ANY = 1
    """A token for the volume, or for a directory of it."""
    READ_ALL = 2
    """Reaches the whole volume."""
    WRITE_ALL = 3
    ADMIN = 4


_Operation = Callable[[MetaAdmin, Any], Awaitable[pb.AdminReply]]

_OPERATIONS: Final[dict[str, tuple[_Operation, _Right]]] = {
    "status": (_status, _Right.ANY),
    "resolve": (_resolve, _Right.READ_ALL),
    "paths_of": (_paths_of, _Right.READ_ALL),
    "usage_of_ino": (_usage, _Right.READ_ALL),
    "configure": (_configure, _Right.ADMIN),
    "quota_set": (_quota_set, _Right.ADMIN),
    "quota_remove_ino": (_quota_remove, _Right.ADMIN),
    "quotas": (_quotas, _Right.READ_ALL),
    "trash_list": (_trash_list, _Right.READ_ALL),
    "trash_restore": (_trash_restore, _Right.WRITE_ALL),
    "trash_expire": (_trash_expire, _Right.ADMIN),
    "clone": (_clone, _Right.WRITE_ALL),
    "live_slices": (_live_slices, _Right.READ_ALL),
    "slice_owner_id": (_slice_owner, _Right.READ_ALL),
    "garbage": (_garbage, _Right.READ_ALL),
    "garbage_deleted": (_garbage_deleted, _Right.ADMIN),
    # Of slices that a mount finds on its disk after a crash: numbers, and nothing of anybody's files.
    "is_pending_id": (_is_pending, _Right.ANY),
    "is_live_id": (_is_live, _Right.ANY),
    "is_garbage_id": (_is_garbage, _Right.READ_ALL),
    "compaction_candidates_limit": (_compaction_candidates, _Right.READ_ALL),
    "replace_refs": (_replace_refs, _Right.ADMIN),
    "statfs_ino": (_statfs, _Right.READ_ALL),
}
"""By the name of the field in AdminRequest."""


async def administer(
    admin: MetaAdmin, request: pb.AdminRequest, rights: Rights, *, peer: str, volume: str
) -> pb.AdminReply:
    """Run one operation on a volume (TENANT/NAME), for who has such rights."""
    name = request.WhichOneof("operation")
    try:
        if name is None or name not in _OPERATIONS:
            raise FsError(E.ENOSYS, "this service does not know the operation: upgrade it")
        operation, right = _OPERATIONS[name]
        asked = getattr(request, name)
        what = name.removesuffix("_ino").removesuffix("_id").removesuffix("_limit").replace("_", " ")
        if right is not _Right.ADMIN:
            _require(rights, right, what)
            reply = await operation(admin, asked)
            if rights.is_confined:
                _confine(reply)
            return reply
        with audited(rights, peer, what, volume):
            rights.require_admin(what, tenant=volume.partition("/")[0])
            return await operation(admin, asked)
    except AtollError as error:
        reply = pb.AdminReply()
        wire.put_failure(error, reply.failure)
        return reply


def _confine(reply: pb.AdminReply) -> None:
    """Take out of a reply what is of the whole volume, for a token of a part of it."""
    for field in ("sessions", "trash_bytes", "trash_inodes", "garbage_slices", "counters"):
        reply.status.ClearField(field)


def _require(rights: Rights, right: _Right, what: str) -> None:
    if right is not _Right.ANY:
        rights.require_whole(f"the rest, which `{what}` is about")
    if right is _Right.WRITE_ALL:
        rights.require_writing(what)


async def problems(admin: MetaAdmin, request: pb.CheckRequest) -> AsyncIterator[pb.Problem]:
    """Check a volume; the last message is a failure if the check did not come to its end."""
    try:
        async for problem in admin.check(repair=request.repair):
            message = pb.Problem()
            wire.put_row(problem, message)
            yield message
    except AtollError as error:
        message = pb.Problem()
        wire.put_failure(error, message.failure)
        yield message


async def dump_parts(admin: MetaAdmin) -> AsyncGenerator[pb.DumpPart, None]:
    """Dump a volume; the last message is a failure if the dump did not come to its end. Close it (aclosing)."""
    try:
        async with aclosing(admin.dump()) as parts:
            async for part in parts:
                yield pb.DumpPart(data=part.data, rows=part.rows, table=part.table)
    except AtollError as error:
        message = pb.DumpPart()
        wire.put_failure(error, message.failure)
        yield message
