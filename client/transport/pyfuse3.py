"""The FUSE transport over pyfuse3: mounting, and one handler of a few lines for each request.

Import it late: pyfuse3 needs libfuse3 and takes its time. One mount per process, as pyfuse3 has it.

Owns the translation between what FUSE and what the vfs speak: attributes, flags, errors, the root's number (always 1 for the
kernel). Inode numbers are node ids and never used again, so that nothing has to be remembered for FORGET.

Must not know POSIX. Every handler goes through `_handler`, which counts it, translates errors in one table, and answers EIO
with one logged traceback when something unexpected happens: a request is never left unanswered.

What pyfuse3 3.5 with libfuse 3.14 negotiates with the kernel (seen in its debug output): 1 MiB requests, READDIRPLUS always,
ATOMIC_O_TRUNC, POSIX_ACL; no writeback cache, no HANDLE_KILLPRIV (the kernel asks for `security.capability` before each
write(2) and sends SETATTR to clear setuid bits), no DONT_MASK (the umask is applied before a default ACL could be seen), no
locks, lseek, fallocate or copy_file_range (the kernel answers those itself, or refuses).
"""

from __future__ import annotations

import asyncio
import errno as E
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter_ns
from typing import Any, Final

from chunkstore.errors import AtollError
from chunkstore.geometry import Buffer
from client import request_ids
from client.mounts import mounts_at, read_mounts
from client.transport import MountOptions, kernel_mount
from client.transport.event_loop import EventLoop, without_trio
from client.vfs.vfs import Vfs
from metasvc.model import Caller, Ino, Inode, SetAttr

with without_trio():
    import pyfuse3

_ROOT: Final = pyfuse3.ROOT_INODE
# stdio and Python's open() take their buffer's size from it, and each write(2) is a request: 4 KiB would be slow.
_BLKSIZE_BYTES: Final = 128 * 1024
_STATFS_UNIT_BYTES: Final = 4096
_NAME_MAX: Final = 255
# A request that waits (for a commit, for a bucket that is away) holds a task, and those that need no waiting must still find
# one. A task holds a buffer of 1 MiB, of which small requests touch a page.
_IDLE_TASKS: Final = 8
_MAX_TASKS: Final = 128
_DETACH_DEADLINE_S: Final = 30.0
_NOTIFY_DEADLINE_S: Final = 2.0
# Attributes that are kept longer are those of a volume that nobody else changes.
_SOLE_S: Final = 60.0
_MAX_TOLD: Final = 32_768

Method = Callable[..., Coroutine[Any, Any, Any]]


class _Option(str):
    """A mount option of any characters: pyfuse3 encodes options as ASCII, and addresses may hold others."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return super().encode("utf-8", "surrogateescape")


def _escaped(value: str) -> str:
    """Escape what would end a mount option."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


