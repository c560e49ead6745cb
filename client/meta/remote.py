"""MetaClient over a SessionConnection: what each operation is as a message.

Owns the mapping only; what the operations do is said in metasvc/api.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any, Final

from client.meta.connection import SessionConnection
from client.meta.names import KnownNames
from client.meta.recent import MAX_PAGE, Recent, just_before
from client.meta.walking import Walk
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire
from metasvc.errors import FsError
from metasvc.model import (
    Caller,
    Commit,
    DirPage,
    FileMap,
    Ino,
    Inode,
    OpenFile,
    RenameFlags,
    SessionId,
    SetAttr,
    StatFs,
    VolumeFormat,
)

_INODES_AT_ONCE: Final = 5000


class RemoteMeta:
    """A session with a metadata service: metasvc.api.MetaClient.

    Errors as MetaClient's, and: ServiceUnavailable (EIO) when the service was away for too long, FsError ESTALE for what was
    under way when the service had ended the session.
    """

    def __init__(self, connection: SessionConnection, *, remembers: bool = False) -> None:
        """Take an open connection. ``remembers``: a kernel is asking, so what it may believe may be answered from `Recent`."""
        self._connection = connection
        self._call = connection.call
        self._recent = Recent()
        self._remembers = remembers
        self._names = KnownNames()
        connection.recalled = self._recalled
        self._walk = Walk(lambda ino, limit: self._page(ino, after=None, limit=limit), lambda: self._recent.changes)

    @property
    def format(self) -> VolumeFormat:
        return self._connection.format

    @property
    def session_id(self) -> SessionId:
        return self._connection.session_id

    def _recalled(self, ino: Ino | None) -> None:
        if ino is None:
            self._names.clear()
        else:
            self._names.recalled(ino)

    async def _change_names(
        self, name: str, message: Any, *, adds: bytes | None = None, to: Sequence[Ino] = (), moves: bool = False
    ) -> pb.Reply:
        """Call an operation that changes the directories ``to``, and ``adds`` a name to the last of them."""
        names = self._names
        asked = names.asked()
        if adds is not None:
            names.adding(to[-1], adds)
        reply = await self._change(name, message, moves=moves)
        inodes = reply.inodes.ino
        made = Ino(inodes[0]) if name == "mknod" and inodes else None
        names.told(asked, reply.leased, lease_s=self._connection.lease_s, changed=to, made=made)
        return reply

    async def _change(self, name: str, message: Any, *, ino: Ino | None = None, moves: bool = False) -> pb.Reply:
        """Call an operation that changes something; then nothing is known of what it may have changed but what it told.

        ``ino`` is what it changes by number. ``moves``: a directory that is remembered may be gone by it, or moved.
        """
        try:
            reply = await self._call(name, message)
        except BaseException:
            # It may have been applied, and is told to nobody.
            self._recent.clear()
            raise
        if moves:
            self._recent.clear()
        elif ino is not None:
            self._recent.forget(ino)
        self._recent.changed(wire.inodes_of(reply.directories))
        return reply

    # -- names --------------------------------------------------------------------------------------------------------

    async def lookup(self, parent: Ino, name: bytes) -> Inode:
        if not self._remembers:
            return wire.inode_of(await self._call("lookup", pb.Lookup(parent=parent, name=name)))
        recent = self._recent
        if self._names.is_absent(parent, name):
            recent.absent(parent)
            raise FsError(errno.ENOENT)
        known = recent.name(parent, name)
        if known is not None:
            return known
        count = recent.wanted(parent)
        if count:
            asked_at = recent.changes
            page = await self._page(parent, after=just_before(name) if count < MAX_PAGE else None, limit=count)
            recent.page(parent, page, asked=count, asked_at=asked_at)
            for entry in page.entries:
                if entry.name == name:
                    return entry.inode
        try:
            return wire.inode_of(await self._call("lookup", pb.Lookup(parent=parent, name=name)))
        except FsError:
            recent.absent(parent)
            raise

    async def resolve(self, start: Ino, path: Sequence[bytes]) -> list[Inode]:
        return wire.inodes_of((await self._call("resolve", pb.Resolve(start=start, path=path))).inodes)

    async def getattr(self, ino: Ino) -> Inode:
        known = self._recent.directory(ino) if self._remembers else None
        if known is not None:
            return known
        return wire.inode_of(await self._call("getattr", pb.GetAttr(inos=[ino], one=True)))

    async def getattr_many(self, inos: Sequence[Ino]) -> list[Inode | None]:
        found: dict[Ino, Inode] = {}
        for first in range(0, len(inos), _INODES_AT_ONCE):
            reply = await self._call("getattr", pb.GetAttr(inos=inos[first : first + _INODES_AT_ONCE]))
            found.update((inode.ino, inode) for inode in wire.inodes_of(reply.inodes))
        return [found.get(ino) for ino in inos]

    async def readdir(self, ino: Ino, *, after: bytes | None, limit: int) -> DirPage:
        if self._remembers and after is None:
            return await self._walk.first_page(ino, limit)
        return await self._page(ino, after=after, limit=limit)

    async def _page(self, ino: Ino, *, after: bytes | None, limit: int) -> DirPage:
        return wire.page_of(await self._call("readdir", pb.ReadDir(ino=ino, after=after, limit=limit)))

    async def mknod(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, rdev: int = 0) -> Inode:
        message = pb.MakeNode(caller=wire.caller_message(caller), parent=parent, name=name, mode=mode, rdev=rdev)
        return wire.inode_of(await self._change_names("mknod", message, adds=name, to=[parent]))

    async def mkdir(self, caller: Caller, parent: Ino, name: bytes, *, mode: int) -> Inode:
        return await self.mknod(caller, parent, name, mode=0o040000 | (mode & 0o7777))

    async def symlink(self, caller: Caller, parent: Ino, name: bytes, target: bytes) -> Inode:
        message = pb.Symlink(caller=wire.caller_message(caller), parent=parent, name=name, target=target)
        return wire.inode_of(await self._change_names("symlink", message, adds=name, to=[parent]))

    async def readlink(self, ino: Ino) -> bytes:
        return (await self._call("readlink", pb.ReadLink(ino=ino))).value

    async def link(self, caller: Caller, ino: Ino, parent: Ino, name: bytes) -> Inode:
        message = pb.Link(caller=wire.caller_message(caller), ino=ino, parent=parent, name=name)
        return wire.inode_of(await self._change_names("link", message, adds=name, to=[parent]))

    async def unlink(self, caller: Caller, parent: Ino, name: bytes) -> None:
        message = pb.Unlink(caller=wire.caller_message(caller), parent=parent, name=name)
        await self._change_names("unlink", message, to=[parent])

    async def rmdir(self, caller: Caller, parent: Ino, name: bytes) -> None:
        message = pb.RemoveDir(caller=wire.caller_message(caller), parent=parent, name=name)
        await self._change_names("rmdir", message, to=[parent], moves=True)

    async def rename(
        self, caller: Caller, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, *, flags: RenameFlags
    ) -> None:
        message = pb.Rename(
            caller=wire.caller_message(caller),
            parent=parent,
            name=name,
            new_parent=new_parent,
            new_name=new_name,
            flags=int(flags),
        )
        await self._change_names("rename", message, adds=new_name, to=[parent, new_parent], moves=True)

    # -- attributes ---------------------------------------------------------------------------------------------------

    async def setattr(self, caller: Caller, ino: Ino, changes: SetAttr) -> Inode:
        return wire.inode_of(await self._change("setattr", wire.set_attr_message(caller, ino, changes), ino=ino))

    async def getxattr(self, ino: Ino, name: bytes) -> bytes:
        return (await self._call("getxattr", pb.GetXattr(ino=ino, name=name))).value

    async def listxattr(self, ino: Ino) -> list[bytes]:
        return list((await self._call("listxattr", pb.ListXattr(ino=ino))).names)

    async def setxattr(self, caller: Caller, ino: Ino, name: bytes, value: bytes, *, flags: int) -> None:
        message = pb.SetXattr(caller=wire.caller_message(caller), ino=ino, name=name, value=value, flags=flags)
        await self._change("setxattr", message, ino=ino)

    async def removexattr(self, caller: Caller, ino: Ino, name: bytes) -> None:
        message = pb.RemoveXattr(caller=wire.caller_message(caller), ino=ino, name=name)
        await self._change("removexattr", message, ino=ino)

    async def statfs(self, ino: Ino) -> StatFs:
        return wire.statfs_of(await self._call("statfs", pb.StatFs(ino=ino)))

    # -- content ------------------------------------------------------------------------------------------------------

    async def open(self, ino: Ino) -> OpenFile:
        try:
            return wire.open_of(await self._call("open", pb.Open(ino=ino)))
        except FsError:
            # The name that led here is old: a kernel looks it up again.
            self._recent.clear()
            raise

    async def create(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, exclusive: bool) -> OpenFile:
        message = pb.Create(
            caller=wire.caller_message(caller), parent=parent, name=name, mode=mode, exclusive=exclusive
        )
        return wire.open_of(await self._change_names("create", message, adds=name, to=[parent]))

    async def release(self, ino: Ino) -> None:
        self._connection.release(ino)

    async def read_map(self, ino: Ino, *, start: int, end: int) -> FileMap:
        return wire.map_of((await self._call("read_map", pb.ReadMap(ino=ino, start=start, end=end))).map)

    async def read_maps(self, inos: Sequence[Ino]) -> dict[Ino, FileMap]:
        reply = await self._call("read_maps", pb.ReadMaps(inos=inos))
        return {Ino(each.ino): wire.map_of(each.map) for each in reply.maps}

    async def allocate_slices(self, count: int) -> range:
        reply = await self._call("allocate_slices", pb.AllocateSlices(count=count))
        return range(reply.first, reply.first + reply.count)

    async def reserve(self, ino: Ino, *, end: int) -> int:
        return (await self._call("reserve", pb.Reserve(ino=ino, end=end))).count

    async def commit(self, caller: Caller, ino: Ino, commit: Commit) -> Inode:
        return wire.inode_of(await self._change("commit", wire.commit_message(caller, ino, commit)))

    async def punch(self, caller: Caller, ino: Ino, *, start: int, end: int) -> OpenFile:
        message = pb.Punch(caller=wire.caller_message(caller), ino=ino, start=start, end=end)
        return wire.open_of(await self._change("punch", message))

    async def copy_range(
        self, caller: Caller, source: Ino, start: int, target: Ino, target_start: int, length: int
    ) -> tuple[int, OpenFile]:
        message = pb.CopyRange(
            caller=wire.caller_message(caller),
            source=source,
            start=start,
            target=target,
            target_start=target_start,
            length=length,
        )
        reply = await self._change("copy_range", message)
        return reply.count, wire.open_of(reply)
