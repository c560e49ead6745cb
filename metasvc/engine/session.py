"""One session of an engine in the same process: MetaClient without a wire."""

from __future__ import annotations

import asyncio
import errno as E
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from chunkstore.geometry import MAX_FILE_BYTES
from metasvc.engine import attributes, content, namespace
from metasvc.engine.accounts import USED_BYTES, USED_INODES, is_limited, quotas_above
from metasvc.engine.engine import END_S, Engine
from metasvc.engine.listing import Listing
from metasvc.engine.tx import Tx, refuse
from metasvc.errors import FsError
from metasvc.model import (
    ROOT_INO,
    Caller,
    Commit,
    DirPage,
    FileMap,
    Ino,
    Inode,
    OpenFile,
    RenameFlags,
    Replies,
    SessionId,
    SetAttr,
    StatFs,
    VolumeFormat,
)
from metasvc.store.tables import INODE

log = logging.getLogger(__name__)


class EngineSession:
    """MetaClient on an engine, called directly. An async context manager: leaving it ends the session."""

    def __init__(self, engine: Engine, session_id: SessionId) -> None:
        self._engine = engine
        self._session_id = session_id
        self._listing = Listing(engine)
        self._run: Callable[..., Coroutine[Any, Any, Any]] = partial(engine.run, by=session_id)

    @classmethod
    async def begin(cls, engine: Engine, *, host: str, pid: int, mountpoint: str = "") -> EngineSession:
        """Register a session."""
        return cls(engine, await engine.begin_session(host=host, pid=pid, mountpoint=mountpoint))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listing.close()
        while self._engine.failure is None:
            try:
                async with asyncio.timeout(END_S):
                    await self._engine.end_session(self._session_id)
                break
            except TimeoutError:
                # Who holds changes back lets them go on; a full disk may stay full.
                if self._engine.is_held:
                    continue
                log.warning(
                    "session %d: the store takes nothing; its row goes when the volume is next opened", self._session_id
                )
                break

    @property
    def format(self) -> VolumeFormat:
        return self._engine.format

    @property
    def session_id(self) -> SessionId:
        return self._session_id

    @property
    def root(self) -> Ino:
        return ROOT_INO

    @property
    def is_read_only(self) -> bool:
        return False

    def _recorder(self, caller: Caller) -> Callable[[Any, Tx], Replies] | None:
        """Return what makes, of the result of a request, the row that is to be durable with its changes. Here: none."""
        return None

    async def expect_walk(self, ino: Ino) -> None:
        """Load the top of the tree below a directory in the background, up to 2,000 names: it was mounted. ENOENT, ENOTDIR."""
        await self._listing.begin_at(ino)

    # -- names ----------------------------------------------------------------------------------------

    async def lookup(self, parent: Ino, name: bytes) -> Inode:
        await self._listing.expect(parent, name)
        inode: Inode = await self._run(namespace.lookup, parent, name)
        return inode

    async def resolve(self, start: Ino, path: Sequence[bytes]) -> list[Inode]:
        found: list[Inode] = await self._run(namespace.resolve, start, tuple(path))
        return found

    async def getattr(self, ino: Ino) -> Inode:
        inode: Inode = await self._run(Tx.inode, ino)
        return inode

    async def getattr_many(self, inos: Sequence[Ino]) -> list[Inode | None]:
        def rule(tx: Tx) -> list[Inode | None]:
            tx.require([(INODE, ino) for ino in inos])
            return [tx.get(INODE, ino) for ino in inos]

        found: list[Inode | None] = await self._run(rule)
        return found

    def lease(self, inos: Sequence[Ino], *, give: bool) -> list[Ino]:
        """Extend leases on directories, or ``give`` them; return those that the session has.

        Call before what is to be known by them is read.
        """
        leases = self._engine.leases
        if give:
            return [ino for ino in inos if leases.give(self._session_id, ino)]
        return leases.extend(self._session_id, inos)

    async def readdir(self, ino: Ino, *, after: bytes | None, limit: int) -> DirPage:
        return await self._listing.page(ino, after=after, limit=limit)

    async def mknod(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, rdev: int = 0) -> Inode:
        def rule(tx: Tx) -> Inode:
            return namespace.make(tx, caller, parent, name, mode=mode, rdev=rdev)

        inode: Inode = await self._run(rule, record=self._recorder(caller))
        return inode

    async def mkdir(self, caller: Caller, parent: Ino, name: bytes, *, mode: int) -> Inode:
        return await self.mknod(caller, parent, name, mode=0o040000 | (mode & 0o7777))

    async def symlink(self, caller: Caller, parent: Ino, name: bytes, target: bytes) -> Inode:
        def rule(tx: Tx) -> Inode:
            return namespace.make(tx, caller, parent, name, mode=0o120777, target=target)

        inode: Inode = await self._run(rule, record=self._recorder(caller))
        return inode

    async def readlink(self, ino: Ino) -> bytes:
        target: bytes = await self._run(namespace.readlink, ino)
        return target

    async def link(self, caller: Caller, ino: Ino, parent: Ino, name: bytes) -> Inode:
        inode: Inode = await self._run(namespace.link, ino, parent, name, record=self._recorder(caller))
        return inode

    async def unlink(self, caller: Caller, parent: Ino, name: bytes) -> None:
        await self._run(namespace.unlink, caller, parent, name, record=self._recorder(caller))

    async def rmdir(self, caller: Caller, parent: Ino, name: bytes) -> None:
        await self._run(namespace.rmdir, caller, parent, name, record=self._recorder(caller))

    async def rename(
        self, caller: Caller, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, *, flags: RenameFlags
    ) -> None:
        await self._run(
            namespace.rename, caller, parent, name, new_parent, new_name, flags, record=self._recorder(caller)
        )

    # -- attributes -----------------------------------------------------------------------------------

    async def setattr(self, caller: Caller, ino: Ino, changes: SetAttr) -> Inode:
        inode: Inode = await self._run(
            attributes.setattr, caller, ino, changes, then=self._resized, record=self._recorder(caller)
        )
        return inode

    def _resized(self, result: Any) -> None:
        inode: Inode = result.inode if isinstance(result, OpenFile) else result
        self._engine.reservations.resized(inode.ino, inode.space_bytes)

    async def getxattr(self, ino: Ino, name: bytes) -> bytes:
        value: bytes = await self._run(attributes.getxattr, ino, name)
        return value

    async def listxattr(self, ino: Ino) -> list[bytes]:
        names: list[bytes] = await self._run(attributes.listxattr, ino)
        return names

    async def setxattr(self, caller: Caller, ino: Ino, name: bytes, value: bytes, *, flags: int) -> None:
        await self._run(attributes.setxattr, ino, name, value, flags, record=self._recorder(caller))

    async def removexattr(self, caller: Caller, ino: Ino, name: bytes) -> None:
        await self._run(attributes.removexattr, ino, name, record=self._recorder(caller))

    async def statfs(self, ino: Ino) -> StatFs:
        answer: StatFs = await self._run(statfs, ino)
        return answer

    # -- content --------------------------------------------------------------------------------------

    def _opened(self, result: OpenFile) -> None:
        self._engine.opened(self._session_id, result.inode.ino)

    async def open(self, ino: Ino, *, reading: bool = False, again: bool = False) -> OpenFile:
        """Open. ``again``: the client had it open before, so that it may be one that has no name any more."""
        await self._listing.expect_content(ino)

        def rule(tx: Tx) -> OpenFile:
            opened = content.open_file(tx, ino)
            if not opened.inode.nlink and not again and self._session_id not in self._engine.sessions_holding(ino):
                # In the trash, or kept for others: whoever opens it by an old name wants what the name stands for now.
                refuse(E.ENOENT)
            content.sustain(tx, self._session_id, opened.inode)
            return opened

        answer: OpenFile = await self._run(rule, then=self._opened)
        return answer

    async def create(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, exclusive: bool) -> OpenFile:
        def rule(tx: Tx) -> OpenFile:
            if not exclusive:
                try:
                    found = namespace.lookup(tx, parent, name)
                except FsError as exc:
                    if exc.errno != E.ENOENT:
                        raise
                else:
                    if found.is_dir:
                        refuse(E.EISDIR)
                    if not found.is_file:
                        # Of a symbolic link the caller has to follow it: here are no paths.
                        refuse(E.EINVAL, "it is no regular file")
                    return content.open_file(tx, found.ino)
            made = namespace.make(tx, caller, parent, name, mode=0o100000 | (mode & 0o7777))
            promised_end = 0 if is_limited(tx) else MAX_FILE_BYTES
            return OpenFile(made, FileMap(0, [], {}, 0, MAX_FILE_BYTES), promised_end, is_new=True)

        answer: OpenFile = await self._run(rule, then=self._opened, record=self._recorder(caller))
        return answer

    async def release(self, ino: Ino) -> None:
        await self._engine.release(self._session_id, ino)

    async def read_map(self, ino: Ino, *, start: int, end: int) -> FileMap:
        answer: FileMap = await self._run(content.read_map, ino, start, end)
        return answer

    async def read_maps(self, inos: Sequence[Ino]) -> dict[Ino, FileMap]:
        answer: dict[Ino, FileMap] = await self._run(content.read_maps, tuple(inos))
        return answer

    async def allocate_slices(self, count: int) -> range:
        return await self._engine.allocate_slices(self._session_id, count)

    async def reserve(self, ino: Ino, *, end: int) -> int:
        # It changes no row, so it would not wait: and give away what sessions were promised that have not returned yet.
        await self._engine.sessions_returned()

        def rule(tx: Tx) -> int:
            # The last release takes promises back: what nobody has open would keep its own for ever.
            if self._session_id not in self._engine.sessions_holding(ino):
                refuse(E.EBADF, "the session does not have the file open")
            return self._engine.reservations.reserve(tx, ino, end)

        granted: int = await self._run(rule)
        return granted

    async def commit(self, caller: Caller, ino: Ino, commit: Commit) -> Inode:
        engine, session_id = self._engine, self._session_id

        def rule(tx: Tx) -> Inode:
            # In the rule: a session that ends meanwhile must not commit what is garbage from then on.
            if not all(engine.may_commit(session_id, written.slice_id) for written in commit.slices):
                refuse(E.ESTALE, "the session that these slices were written in has ended")
            applied = {
                written.slice_id
                for written in commit.slices
                if not engine.is_unused(session_id, written.slice_id)
                and content.was_applied(
                    tx, written.slice_id, or_gone=not engine.was_handed_out_before(written.slice_id)
                )
            }
            return content.commit(tx, caller, ino, content.without_slices(commit, applied))

        def done(inode: Inode) -> None:
            engine.used(session_id, [written.slice_id for written in commit.slices])
            self._resized(inode)

        inode: Inode = await self._run(rule, then=done, record=self._recorder(caller))
        return inode

    async def punch(self, caller: Caller, ino: Ino, *, start: int, end: int) -> OpenFile:
        answer: OpenFile = await self._run(content.punch, caller, ino, start, end, record=self._recorder(caller))
        return answer

    async def copy_range(
        self, caller: Caller, source: Ino, start: int, target: Ino, target_start: int, length: int
    ) -> tuple[int, OpenFile]:
        def resized(result: tuple[int, OpenFile]) -> None:
            self._resized(result[1])

        answer: tuple[int, OpenFile] = await self._run(
            content.copy_range,
            caller,
            source,
            start,
            target,
            target_start,
            length,
            then=resized,
            record=self._recorder(caller),
        )
        return answer


def statfs(tx: Tx, ino: Ino) -> StatFs:
    """Return the space of the nearest quota at or above an inode, else of the volume, within its tenant's. A rule."""
    form = tx.around.format
    inode = tx.inode(ino)
    used_bytes, used_inodes = tx.counter(USED_BYTES), tx.counter(USED_INODES)
    total_bytes, total_inodes = form.capacity_bytes, form.max_inodes
    allowed = tx.around.allowance
    if allowed.max_bytes is not None:
        total_bytes = min(total_bytes or MAX_FILE_BYTES, allowed.max_bytes + allowed.further_bytes)
    if allowed.max_inodes is not None:
        most = allowed.max_inodes + allowed.further_inodes
        total_inodes = min(total_inodes or most, most)
    directory = ino if inode.is_dir else inode.parent
    if directory > 2:
        for quota in quotas_above(tx, directory)[:1]:
            used_bytes, used_inodes = quota.used_bytes, quota.used_inodes
            total_bytes, total_inodes = quota.max_bytes, quota.max_inodes
    return StatFs(total_bytes, used_bytes, total_inodes, used_inodes)