class Operations(pyfuse3.Operations):
    """The handlers. Their names and arguments are those of pyfuse3.Operations."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, vfs: Vfs, *, loop: EventLoop, on_init: Callable[[], None], log: Any) -> None:
        """Take the vfs; `loop` is told what is in work, `on_init` is called when the kernel has said hello."""
        self._vfs = vfs
        self._loop = loop
        self._log = log
        self._on_init = on_init
        self._entry_timeout_s = vfs.options.entry_timeout_s
        self._attr_timeout_s = vfs.options.attr_timeout_s
        self._told: dict[int, tuple[int, int, int]] | None = {} if self._attr_timeout_s < _SOLE_S else None
        """Length and times of files as the kernel was told them last, where others may change them; see `open`."""
        self._absent = pyfuse3.EntryAttributes()
        self._absent.st_ino = 0
        self._absent.entry_timeout = vfs.options.negative_timeout_s
        for operation, name in _HANDLERS.items():
            setattr(self, name, self._handler(operation, getattr(self, name)))

    def init(self) -> None:
        """Note the first request."""
        self._on_init()

    # -- around every handler ------------------------------------------------------------------------------------------

    def _handler(self, operation: str, method: Method) -> Method:
        """Return a handler that is counted, logged while somebody reads the access log, and fails with FUSEError only."""
        metrics = self._vfs.metrics.operation(operation)
        bits = metrics.bits
        readers = self._vfs.access_log.readers
        loop = self._loop
        is_read = operation == "READ"

        async def handler(*args: Any) -> Any:
            started_ns = perf_counter_ns()
            request = request_ids.begin(operation)
            errno = 0
            loop.requests_in_work += 1
            try:
                return await method(*args)
            except Exception as error:  # noqa: BLE001 - an edge: whatever it is, the kernel gets an answer
                errno = self._errno(operation, error)
                metrics.errors += 1
                raise pyfuse3.FUSEError(errno) from None
            finally:
                loop.requests_in_work -= 1
                duration_ns = perf_counter_ns() - started_ns
                bits[duration_ns.bit_length()] += 1
                metrics.total_ns += duration_ns
                # Who reads the log would find nothing but its own reads.
                if readers and not (is_read and self._vfs.is_access_log(args[0])):
                    self._record(request, args, errno, duration_ns)

        return handler

    def _errno(self, operation: str, error: BaseException) -> int:
        """The one table from errors to what the kernel is answered."""
        match error:
            case AtollError() if error.errno == E.ENOENT and operation in _ON_INODES:
                return E.ESTALE
            case pyfuse3.FUSEError() | AtollError():
                return error.errno
            case OSError() if error.errno:
                self._log.error("request failed", operation=operation, error=str(error))
                return error.errno
            case _:
                self._log.error("request failed unexpectedly", operation=operation, exc_info=error)
                return E.EIO

    def _record(self, request: str, args: tuple[Any, ...], errno: int, duration_ns: int) -> None:
        context = args[-1] if isinstance(args[-1], pyfuse3.RequestContext) else None
        shown = ",".join(_shown(arg) for arg in args if arg is not context)
        self._vfs.access_log.record(
            request,
            shown,
            uid=context.uid if context else -1,
            gid=context.gid if context else -1,
            pid=context.pid if context else -1,
            answer=os.strerror(errno) if errno else "OK",
            duration_ns=duration_ns,
        )

    # -- translation ---------------------------------------------------------------------------------------------------

    def _ino(self, node: int) -> Ino:
        return self._vfs.root if node == _ROOT else Ino(node)

    def _caller(self, ctx: pyfuse3.RequestContext) -> Caller:
        return self._vfs.caller(ctx.uid, ctx.gid, umask=ctx.umask)

    def _new_attributes(self) -> pyfuse3.EntryAttributes:
        """Make attributes with what is the same for all."""
        made = pyfuse3.EntryAttributes()
        made.st_blksize = _BLKSIZE_BYTES
        made.entry_timeout = self._entry_timeout_s
        made.attr_timeout = self._attr_timeout_s
        return made

    def _attributes(self, inode: Inode, found: pyfuse3.EntryAttributes | None = None) -> pyfuse3.EntryAttributes:
        """Return an inode's attributes, in what is handed over if that is free again."""
        if found is None:
            found = self._new_attributes()
        (
            ino,
            found.st_mode,
            found.st_nlink,
            found.st_uid,
            found.st_gid,
            found.st_rdev,
            size,
            found.st_atime_ns,
            found.st_mtime_ns,
            found.st_ctime_ns,
            _,
            _,
            _,
            _,
        ) = inode
        if self._told is not None:
            if len(self._told) >= _MAX_TOLD:
                self._told.clear()
            self._told[ino] = (size, found.st_mtime_ns, found.st_ctime_ns)
        found.st_ino = ino if ino != self._vfs.root else _ROOT
        found.st_size = size
        found.st_blocks = (size + 511) >> 9
        return found

    # -- names ---------------------------------------------------------------------------------------------------------

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        try:
            return self._attributes(await self._vfs.lookup(self._ino(parent_inode), name))
        except AtollError as error:
            if error.errno != E.ENOENT:
                raise
            return self._absent

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        pass

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(
            await self._vfs.mknod(self._caller(ctx), self._ino(parent_inode), name, mode=mode, rdev=rdev)
        )

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(await self._vfs.mkdir(self._caller(ctx), self._ino(parent_inode), name, mode=mode))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(await self._vfs.symlink(self._caller(ctx), self._ino(parent_inode), name, target))

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._vfs.readlink(Ino(inode))

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(
            await self._vfs.link(self._caller(ctx), Ino(inode), self._ino(new_parent_inode), new_name)
        )

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._vfs.unlink(self._caller(ctx), self._ino(parent_inode), name)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._vfs.rmdir(self._caller(ctx), self._ino(parent_inode), name)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        old, new = self._ino(parent_inode_old), self._ino(parent_inode_new)
        await self._vfs.rename(self._caller(ctx), old, name_old, new, name_new, flags=flags)

    # -- attributes ----------------------------------------------------------------------------------------------------

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes(await self._vfs.getattr(self._ino(inode)))

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = SetAttr(
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size_bytes=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._attributes(await self._vfs.setattr(self._caller(ctx), self._ino(inode), changes))

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._vfs.getxattr(self._ino(inode), name)

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return await self._vfs.listxattr(self._ino(inode))

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        # pyfuse3 has looked at XATTR_CREATE and XATTR_REPLACE itself.
        await self._vfs.setxattr(self._caller(ctx), self._ino(inode), name, value)

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._vfs.removexattr(self._caller(ctx), self._ino(inode), name)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        space = await self._vfs.statfs()
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = _STATFS_UNIT_BYTES
        found.f_blocks = space.total_bytes // _STATFS_UNIT_BYTES
        found.f_bfree = found.f_bavail = max(0, space.total_bytes - space.used_bytes) // _STATFS_UNIT_BYTES
        found.f_files = space.total_inodes
        found.f_ffree = found.f_favail = max(0, space.total_inodes - space.used_inodes)
        found.f_namemax = _NAME_MAX
        return found

    # -- files ---------------------------------------------------------------------------------------------------------

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        handle = await self._vfs.open(self._caller(ctx), self._ino(inode), flags)
        is_right = self._correct(handle.inode)
        keeps = handle.keep_cache or (is_right and handle.content is not None and self._store(inode, handle.content))
        return pyfuse3.FileInfo(fh=handle.fh, keep_cache=keeps, direct_io=handle.direct_io)

    def _store(self, inode: int, content: Buffer) -> bool:
        """Give the kernel the pages of a whole file; return whether it took them.

        They replace what it may have of another version, so it is to keep all of them. It waits for the locks of these pages,
        which a READ that is not answered holds: there must be none.
        """
        try:
            pyfuse3.notify_store(inode, 0, bytes(content))
        except OSError:
            return False  # it has forgotten the inode, or has no memory: it will ask
        return True

    def _correct(self, opened: Inode) -> bool:
        """Return whether the kernel was told what open found of a file's attributes; if not, let it ask for them again.

        It reads no further than the length that it believes in; and an answer to OPEN has no attributes. 20 us, and a GETATTR.
        """
        told = self._told
        if told is None or told.get(opened.ino) == (opened.size_bytes, opened.mtime_ns, opened.ctime_ns):
            return True
        # Of attributes alone it forgets at once: it waits for no request, unlike with names and pages.
        with suppress(FileNotFoundError):
            pyfuse3.invalidate_inode(opened.ino, attr_only=True)
        return False

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        handle = await self._vfs.create(self._caller(ctx), self._ino(parent_inode), name, mode=mode, flags=flags)
        info = pyfuse3.FileInfo(fh=handle.fh, keep_cache=handle.keep_cache, direct_io=handle.direct_io)
        return info, self._attributes(handle.inode)

    async def read(self, fh: int, off: int, size: int) -> Any:
        return await self._vfs.read(fh, off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return await self._vfs.write(fh, off, buf)

    async def flush(self, fh: int) -> None:
        await self._vfs.flush(fh)

    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001
        await self._vfs.fsync(fh)

    async def release(self, fh: int) -> None:
        await self._vfs.release(fh)

    # -- directories ---------------------------------------------------------------------------------------------------

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return await self._vfs.opendir(self._ino(inode))

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        reply, attributes = pyfuse3.readdir_reply, self._attributes
        found = self._new_attributes()
        for cookie, (name, inode) in await self._vfs.readdir(fh, start_id):
            # readdir_reply copies the attributes, so one object serves all.
            if not reply(token, name, attributes(inode, found), cookie):
                if self._told is not None:
                    # No room: the kernel was not told.
                    self._told.pop(inode.ino, None)
                return

    async def releasedir(self, fh: int) -> None:
        await self._vfs.releasedir(fh)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:  # noqa: FBT001
        pass  # every change of a name was durable before it was answered

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # asked only without default_permissions: whoever mounts so leaves it to us


_ON_INODES: Final = frozenset(
    {"OPEN", "OPENDIR", "GETATTR", "SETATTR", "READLINK", "GETXATTR", "LISTXATTR", "SETXATTR"}
)
"""Where no name is asked for, and the inode is gone: another machine has replaced or removed what a name of the kernel's stands
for. With ESTALE the kernel looks the name up again (and says ENOENT if there is none); with ENOENT the call would fail."""

_HANDLERS: Final = {
    "LOOKUP": "lookup",
    "FORGET": "forget",
    "GETATTR": "getattr",
    "SETATTR": "setattr",
    "READLINK": "readlink",
    "SYMLINK": "symlink",
    "MKNOD": "mknod",
    "MKDIR": "mkdir",
    "UNLINK": "unlink",
    "RMDIR": "rmdir",
    "RENAME": "rename",
    "LINK": "link",
    "OPEN": "open",
    "READ": "read",
    "WRITE": "write",
    "STATFS": "statfs",
    "RELEASE": "release",
    "FSYNC": "fsync",
    "SETXATTR": "setxattr",
    "GETXATTR": "getxattr",
    "LISTXATTR": "listxattr",
    "REMOVEXATTR": "removexattr",
    "FLUSH": "flush",
    "OPENDIR": "opendir",
    "READDIR": "readdir",
    "RELEASEDIR": "releasedir",
    "FSYNCDIR": "fsyncdir",
    "ACCESS": "access",
    "CREATE": "create",
}
"""FUSE's name of each request, and the method that answers it."""


def _shown(argument: Any) -> str:
    if isinstance(argument, bytes):
        return argument.decode("utf-8", "backslashreplace") if len(argument) <= _NAME_MAX else f"{len(argument)} bytes"
    return str(argument) if isinstance(argument, int) else type(argument).__name__


class Pyfuse3Transport:
    """Serve a vfs at a mount point through libfuse3. See client.transport.Transport."""

    def __init__(self, vfs: Vfs, options: MountOptions, *, log: Any) -> None:
        """Take the vfs, which is entered before serve() and left after it. Touches nothing yet."""
        self._vfs = vfs
        self._options = options
        self._log = log
        self._loop = EventLoop()
        self._mountpoint = os.path.abspath(options.mountpoint)
        self._is_detached = False
        self._ended = asyncio.Event()
        self._is_mounted = False
        self._kernel = ThreadPoolExecutor(1, thread_name_prefix="fuse-notify")
        """Invalidations block in the kernel while a request on the same directory is unanswered: never on the loop."""

    def _mount_options(self) -> set[str]:
        options = self._options
        chosen = {"default_permissions", f"fsname={_escaped(options.fsname)}", "subtype=atoll"}
        if options.allow_other:
            chosen.add("allow_other")
        if options.read_only:
            chosen.add("ro")
        if options.debug:
            chosen.add("debug")
        return {_Option(option) for option in chosen}

    async def serve(self, *, ready: Callable[[], None]) -> None:
        """Mount and answer requests until the mount is gone; see client.transport.Transport."""
        loop = asyncio.get_running_loop()

        def greeted() -> None:
            # Not before the answer is sent: with it the kernel sets the limits itself.
            loop.call_soon(self._greeted, ready)

        operations = Operations(self._vfs, loop=self._loop, on_init=greeted, log=self._log)
        pyfuse3.trio = self._loop  # type: ignore[attr-defined]
        try:
            pyfuse3.init(operations, self._mountpoint, self._mount_options())
        except RuntimeError as error:
            # libfuse has printed the reason on stderr.
            raise OSError(E.EIO, f"cannot mount: {error}", self._mountpoint) from error
        self._is_mounted = True
        self._vfs.attach(self)
        try:
            await pyfuse3.main(_IDLE_TASKS, _MAX_TASKS)
        finally:
            self._is_mounted = False
            self._loop.stop_reading()
            await self._close()
            self._ended.set()

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(_NOTIFY_DEADLINE_S):
                await asyncio.to_thread(self._kernel.shutdown, cancel_futures=True)
        except TimeoutError:
            # An invalidation is stuck behind a request that was cut off, and uses libfuse's session: the descriptor goes
            # with the process instead.
            self._log.warning("an invalidation is stuck in the kernel", mountpoint=self._mountpoint)
            return
        pyfuse3.close(unmount=not self._is_detached)

    def _greeted(self, ready: Callable[[], None]) -> None:
        for mount in mounts_at(self._mountpoint, read_mounts())[-1:]:
            kernel_mount.set_kernel_limits(
                mount.device, read_ahead_kb=self._options.read_ahead_kb, max_background=self._options.max_background
            )
        ready()

    async def stop(self, *, grace_s: float = 5.0) -> None:
        """Unmount: detach at once, let open files finish for `grace_s`, then cut them off (ENOTCONN).

        The loop ends by itself when the kernel drops the connection (ENODEV), as after umount(8).
        """
        if not self._is_mounted:
            return
        try:
            async with asyncio.timeout(_DETACH_DEADLINE_S):
                await asyncio.to_thread(kernel_mount.detach, self._mountpoint)
        except (OSError, TimeoutError) as error:
            self._log.warning("unmounting failed", mountpoint=self._mountpoint, error=str(error))
        else:
            self._is_detached = True
        if not await self._has_ended(grace_s) and self._is_mounted:
            # The loop ends without ENODEV; serve() then closes the descriptor, which fails what is still asked.
            pyfuse3.terminate()

    async def _has_ended(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    # -- client.vfs.invalidation.Invalidations -------------------------------------------------------------------------

    def entry(self, parent: Ino, name: bytes) -> None:
        """Forget a name, and the attributes of its directory."""
        self._tell(pyfuse3.invalidate_entry, self._node(parent), name)
        self._tell(pyfuse3.invalidate_inode, self._node(parent), True)

    def inode(self, ino: Ino) -> None:
        """Forget attributes and pages."""
        self._tell(pyfuse3.invalidate_inode, self._node(ino))

    def _node(self, ino: Ino) -> int:
        return _ROOT if ino == self._vfs.root else ino

    def _tell(self, notify: Callable[..., None], *args: object) -> None:
        def tell() -> None:
            try:
                notify(*args)
            except FileNotFoundError:
                pass  # the kernel does not know it
            except OSError as error:
                self._log.warning("invalidation failed", error=str(error))

        if self._is_mounted:
            self._kernel.submit(tell)
