"""One coroutine per system call, on inode numbers and handles. Names are bytes; errors are AtollError with an errno.

Owns handles, and puts together what the other modules of client.vfs own: open files (files, writing, reading), open
directories (directories), virtual files, virtual attributes, the background flush. Must not know FUSE.

Permissions are not checked here: a mount leaves them to the kernel (`default_permissions`). What a call means is POSIX's
matter unless docs/semantics.md says more.

One event loop; every method is called on it. State is changed in stretches without an await; where a call needs several
steps, the module that owns the state says what may come between.
"""

from __future__ import annotations

import asyncio
import errno as E
import math
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from types import TracebackType
from typing import Any, Final, NamedTuple, NoReturn, Self

from chunkstore.errors import AtollError
from chunkstore.geometry import Buffer
from chunkstore.slices import ChunkStore
from client.vfs import xattrs
from client.vfs.accesslog import AccessLog, AccessLogReader
from client.vfs.clock import Clock, SystemClock
from client.vfs.committed import PAGE_BYTES
from client.vfs.directories import DirectoryReader, Positioned
from client.vfs.files import OpenFiles
from client.vfs.flushing import Flusher
from client.vfs.invalidation import Invalidations
from client.vfs.metrics import VfsMetrics
from client.vfs.neighbours import Neighbours
from client.vfs.options import VfsOptions
from client.vfs.reading import FileReader, ReadAhead
from client.vfs.slice_ids import SliceIds
from client.vfs.virtual import DIRECTORY_NAME, FIRST_INO, VirtualFile, VirtualFiles
from client.vfs.writing import Surroundings, Writing
from metasvc.api import MetaClient
from metasvc.errors import FsError
from metasvc.model import (
    Caller,
    DirPage,
    Entry,
    Ino,
    Inode,
    OpenFile,
    RenameFlags,
    SetAttr,
    StatFs,
)

FALLOC_KEEP_SIZE: Final = 1
FALLOC_PUNCH_HOLE: Final = 2
FALLOC_ZERO_RANGE: Final = 16
# What df shows as free on a volume without a limit: large, and far from what programs overflow at.
_UNLIMITED_BYTES: Final = 1 << 50
_UNLIMITED_INODES: Final = 1 << 32
# Timeouts above this mean that nobody else changes the volume, so that only own changes make fetched entries old.
_SOLE_S: Final = 60.0
AT_HAND_BYTES: Final = 16 * 1024
"""A file up to this length is given to the kernel when it is opened, if it is in memory: 20 us instead of a READ of 45."""


class Handle(NamedTuple):
    """Answer of open and create."""

    fh: int
    inode: Inode
    keep_cache: bool
    """The pages that a kernel has of this file are still good."""
    direct_io: bool
    """The length says nothing (virtual files): reads must come here."""
    content: Buffer | None
    """The whole file, where it is short, at hand and not in the kernel: given now, it need not ask. Use it at once."""


class _FileHandle:
    """One open descriptor of a regular file."""

    __slots__ = ("can_read", "can_write", "file", "losses", "read_ahead")

    def __init__(self, file: Writing, flags: int, read_ahead: ReadAhead) -> None:
        access = flags & os.O_ACCMODE
        self.file = file
        self.losses = file.losses
        """How many losses of written data this descriptor has heard of."""
        self.can_read = access != os.O_WRONLY
        self.can_write = access != os.O_RDONLY
        self.read_ahead = read_ahead


class _DirectoryHandle:
    """One open directory."""

    __slots__ = ("ino", "reader")

    def __init__(self, ino: Ino, reader: DirectoryReader | None) -> None:
        self.ino = ino
        self.reader = reader
        """None for the virtual directory."""


def _refuse(errno: int, detail: str = "") -> NoReturn:
    raise FsError(errno, detail)


