"""MetaClient over a SessionConnection: what each operation is as a message.

Owns the mapping only; what the operations do is said in metasvc/api.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, Final

from chunkstore.background import TaskSet
from chunkstore.errors import AtollError
from client.meta.connection import SessionConnection
from client.meta.leased import Leased
from client.meta.opens import LocalOpens
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
_REMOVING: Final = frozenset({"unlink", "rename"})
"""Operations by which a file may lose its last name."""


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
        self._leased = Leased()
        self._opens = LocalOpens(self._open_again, connection.release, connection.adopt)
        self._extending: dict[Ino, asyncio.Task[None]] = {}
        self._tasks = TaskSet()
        connection.recalled = self._recalled
        self._walk = Walk(lambda ino, limit: self._page(ino, after=None, limit=limit), lambda: self._recent.changes)

    @property
    def format(self) -> VolumeFormat:
        return self._connection.format

    @property
    def root(self) -> Ino:
        return self._connection.root

    @property
    def is_read_only(self) -> bool:
        return self._connection.is_read_only

    @property
    def opens_by_lease(self) -> int:
        """Return how many files were opened without asking."""
        return self._opens.total

    @property
    def session_id(self) -> SessionId:
        return self._connection.session_id

    # -- leases -------------------------------------------------------------------------------------------------------

    def _recalled(self, ino: Ino | None) -> Sequence[asyncio.Task[None]]:
        """Forget a directory, and tell the service what is open there; all of it before a new stream begins."""
        leased = self._leased
        if ino is None:
            leased.clear()
            self._opens.adopt_all()
            return ()
        concerned = [other for other in self._opens.local() if leased.directory_of(other) in (ino, None)]
        leased.recalled(ino)
        return self._opens.register(concerned)

    async def _hold(self, ino: Ino) -> None:
        """Extend the lease on a directory of which much is known, if it has run out; ahead of time without waiting."""
        left_s = self._leased.ends_s(ino)
        if left_s > self._connection.lease_s / 2 or not self._leased.is_worth_extending(ino):
            return
        task = self._extending.get(ino)
        if task is None:
            task = self._extending[ino] = self._tasks.start(
                self._extend(ino), name=f"lease on inode {ino}", raises=(AtollError,)
            )
        if not left_s:
            with suppress(AtollError):
                await asyncio.shield(task)

    async def _extend(self, ino: Ino) -> None:
        try:
            asked = self._leased.asked()
            reply = await self._call("extend_leases", pb.ExtendLeases(inos=[ino]))
            self._leased.extended(asked, reply.leased, [ino], lease_s=self._connection.lease_s)
        finally:
            del self._extending[ino]

    async def close(self) -> None:
        """Stop what goes on beside calls, and hold nothing any more. Before the connection is closed."""
        self._leased.clear()
        await self._opens.close()
        await self._tasks.close()

    async def _register_opens(self, parents: Collection[Ino]) -> None:
        """Let the service know of what is open in some directories, so that it is kept when its name goes."""
        local = self._opens.local()
        if local or self._opens.is_telling:
            place = self._leased.directory_of
            tasks = self._opens.register([ino for ino in local if (found := place(ino)) is None or found in parents])
            if tasks:
                await asyncio.wait(tasks)

    # -- changes ------------------------------------------------------------------------------------------------------

    async def _change(
        self,
        operation: str,
        message: Any,
        *,
        ino: Ino | None = None,
        names: Sequence[tuple[Ino, bytes]] = (),
        inos: Sequence[Ino] = (),
        moves_in: Sequence[Ino] = (),
    ) -> pb.Reply:
        """Call an operation that changes something; then nothing is known of what it may have changed but what it told.

        It may add or remove ``names``, and change inodes: ``ino`` may be a directory, of ``inos`` nothing is kept but by lease.
        ``moves_in``: directories of which a child that is a directory may be gone by it, or moved.
        """
        leased = self._leased
        # First of all: what is forgotten nobody opens by lease any more.
        asked = leased.begin(names=names, inos=inos if ino is None else (ino, *inos), moves_in=moves_in)
        try:
            if operation in _REMOVING:
                await self._register_opens({parent for parent, _ in names})
        except BaseException:
            leased.end()
            raise
        try:
            # Who gives up waiting ends nothing: it may come into force long after, and nobody calls back what this session has.
            reply = await self._call(operation, message, settled=leased.end)
        except BaseException:
            # It may have been applied, and is told to nobody.
            self._recent.clear()
            raise
        if moves_in:
            self._recent.forget_children(moves_in)
        elif ino is not None:
            self._recent.forget(ino)
        self._recent.changed(wire.inodes_of(reply.directories))
        if names and reply.directories.ino:
            lease_s = self._connection.lease_s
            leased.extended(asked, reply.leased, {parent for parent, _ in names}, lease_s=lease_s)
            if operation == "mknod" and len(reply.inodes.ino) == 1 and reply.inodes.ino[0] in reply.leased:
                leased.made(asked, wire.inode_of(reply), lease_s=lease_s)
        return reply

    # -- names --------------------------------------------------------------------------------------------------------

    async def lookup(self, parent: Ino, name: bytes) -> Inode:
        if not self._remembers:
            return wire.inode_of(await self._call("lookup", pb.Lookup(parent=parent, name=name)))
        recent = self._recent
        leased = self._leased
        await self._hold(parent)
        if leased.is_absent(parent, name):
            recent.absent(parent)
            raise FsError(errno.ENOENT)
        known = leased.lookup(parent, name) or recent.name(parent, name)
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
        asked = leased.asked()
        try:
            inode = wire.inode_of(await self._call("lookup", pb.Lookup(parent=parent, name=name)))
        except FsError:
            recent.absent(parent)
            raise
        leased.take_inode(asked, parent, name, inode)
        return inode

    async def resolve(self, start: Ino, path: Sequence[bytes]) -> list[Inode]:
        return wire.inodes_of((await self._call("resolve", pb.Resolve(start=start, path=path))).inodes)

    async def getattr(self, ino: Ino) -> Inode:
        leased = self._leased
        if self._remembers:
            known = self._recent.directory(ino) or leased.getattr(ino)
            if known is not None:
                return known
        asked = leased.asked()
        inode = wire.inode_of(await self._call("getattr", pb.GetAttr(inos=[ino], one=True)))
        leased.take_directory(asked, inode)
        return inode

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
        leased = self._leased
        if self._remembers:
            await self._hold(ino)
            known = leased.page(ino, after, limit)
            if known is not None:
                return known
        asked = leased.asked()
        message = pb.ReadDir(ino=ino, after=after, limit=limit, lease=self._remembers)
        reply = await self._call("readdir", message)
        page = wire.page_of(reply)
        if self._remembers:
            is_leased, lease_s = ino in reply.leased, self._connection.lease_s
            leased.take_page(asked, ino, page, after=after, is_leased=is_leased, lease_s=lease_s)
        return page

    async def mknod(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, rdev: int = 0) -> Inode:
        message = pb.MakeNode(caller=wire.caller_message(caller), parent=parent, name=name, mode=mode, rdev=rdev)
        return wire.inode_of(await self._change("mknod", message, names=[(parent, name)]))

    async def mkdir(self, caller: Caller, parent: Ino, name: bytes, *, mode: int) -> Inode:
        return await self.mknod(caller, parent, name, mode=0o040000 | (mode & 0o7777))

    async def symlink(self, caller: Caller, parent: Ino, name: bytes, target: bytes) -> Inode:
        message = pb.Symlink(caller=wire.caller_message(caller), parent=parent, name=name, target=target)
        return wire.inode_of(await self._change("symlink", message, names=[(parent, name)]))

    async def readlink(self, ino: Ino) -> bytes:
        return (await self._call("readlink", pb.ReadLink(ino=ino))).value

    async def link(self, caller: Caller, ino: Ino, parent: Ino, name: bytes) -> Inode:
        message = pb.Link(caller=wire.caller_message(caller), ino=ino, parent=parent, name=name)
        return wire.inode_of(await self._change("link", message, names=[(parent, name)], inos=[ino]))

    async def unlink(self, caller: Caller, parent: Ino, name: bytes) -> None:
        message = pb.Unlink(caller=wire.caller_message(caller), parent=parent, name=name)
        await self._change("unlink", message, names=[(parent, name)])

    async def rmdir(self, caller: Caller, parent: Ino, name: bytes) -> None:
        message = pb.RemoveDir(caller=wire.caller_message(caller), parent=parent, name=name)
        await self._change("rmdir", message, names=[(parent, name)], moves_in=[parent])

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
        names = [(parent, name), (new_parent, new_name)]
        await self._change("rename", message, names=names, moves_in=[parent, new_parent])

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

    async def open(self, ino: Ino, *, reading: bool = False) -> OpenFile:
        leased = self._leased
        parent = leased.directory_of(ino) if reading and self._remembers else None
        if parent is not None:
            await self._hold(parent)
            known = leased.open(ino)
            if known is not None:
                self._opens.opened(ino)
                return known
            if wanted := leased.maps_wanted(ino):
                # Beside the open, so that they go in one message.
                self._tasks.start(self.read_maps(wanted), name="maps ahead", raises=(AtollError,))
        asked = leased.asked()
        try:
            opened = wire.open_of(await self._call("open", pb.Open(ino=ino)))
            leased.take_map(asked, ino, opened.map)
            return opened
        except FsError:
            # The name that led here is old: a kernel looks it up again.
            self._recent.clear()
            raise

    async def create(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, exclusive: bool) -> OpenFile:
        message = pb.Create(
            caller=wire.caller_message(caller), parent=parent, name=name, mode=mode, exclusive=exclusive
        )
        return wire.open_of(await self._change("create", message, names=[(parent, name)]))

    async def _open_again(self, ino: Ino) -> None:
        await self._call("open", pb.Open(ino=ino, again=True))

    async def release(self, ino: Ino) -> None:
        if not self._opens.release(ino):
            self._connection.release(ino)

    async def read_map(self, ino: Ino, *, start: int, end: int) -> FileMap:
        asked = self._leased.asked()
        found = wire.map_of((await self._call("read_map", pb.ReadMap(ino=ino, start=start, end=end))).map)
        if not found.start:
            self._leased.take_map(asked, ino, found)
        return found

    async def read_maps(self, inos: Sequence[Ino]) -> dict[Ino, FileMap]:
        leased = self._leased
        known = {ino: known_map for ino in inos if (known_map := leased.map(ino)) is not None}
        wanted = [ino for ino in inos if ino not in known]
        if not wanted:
            return known
        asked = leased.asked()
        reply = await self._call("read_maps", pb.ReadMaps(inos=wanted))
        found = {Ino(each.ino): wire.map_of(each.map) for each in reply.maps}
        for ino, each in found.items():
            leased.take_map(asked, ino, each)
        return known | found

    async def allocate_slices(self, count: int) -> range:
        reply = await self._call("allocate_slices", pb.AllocateSlices(count=count))
        return range(reply.first, reply.first + reply.count)

    async def reserve(self, ino: Ino, *, end: int) -> int:
        return (await self._call("reserve", pb.Reserve(ino=ino, end=end))).count

    async def commit(self, caller: Caller, ino: Ino, commit: Commit) -> Inode:
        return wire.inode_of(await self._change("commit", wire.commit_message(caller, ino, commit), inos=[ino]))

    async def punch(self, caller: Caller, ino: Ino, *, start: int, end: int) -> OpenFile:
        message = pb.Punch(caller=wire.caller_message(caller), ino=ino, start=start, end=end)
        return wire.open_of(await self._change("punch", message, inos=[ino]))

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
        reply = await self._change("copy_range", message, inos=[target])
        return reply.count, wire.open_of(reply)
