"""MetaAdmin over the wire, a connection for each call: what each operation is as a message.

Owns the mapping, and repeating a call that a service which was away did not get. A call that may have been applied is not
repeated where that would matter (restoring from the trash, cloning): who asked gets the error and looks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final

from chunkstore.geometry import SliceId
from client.meta.endpoint import Endpoint, ServiceUnavailable
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.api.volume_format import dump_format, parse_format
from metasvc.model import (
    Caller,
    DumpPart,
    Garbage,
    Ino,
    Inode,
    MetaStatus,
    Problem,
    Quota,
    Session,
    Slice,
    SliceRef,
    StatFs,
    TenantUse,
    Trashed,
    TrashId,
    Usage,
    VolumeFormat,
    WrittenSlice,
)

_PAUSE_S: Final = 0.2
_ONCE: Final = frozenset({"trash_restore", "clone", "quota_remove_ino", "replace_refs"})


class RemoteAdmin:
    """Administration of one volume of a service: metasvc.api.admin.MetaAdmin.

    Errors as MetaAdmin's, and ServiceUnavailable when the service cannot be reached for ``timeout_s``.
    """

    def __init__(self, endpoint: Endpoint, volume: str, *, timeout_s: float) -> None:
        """``volume`` is TENANT/NAME."""
        self._endpoint = endpoint
        self._volume = volume
        self._timeout_s = timeout_s

    async def _ask(self, name: str, value: Any) -> pb.AdminReply:
        request = pb.AdminRequest(**{name: value}).SerializeToString()
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            try:
                answer = await self._endpoint.ask(pb.Opening.ADMINISTER, request, volume=self._volume)
            except ServiceUnavailable:
                if name in _ONCE or time.monotonic() > deadline_s:
                    raise
                await asyncio.sleep(_PAUSE_S)
                continue
            reply = pb.AdminReply.FromString(answer)
            if reply.HasField("failure"):
                raise wire.error_of(reply.failure)
            return reply

    async def status(self) -> MetaStatus:
        found = (await self._ask("status", pb.Nothing())).status
        return MetaStatus(
            format=parse_format(found.format.json),
            epoch=found.epoch,
            owner=found.owner,
            sessions=[wire.row_of(Session, each) for each in found.sessions],
            statfs=wire.row_of(StatFs, found.statfs),
            trash_bytes=found.trash_bytes,
            trash_inodes=found.trash_inodes,
            garbage_slices=found.garbage_slices,
            counters=dict(found.counters),
            tenant=wire.row_of(TenantUse, found.tenant) if found.HasField("tenant") else None,
        )

    async def resolve(self, path: Sequence[bytes]) -> Inode:
        (inode,) = wire.inodes_of((await self._ask("resolve", pb.AdminResolve(path=path))).inodes)
        return inode

    async def paths_of(self, ino: Ino, *, limit: int = 16) -> list[bytes]:
        return list((await self._ask("paths_of", pb.PathsOf(ino=ino, limit=limit))).paths)

    async def usage(self, ino: Ino) -> Usage:
        return wire.row_of(Usage, (await self._ask("usage_of_ino", ino)).usage)

    async def configure(
        self, *, capacity_bytes: int | None, max_inodes: int | None, trash_days: float | None
    ) -> VolumeFormat:
        asked = pb.Configure(capacity_bytes=capacity_bytes, max_inodes=max_inodes, trash_days=trash_days)
        return parse_format((await self._ask("configure", asked)).format.json)

    async def quota_set(self, ino: Ino, *, max_bytes: int | None, max_inodes: int | None) -> Quota:
        asked = pb.SetQuota(ino=ino, max_bytes=max_bytes, max_inodes=max_inodes)
        (quota,) = (await self._ask("quota_set", asked)).quotas
        return wire.row_of(Quota, quota)

    async def quota_remove(self, ino: Ino) -> None:
        await self._ask("quota_remove_ino", ino)

    async def quotas(self) -> list[Quota]:
        return [wire.row_of(Quota, each) for each in (await self._ask("quotas", pb.Nothing())).quotas]

    async def trash_list(self, *, after: TrashId | None, limit: int) -> list[Trashed]:
        found = await self._ask("trash_list", pb.TrashList(after=after, limit=limit))
        return [wire.row_of(Trashed, each) for each in found.trashed]

    async def trash_restore(self, caller: Caller, trash_id: TrashId) -> bytes:
        asked = pb.TrashRestore(caller=wire.caller_message(caller), trash_id=trash_id)
        (path,) = (await self._ask("trash_restore", asked)).paths
        return path

    async def trash_expire(self, *, before_ns: int, limit: int) -> int:
        return (await self._ask("trash_expire", pb.TrashExpire(before_ns=before_ns, limit=limit))).count

    async def clone(self, caller: Caller, source: Ino, parent: Ino, name: bytes) -> Usage:
        asked = pb.Clone(caller=wire.caller_message(caller), source=source, parent=parent, name=name)
        return wire.row_of(Usage, (await self._ask("clone", asked)).usage)

    async def check(self, *, repair: bool) -> AsyncIterator[Problem]:
        request = pb.CheckRequest(repair=repair).SerializeToString()
        async with aclosing(self._endpoint.answers(pb.Opening.CHECK, request, volume=self._volume)) as answers:
            async for data in answers:
                message = pb.Problem.FromString(data)
                if message.HasField("failure"):
                    raise wire.error_of(message.failure)
                yield wire.row_of(Problem, message)

    async def dump(self) -> AsyncGenerator[DumpPart, None]:
        request = pb.DumpRequest().SerializeToString()
        async with aclosing(self._endpoint.answers(pb.Opening.DUMP, request, volume=self._volume)) as answers:
            async for data in answers:
                message = pb.DumpPart.FromString(data)
                if message.HasField("failure"):
                    raise wire.error_of(message.failure)
                yield wire.row_of(DumpPart, message)

    # -- for the jobs that touch objects ------------------------------------------------------------------------------

    async def live_slices(self, *, after: SliceId | None, limit: int) -> list[Slice]:
        found = await self._ask("live_slices", pb.LiveSlices(after=after, limit=limit))
        return [wire.row_of(Slice, each) for each in found.slices]

    async def slice_owner(self, slice_id: SliceId) -> Sequence[tuple[Ino, SliceRef]]:
        found = await self._ask("slice_owner_id", slice_id)
        return [(Ino(each.ino), wire.row_of(SliceRef, each)) for each in found.owners]

    async def garbage(self, *, before_ns: int, limit: int) -> list[Garbage]:
        found = await self._ask("garbage", pb.GarbageList(before_ns=before_ns, limit=limit))
        return [wire.row_of(Garbage, each) for each in found.garbage]

    async def garbage_deleted(self, slice_ids: Sequence[SliceId]) -> None:
        await self._ask("garbage_deleted", pb.SliceIds(slice_ids=slice_ids))

    async def is_live(self, slice_id: SliceId) -> bool:
        return (await self._ask("is_live_id", slice_id)).flag

    async def is_pending(self, slice_id: SliceId) -> bool:
        return (await self._ask("is_pending_id", slice_id)).flag

    async def is_garbage(self, slice_id: SliceId) -> bool:
        return (await self._ask("is_garbage_id", slice_id)).flag

    async def compaction_candidates(self, *, limit: int) -> list[tuple[Ino, int]]:
        found = await self._ask("compaction_candidates_limit", limit)
        return [(Ino(each.ino), each.chunk) for each in found.chunks]

    async def replace_refs(
        self, ino: Ino, chunk: int, *, expected: Sequence[SliceRef], written: Sequence[WrittenSlice]
    ) -> bool:
        asked = pb.ReplaceRefs(
            ino=ino,
            chunk=chunk,
            expected=wire.pack_file_refs(expected),
            written=map(wire.written_message, written),
        )
        return (await self._ask("replace_refs", asked)).flag

    async def statfs(self, ino: Ino) -> StatFs:
        return wire.row_of(StatFs, (await self._ask("statfs_ino", ino)).statfs)


async def create_volume(
    endpoint: Endpoint, volume_format: VolumeFormat, *, uid: int, gid: int, mode: int
) -> VolumeFormat:
    """Make a volume of a service, and its tenant if it lacks. VolumeExists; ServiceUnavailable."""
    request = pb.CreateVolumeRequest(
        format=pb.VolumeFormat(json=dump_format(volume_format)), uid=uid, gid=gid, mode=mode
    )
    data = await endpoint.ask(pb.Opening.CREATE_VOLUME, request.SerializeToString())
    return parse_format(pb.VolumeFormat.FromString(data).json)


async def list_volumes(endpoint: Endpoint, *, tenant: str = "") -> list[VolumeFormat]:
    """Return the formats of the volumes of a tenant, or of all."""
    data = await endpoint.ask(pb.Opening.LIST_VOLUMES, pb.ListVolumesRequest(tenant=tenant).SerializeToString())
    return [parse_format(each.json) for each in pb.ListVolumesReply.FromString(data).formats]