class Vfs:
    """Answer system calls on one volume. One event loop; enter it (`async with`) before the first call.

    Composition: open `meta` and `chunks` before and close them after. Leaving flushes what was written, for at most
    `options.shutdown_flush_s`.
    """

    def __init__(
        self,
        meta: MetaClient,
        chunks: ChunkStore,
        *,
        log: Any,
        options: VfsOptions | None = None,
        clock: Clock | None = None,
        virtual_files: Sequence[VirtualFile] = (),
    ) -> None:
        """Take what it stands on. `log` is a structlog logger bound to the volume. `.atoll/accesslog` is always there."""
        self.options = options if options is not None else VfsOptions()
        self.metrics = VfsMetrics()
        self.access_log = AccessLog()
        self.root = self.options.root
        """The inode at which the volume appears."""
        self._meta = meta
        self._chunks = chunks
        self._log = log
        self._clock = clock if clock is not None else SystemClock()
        self._virtual = VirtualFiles(virtual_files, self.access_log, made_ns=self._clock.wall_ns())
        self._flusher = Flusher(self.options, self._clock, self.metrics, log=log)
        self._request_ids = count(1)
        around = Surroundings(
            meta=meta,
            chunks=chunks,
            options=self.options,
            clock=self._clock,
            slice_ids=SliceIds(meta, count=self.options.slice_ids),
            dirty=self._flusher,
            next_caller=lambda: self.caller(0, 0),
            committed=self._changed,
        )
        self._files = OpenFiles(around, log=log)
        self._flusher.after_flush = self._files.settle
        self._reader = FileReader(meta, chunks)
        self._neighbours = (
            Neighbours(meta, chunks, self._clock, self.metrics) if self.options.readahead_max_bytes else None
        )
        self._handles: dict[int, _FileHandle] = {}
        self._virtual_handles: dict[int, bytes | AccessLogReader] = {}
        self._directories: dict[int, _DirectoryHandle] = {}
        self._next_fh = count(1)
        self._changes = 0
        """Grows with every change that was answered: see client.vfs.directories."""
        self._invalidations: Invalidations | None = None
        self._background: AsyncExitStack | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Start the background work."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(_running(self._flusher))
            self._background = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Flush, then stop the background work. Data that could not be made durable are logged, file by file."""
        assert self._background is not None, "the vfs was entered"
        if self._neighbours is not None:
            await self._neighbours.close()
        try:
            for ino in await self.flush_all(timeout_s=self.options.shutdown_flush_s):
                self._log.error("data written to this file are lost: they could not be made durable", inode=ino)
        finally:
            await self._background.aclose()

    async def flush_all(self, *, timeout_s: float) -> list[Ino]:
        """Make all written data durable; return the inodes of those that failed or were not done in time.

        What fails for a reason that may pass is tried again until the time is up.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._flusher.flush_all()
        except TimeoutError:
            pass
        return self._flusher.dirty_inodes()

    async def flush_due(self) -> None:
        """Do now what the background flush does every `flush_interval_s`."""
        await self._flusher.flush_due()

    def attach(self, invalidations: Invalidations) -> None:
        """Take the transport that is told about changes from elsewhere."""
        self._invalidations = invalidations

    def entry_changed(self, parent: Ino, name: bytes) -> None:
        """Say that a name was added, replaced or removed past the vfs (trash restore, clone)."""
        self._changed()
        if self._invalidations is not None:
            self._invalidations.entry(parent, name)

    def inode_changed(self, ino: Ino) -> None:
        """Say that attributes or content of an inode were changed past the vfs."""
        self._changed()
        self._files.forget_version(ino)
        if self._invalidations is not None:
            self._invalidations.inode(ino)

    def caller(self, uid: int, gid: int, *, umask: int = 0) -> Caller:
        """Return the credentials for one call that changes something, with the next request id of this session."""
        return Caller(uid, gid, (), umask, next(self._request_ids))

    def metrics_text(self) -> str:
        """Return the counters of requests and of the vfs as Prometheus text."""
        return self.metrics.text(
            {
                "open_files": len(self._handles),
                "open_directories": len(self._directories),
                "dirty_files": self._flusher.dirty_files,
            }
        )

    def _changed(self) -> None:
        self._changes += 1

    def _check_writable(self) -> None:
        if self.options.read_only:
            _refuse(E.EROFS)

    def _check_change(self, parent: Ino, name: bytes) -> None:
        """Refuse to change a name of a read-only mount or under `.atoll`. EROFS, EPERM."""
        if self.options.read_only:
            _refuse(E.EROFS)
        if parent >= FIRST_INO or (parent == self.root and name == DIRECTORY_NAME):
            _refuse(E.EPERM)

    # -- names ---------------------------------------------------------------------------------------------------------

    async def lookup(self, parent: Ino, name: bytes) -> Inode:
        """Return what a name stands for. ENOENT, ENOTDIR, ENAMETOOLONG."""
        if parent == self.root:
            if name == DIRECTORY_NAME:
                return await self.getattr(FIRST_INO)
            if name == b"..":
                return await self.getattr(parent)
        elif parent >= FIRST_INO:
            return await self._lookup_virtual(parent, name)
        return self._shown(await self._meta.lookup(parent, name))

    async def resolve(self, names: Sequence[bytes]) -> list[Inode]:
        """Walk from the root in one trip; the inodes of the root and of each name, so at least one.

        ENOENT, ENOTDIR (a symbolic link on the way is one: none is followed), ENAMETOOLONG. Virtual files are not found.
        """
        return [self._shown(inode) for inode in await self._meta.resolve(self.root, [b".", *names])]

    async def _lookup_virtual(self, parent: Ino, name: bytes) -> Inode:
        if parent != FIRST_INO:
            _refuse(E.ENOTDIR)
        if name == b".":
            return await self.getattr(parent)
        if name == b"..":
            return await self.getattr(self.root)
        inode = self._virtual.lookup(name)
        return inode if inode is not None else _refuse(E.ENOENT)

    def _shown(self, inode: Inode) -> Inode:
        file = self._files.get(inode[0])
        return inode if file is None else file.shown(inode)

    async def mknod(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, rdev: int = 0) -> Inode:
        """Make a regular or special file; `mode` with type bits. EEXIST, ENOSPC, EDQUOT …"""
        self._check_change(parent, name)
        inode = await self._meta.mknod(caller, parent, name, mode=mode, rdev=rdev)
        self._changed()
        return inode

    async def mkdir(self, caller: Caller, parent: Ino, name: bytes, *, mode: int) -> Inode:
        """Make a directory. EEXIST, EMLINK, ENOSPC, EDQUOT …"""
        self._check_change(parent, name)
        inode = await self._meta.mkdir(caller, parent, name, mode=mode)
        self._changed()
        return inode

    async def symlink(self, caller: Caller, parent: Ino, name: bytes, target: bytes) -> Inode:
        """Make a symbolic link. EEXIST, ENAMETOOLONG …"""
        self._check_change(parent, name)
        inode = await self._meta.symlink(caller, parent, name, target)
        self._changed()
        return inode

    async def readlink(self, ino: Ino) -> bytes:
        """Return the target of a symbolic link. EINVAL."""
        if ino >= FIRST_INO:
            _refuse(E.EINVAL)
        return await self._meta.readlink(ino)

    async def link(self, caller: Caller, ino: Ino, parent: Ino, name: bytes) -> Inode:
        """Make another name of a file. EEXIST, EPERM, EMLINK …"""
        self._check_change(parent, name)
        if ino >= FIRST_INO:
            _refuse(E.EPERM)
        inode = await self._meta.link(caller, ino, parent, name)
        self._changed()
        return self._shown(inode)

    async def unlink(self, caller: Caller, parent: Ino, name: bytes) -> None:
        """Remove a name of a file. ENOENT, EISDIR."""
        self._check_change(parent, name)
        await self._meta.unlink(caller, parent, name)
        self._changed()

    async def rmdir(self, caller: Caller, parent: Ino, name: bytes) -> None:
        """Remove an empty directory. ENOENT, ENOTDIR, ENOTEMPTY."""
        self._check_change(parent, name)
        await self._meta.rmdir(caller, parent, name)
        self._changed()

    async def rename(
        self, caller: Caller, parent: Ino, name: bytes, new_parent: Ino, new_name: bytes, *, flags: int = 0
    ) -> None:
        """Rename as renameat2(2) with NOREPLACE and EXCHANGE. EINVAL for other flags."""
        self._check_change(parent, name)
        self._check_change(new_parent, new_name)
        if flags & ~int(RenameFlags.NOREPLACE | RenameFlags.EXCHANGE):
            _refuse(E.EINVAL)
        await self._meta.rename(caller, parent, name, new_parent, new_name, flags=RenameFlags(flags))
        self._changed()

    # -- attributes ----------------------------------------------------------------------------------------------------

    async def getattr(self, ino: Ino) -> Inode:
        """Return the attributes of an inode, unflushed writes included. ENOENT."""
        if ino >= FIRST_INO:
            inode = self._virtual.getattr(ino)
            return inode if inode is not None else _refuse(E.ENOENT)
        return self._shown(await self._meta.getattr(ino))

    async def setattr(self, caller: Caller, ino: Ino, changes: SetAttr) -> Inode:
        """Change attributes; a length truncates or extends. EISDIR, EINVAL, EFBIG, ENOSPC, EDQUOT, EROFS."""
        self._check_writable()
        if ino >= FIRST_INO:
            _refuse(E.EPERM)
        file = self._files.get(ino)
        if file is None:
            inode = await self._meta.setattr(caller, ino, changes)
        elif changes.size_bytes is not None:
            inode = await file.resize(caller, changes)
        else:
            inode = await file.set_times(caller, changes)
        self._changed()
        now_open = self._files.get(ino)
        if now_open is not None and now_open is not file:
            # Opened while this was under way, perhaps with the attributes of before.
            now_open.noticed(inode)
        return self._shown(inode)

    async def getxattr(self, ino: Ino, name: bytes) -> bytes:
        """Return the value of an attribute. ENODATA."""
        if ino >= FIRST_INO:
            _refuse(E.ENODATA)
        if name == xattrs.CAPABILITY:
            return await self._capability(ino)
        if name.startswith(xattrs.PREFIX):
            return await self._virtual_xattr(ino, name)
        return await self._meta.getxattr(ino, name)

    async def _capability(self, ino: Ino) -> bytes:
        file = self._files.get(ino)
        now_s = self._clock.monotonic_s()
        if file is not None and now_s < file.no_capability_until_s:
            _refuse(E.ENODATA)
        changes = self._changes
        try:
            return await self._meta.getxattr(ino, xattrs.CAPABILITY)
        except FsError as error:
            # Not if one was set while this was asked.
            if file is not None and error.errno == E.ENODATA and changes == self._changes:
                file.no_capability_until_s = now_s + self.options.attr_timeout_s
            raise

    async def _virtual_xattr(self, ino: Ino, name: bytes) -> bytes:
        if name not in xattrs.NAMES:
            _refuse(E.ENODATA)
        inode = await self._meta.getattr(ino)
        if name == xattrs.INODE:
            return b"%d" % ino
        if not inode.is_file:
            _refuse(E.ENODATA)
        file = self._files.get(ino)
        if file is None:
            # A look at the map, as an open would take it, without being one.
            first = await self._meta.read_map(ino, start=0, end=PAGE_BYTES)
            file = Writing(self._files.around, OpenFile(inode, first))
        await self._reader.load(file, 0, file.size)
        found = xattrs.value(name, ino, file.committed, is_dirty=file.is_dirty, is_staged=self._chunks.is_staged)
        return found if found is not None else _refuse(E.ENODATA)

    async def listxattr(self, ino: Ino) -> list[bytes]:
        """Return the names of all attributes, without the virtual ones."""
        return [] if ino >= FIRST_INO else await self._meta.listxattr(ino)

    async def setxattr(self, caller: Caller, ino: Ino, name: bytes, value: bytes, *, flags: int = 0) -> None:
        """Set an attribute. EEXIST, ENODATA, ERANGE, E2BIG, EOPNOTSUPP; EPERM for `user.atoll.*`."""
        self._check_writable()
        if ino >= FIRST_INO or name.startswith(xattrs.PREFIX):
            _refuse(E.EPERM)
        await self._meta.setxattr(caller, ino, name, value, flags=flags)
        self._changed()
        file = self._files.get(ino)
        if file is not None:
            file.no_capability_until_s = -math.inf

    async def removexattr(self, caller: Caller, ino: Ino, name: bytes) -> None:
        """Remove an attribute. ENODATA; EPERM for `user.atoll.*`."""
        self._check_writable()
        if ino >= FIRST_INO or name.startswith(xattrs.PREFIX):
            _refuse(E.EPERM)
        await self._meta.removexattr(caller, ino, name)
        self._changed()

    async def statfs(self) -> StatFs:
        """Return space and inodes of the volume or of the root's quota; without a limit a large number is free."""
        answer = await self._meta.statfs(self.root)
        total_bytes = answer.total_bytes or answer.used_bytes + _UNLIMITED_BYTES
        total_inodes = answer.total_inodes or answer.used_inodes + _UNLIMITED_INODES
        return StatFs(total_bytes, answer.used_bytes, total_inodes, answer.used_inodes)

    # -- files ---------------------------------------------------------------------------------------------------------

    async def open(self, caller: Caller, ino: Ino, flags: int) -> Handle:
        """Open a regular file. ENOENT, EISDIR, EROFS; O_TRUNC is honoured, O_CREAT and O_EXCL are not looked at."""
        if ino >= FIRST_INO:
            return self._open_virtual(ino, flags)
        if self.options.read_only and flags & (os.O_ACCMODE | os.O_TRUNC):
            _refuse(E.EROFS)
        opened = await self._meta.open(ino, reading=not flags & (os.O_ACCMODE | os.O_TRUNC))
        if not opened.inode.is_file:
            await self._meta.release(ino)
            _refuse(E.EISDIR if opened.inode.is_dir else E.ENXIO)
        handle = await self._opened(caller, opened, flags)
        if handle.keep_cache or flags & (os.O_ACCMODE | os.O_TRUNC | os.O_DIRECT):
            return handle
        return handle._replace(content=self._at_hand(self._handles[handle.fh].file))

    async def create(self, caller: Caller, parent: Ino, name: bytes, *, mode: int, flags: int) -> Handle:
        """Create and open a regular file, or open the one that is there unless O_EXCL. EEXIST, EISDIR, ENOSPC …"""
        self._check_change(parent, name)
        opened = await self._meta.create(caller, parent, name, mode=mode, exclusive=bool(flags & os.O_EXCL))
        self._changed()
        if not opened.inode.size_bytes and self._files.get(opened.inode.ino) is None:
            flags &= ~os.O_TRUNC  # new, or empty: nothing to cut off, here or pending
        handle = await self._opened(caller, opened, flags)
        if opened.is_new and (file := self._files.get(opened.inode.ino)) is not None:
            file.no_capability_until_s = self._clock.monotonic_s() + self.options.attr_timeout_s
        return handle

    async def _opened(self, caller: Caller, opened: OpenFile, flags: int) -> Handle:
        file, is_same = self._files.opened(opened)
        if flags & os.O_TRUNC:
            try:
                await file.resize(caller, SetAttr(size_bytes=0))
            except BaseException:
                await self._files.release(file)
                raise
            self._changed()
        fh = next(self._next_fh)
        self._handles[fh] = _FileHandle(file, flags, ReadAhead(self.options.readahead_max_bytes))
        return Handle(fh, file.shown(file.inode), is_same, False, None)

    def _at_hand(self, file: Writing) -> Buffer | None:
        """Return all bytes of a file that was opened for reading, if they are few and need no waiting.

        Not if anybody else has it open: a read of theirs may be under way, for which a kernel holds the pages.
        """
        if not 0 < file.size <= AT_HAND_BYTES or not self._files.is_open_once(file.inode.ino):
            return None
        content = self._reader.try_read(file, 0, file.size)
        if content is not None:
            if self._neighbours is not None:
                self._neighbours.read_at_once(file)
            self.metrics.read_bytes += len(content)
        return content

    def _open_virtual(self, ino: Ino, flags: int) -> Handle:
        inode = self._virtual.getattr(ino)
        if inode is None:
            _refuse(E.ENOENT)
        if inode.is_dir:
            _refuse(E.EISDIR)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            _refuse(E.EACCES)
        fh = next(self._next_fh)
        self._virtual_handles[fh] = self._virtual.open(ino)
        return Handle(fh, inode, False, True, None)

    async def read(self, fh: int, offset: int, size: int) -> Buffer:
        """Return up to `size` bytes; fewer only at the end of the file. EBADF, EIO.

        The answer may be a view of memory that a later write changes: use it before the next await.
        """
        handle = self._handles.get(fh)
        if handle is None:
            return await self._read_virtual(fh, offset, size)
        if not handle.can_read:
            _refuse(E.EBADF)
        file = handle.file
        end = offset + size
        advice = handle.read_ahead.advise(offset, end, file.size)
        if advice is not None:
            handle.read_ahead.stopped(self._reader.prefetch(file, *advice))
        data = self._reader.try_read(file, offset, end)
        if data is None:
            if not offset and self._neighbours is not None:
                self._neighbours.missed(file)
            try:
                data = await self._reader.read(file, offset, end)
            except AtollError as error:
                self._log.error("read failed", inode=file.inode.ino, offset=offset, code=error.code, error=str(error))
                raise
        elif not offset and self._neighbours is not None:
            self._neighbours.read_at_once(file)
        self.metrics.read_bytes += len(data)
        return data

    def is_access_log(self, fh: int) -> bool:
        """Return whether a descriptor reads `.atoll/accesslog`."""
        return isinstance(self._virtual_handles.get(fh), AccessLogReader)

    async def _read_virtual(self, fh: int, offset: int, size: int) -> bytes:
        content = self._virtual_handles.get(fh)
        if content is None:
            _refuse(E.EBADF)
        if isinstance(content, AccessLogReader):
            return await content.read(size)
        return content[offset : offset + size]

    async def write(self, fh: int, offset: int | None, data: Buffer) -> int:
        """Write all of `data` at an offset, or at the end of the file (None: O_APPEND). EBADF, EFBIG, EDQUOT, ENOSPC, EIO.

        A kernel places O_APPEND writes itself and gives the offset.
        """
        handle = self._handles.get(fh)
        if handle is None or not handle.can_write:
            _refuse(E.EBADF)
        await handle.file.write(offset, data)
        self.metrics.written_bytes += len(data)
        return len(data)

    async def flush(self, fh: int) -> None:
        """Do what close(2) promises: what was written through any handle of this file is durable when this returns."""
        handle = self._handles.get(fh)
        if handle is not None and handle.can_write:
            await self._flush(handle)

    async def fsync(self, fh: int) -> None:
        """Make everything written to the file durable. What failed is kept: a later fsync tries again.

        ESTALE, once, where data were lost with the session that wrote them.
        """
        handle = self._handles.get(fh)
        if handle is not None:
            await self._flush(handle)

    async def _flush(self, handle: _FileHandle) -> None:
        try:
            await handle.file.flush()
        finally:
            told, handle.losses = handle.losses, handle.file.losses
        if told != handle.losses:
            _refuse(E.ESTALE, "data written to this file were lost: the session that wrote them has ended")

    async def release(self, fh: int) -> None:
        """Forget a handle. Never fails."""
        handle = self._handles.pop(fh, None)
        if handle is not None:
            await self._files.release(handle.file)
            return
        content = self._virtual_handles.pop(fh, None)
        if isinstance(content, AccessLogReader):
            content.close()

    async def fallocate(self, caller: Caller, fh: int, mode: int, offset: int, length: int) -> None:
        """Reserve room, punch a hole or zero a range, by FALLOC_* flags. EOPNOTSUPP for others; EDQUOT, ENOSPC."""
        handle = self._handles.get(fh)
        if handle is None or not handle.can_write:
            _refuse(E.EBADF)
        if offset < 0 or length <= 0:
            _refuse(E.EINVAL)
        file, end = handle.file, offset + length
        keeps_size = bool(mode & FALLOC_KEEP_SIZE)
        match mode & ~FALLOC_KEEP_SIZE:
            case 0:
                await file.reserve(end)
            case 2 if keeps_size:
                await self._punch(caller, file, offset, end)
            case 16:
                if not keeps_size:
                    await file.reserve(end)
                await self._punch(caller, file, offset, end)
            case _:
                _refuse(E.EOPNOTSUPP)
        if not keeps_size and end > file.size:
            await file.resize(caller, SetAttr(size_bytes=end))
        self._changed()

    async def _punch(self, caller: Caller, file: Writing, start: int, end: int) -> None:
        async with file.still():
            end = min(end, file.size)
            if start < end:
                file.changed(await self._meta.punch(caller, file.inode.ino, start=start, end=end))

    async def copy_range(
        self, caller: Caller, fh_in: int, start: int, fh_out: int, target_start: int, length: int
    ) -> int:
        """Copy as copy_file_range(2), without moving bytes: both files name the same slices. EBADF, EINVAL (overlap)."""
        source, target = self._handles.get(fh_in), self._handles.get(fh_out)
        if source is None or target is None or not source.can_read or not target.can_write:
            _refuse(E.EBADF)
        if source.file is not target.file:
            await source.file.flush()
        async with target.file.still():
            copied, opened = await self._meta.copy_range(
                caller, source.file.inode.ino, start, target.file.inode.ino, target_start, length
            )
            target.file.changed(opened)
        self._changed()
        return copied

    async def lseek(self, fh: int, offset: int, whence: int) -> int:
        """Return the next data or hole (SEEK_DATA, SEEK_HOLE) at or behind an offset. ENXIO, EINVAL."""
        handle = self._handles.get(fh)
        if handle is None:
            _refuse(E.EBADF)
        file = handle.file
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            _refuse(E.EINVAL)
        if not 0 <= offset < file.size:
            _refuse(E.ENXIO)
        if whence == os.SEEK_HOLE:
            return min(file.size, await self._reader.next_hole(file, offset))
        found = await self._reader.next_data(file, offset)
        return found if found is not None and found < file.size else _refuse(E.ENXIO)

    # -- directories ---------------------------------------------------------------------------------------------------

    async def opendir(self, ino: Ino) -> int:
        """Open a directory. No trip: whether it is one is seen by the first readdir."""
        fh = next(self._next_fh)
        self._directories[fh] = _DirectoryHandle(ino, None if ino >= FIRST_INO else self._directory_reader(ino))
        return fh

    def _directory_reader(self, ino: Ino) -> DirectoryReader:
        async def read_page(after: bytes | None, limit: int) -> DirPage:
            return await self._meta.readdir(ino, after=after, limit=limit)

        timeout_s = self.options.attr_timeout_s
        if timeout_s >= _SOLE_S:
            return DirectoryReader(read_page, lambda: self._changes, page_entries=self.options.readdir_page)
        period_s = max(timeout_s, 0.001)
        return DirectoryReader(
            read_page,
            lambda: (self._changes, self._clock.monotonic_s() // period_s),
            page_entries=self.options.readdir_page,
        )

    async def readdir(self, fh: int, cookie: int) -> list[Positioned]:
        """Return entries behind a cookie with their attributes, `.` and `..` first; none at the end. ENOTDIR, ENOENT.

        Cookies are explained in client.vfs.directories.
        """
        handle = self._directories.get(fh)
        if handle is None:
            _refuse(E.EBADF)
        dots = await self._dot_entries(handle.ino, cookie) if cookie < 2 else []
        if handle.reader is None:
            entries = enumerate(self._virtual.names(), 3)
            return dots + [(at, Entry(name, inode)) for at, (name, inode) in entries if at > cookie]
        found = await handle.reader.entries(cookie)
        if self._files:
            # A file that is open may be longer than metadata know.
            get = self._files.get
            found = [
                (at, entry if (file := get(entry.inode.ino)) is None else Entry(entry.name, file.shown(entry.inode)))
                for at, entry in found
            ]
        return dots + found if dots else found

    async def _dot_entries(self, ino: Ino, cookie: int) -> list[Positioned]:
        inode = await self.getattr(ino)
        if ino == FIRST_INO:
            parent = self.root
        else:
            parent = self.root if ino == self.root else inode.parent
        dots = [(1, Entry(b".", inode)), (2, Entry(b"..", inode._replace(ino=parent)))]
        return dots[cookie:]

    async def releasedir(self, fh: int) -> None:
        """Forget an open directory."""
        handle = self._directories.pop(fh, None)
        if handle is not None and handle.reader is not None:
            handle.reader.close()


@asynccontextmanager
async def _running(flusher: Flusher) -> AsyncIterator[None]:
    """Run the background flush while this is entered."""
    task = asyncio.create_task(flusher.run(), name="vfs-flush")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
