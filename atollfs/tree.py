"""POSIX by path: one open volume as this process may use it, over client.vfs.

Owns walking (symbolic links included), the checks of permissions that a kernel does for a mount, what a compound operation
is made of (a tree removed, a file copied), and descriptors. Paths are absolute, normalized `bytes`. Every answer comes from
the volume: no name and no attribute is kept here. Must not know fsspec, threads or how the volume was opened.

Runs on the loop of the volume. Errors are FsError (or other AtollError) without the path; who called knows it.

A descriptor's release is told to the owner in the background: until then a file that lost its last name keeps its space.

Interleavings. A walk and what is done at its end are several trips: a directory renamed or a mode changed between them has the
effect of either order, as for system calls on `openat`. Nothing is kept between calls but open descriptors, and each of them
is released by the call that opened it, cancelled or not, or by its `close()`.

Symbolic links are followed inside of the volume. One whose target is absolute leads out of it, for on a mount it would name
a file of the node: ENOENT, and the message says so.
"""

from __future__ import annotations

import asyncio
import errno as E
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from contextlib import aclosing, asynccontextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from atollfs.permissions import EXECUTE, READ, WRITE, Identity, umask
from chunkstore.background import TaskSet
from chunkstore.errors import AtollError
from chunkstore.geometry import MIB, Buffer
from client.address import components
from metasvc.errors import FsError
from metasvc.model import Caller, Entry, Ino, Inode, SetAttr

if TYPE_CHECKING:
    from client.vfs.vfs import Vfs

PIECE_BYTES: Final = 4 * MIB
"""What files are written in, and copied from and to the local disk."""
READ_BYTES: Final = MIB
"""What files are read into memory in: pieces that the allocator keeps, so that only the whole is paid for in page faults."""
MAX_LINKS: Final = 40
AT_ONCE: Final = 64
"""How many names of a directory are removed at once."""
RELEASES: Final = 256
"""How many closed descriptors may wait for the owner's word before the next file is opened."""
SETTLE_S: Final = 5.0
COPY_BYTES: Final = 1 << 30
"""What one trip of a copy shares: 16 chunks."""
FILE_MODE: Final = 0o666
DIRECTORY_MODE: Final = 0o777
_LEADS_OUT: Final = "a symbolic link leads out of the volume: its target is absolute"


def refuse(errno: int, detail: str = "") -> NoReturn:
    """Raise FsError."""
    raise FsError(errno, detail)


class Listed(NamedTuple):
    """An entry of a directory."""

    name: bytes
    inode: Inode
    target: Inode | None
    """Of a symbolic link: what it leads to; None if that cannot be reached."""


class Descriptor:
    """One open file. Used on the loop of its volume, by one call at a time where order matters.

    When the volume has ended every call but close() is EBADF: what was written before is durable by then.
    """

    __slots__ = ("_flags", "_handle", "_tree")

    def __init__(self, tree: Tree, fh: int, inode: Inode, flags: int) -> None:
        """Take an open handle; close() releases it."""
        self._tree = tree
        self._handle: tuple[int, Inode] | None = (fh, inode)
        self._flags = flags

    @property
    def is_open(self) -> bool:
        return self._handle is not None

    @property
    def fh(self) -> int:
        """Return the handle of the vfs. EBADF."""
        if self._tree.has_ended:
            refuse(E.EBADF, "the volume was closed")
        return self._handle[0] if self._handle is not None else refuse(E.EBADF)

    @property
    def inode(self) -> Inode:
        """Return the attributes that open answered."""
        return self._handle[1] if self._handle is not None else refuse(E.EBADF)

    async def read(self, offset: int, size: int) -> bytes:
        """Return up to so many bytes; fewer only at the end of the file. EBADF, EIO."""
        data = await self._tree.vfs.read(self.fh, offset, size)
        # A view changes with what is written later.
        return data if isinstance(data, bytes) else bytes(data)

    async def write(self, offset: int | None, data: Buffer) -> None:
        """Write all of it, at the end of the file if there is no offset. The buffer is free again when this returns."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            place = None if offset is None else offset + start
            await self._tree.vfs.write(self.fh, place, view[start : start + PIECE_BYTES])

    async def size_bytes(self) -> int:
        """Return the length as it is now, what was written and not flushed included. One trip."""
        assert self.fh
        return (await self._tree.vfs.getattr(self.inode.ino)).size_bytes

    async def truncate(self, size_bytes: int) -> None:
        """Set the length. EFBIG, EINVAL, ENOSPC, EDQUOT."""
        assert self.fh
        vfs = self._tree.vfs
        await vfs.setattr(caller(vfs), self.inode.ino, SetAttr(size_bytes=size_bytes))

    async def flush(self) -> None:
        """Make what was written as durable as fsync(2) does. EIO …"""
        await self._tree.vfs.fsync(self.fh)

    async def close(self) -> None:
        """Do what close(2) does, its promise of durability included; raises what flush() does. May be called again.

        Released in any case; what could not be made durable stays with the vfs, which tries again in the background.
        """
        try:
            if self._handle is not None and not self._tree.has_ended and self._flags & os.O_ACCMODE != os.O_RDONLY:
                await self._tree.vfs.flush(self._handle[0])
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Release, without waiting for the trip that tells the owner. May be called again."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._tree.release(handle[0])


async def read_range(file: Descriptor, start: int, end: int | None) -> bytes:
    """Return bytes [start, end) of a file as far as it goes; None: to its end, wherever that is by then."""
    if end is not None and end - start <= READ_BYTES:
        return await file.read(start, end - start) if end > start else b""
    # It grows by mremap and hands its bytes out without copying: two to three times as fast as joining pieces.
    whole = BytesIO()
    while True:
        wanted = READ_BYTES if end is None else min(READ_BYTES, end - start)
        piece = await file.read(start, wanted) if wanted else b""
        whole.write(piece)
        start += len(piece)
        if len(piece) < READ_BYTES:
            return whole.getvalue()


def caller(vfs: Vfs) -> Caller:
    """Return the credentials of this process for one call that changes something."""
    return vfs.caller(os.geteuid(), os.getegid(), umask=umask())


class Tree:
    """The files of one volume."""

    def __init__(self, vfs: Vfs) -> None:
        """Take a vfs that was entered."""
        self.vfs = vfs
        self.has_ended = False
        """Set when the volume begins to end: descriptors are refused from then on."""
        self._releases = TaskSet()
        self._released = asyncio.Event()

    async def close(self) -> None:
        """Refuse descriptors from now on; see that those that were closed are released."""
        self.has_ended = True
        await self._releases.settle(timeout_s=SETTLE_S)
        await self._releases.close()

    def release(self, fh: int) -> None:
        """Release a handle in the background: nobody needs to wait for the owner to hear of it."""
        if not self.has_ended:
            self._releases.start(self._release(fh), name="release", raises=(AtollError,))

    async def _release(self, fh: int) -> None:
        try:
            await self.vfs.release(fh)
        finally:
            self._released.set()

    # -- walking -------------------------------------------------------------------------------------------------------

    async def stat(self, path: bytes, *, follow: bool = True) -> Inode:
        """Return what a path names. ENOENT, ENOTDIR, EACCES, ELOOP, ENAMETOOLONG. One trip where no link is in the way."""
        names = components(path)
        who = Identity.of_process()
        try:
            found = await self.vfs.resolve(names)
        except FsError as error:
            # A link in the middle is ENOTDIR; and who may not enter a directory must not learn what is missing in it.
            if error.errno == E.ENOTDIR or who.uid:
                return await self._walk(names, who, follow=follow)
            raise
        inode = found[-1]
        if (follow and inode.is_symlink) or not all(who.may(directory, EXECUTE) for directory in found[:-1]):
            return await self._walk(names, who, follow=follow)
        return inode

    async def _walk(self, names: list[bytes], who: Identity, *, follow: bool) -> Inode:
        """Walk a name at a time. Follows links; the last one only if it says so."""
        vfs = self.vfs
        current = await vfs.getattr(vfs.root)
        left = names[::-1]
        links = 0
        while left:
            name = left.pop()
            if not current.is_dir:
                refuse(E.ENOTDIR)
            if not who.may(current, EXECUTE):
                refuse(E.EACCES)
            inode = await vfs.lookup(current.ino, name)
            if not inode.is_symlink or not (left or follow):
                current = inode
                continue
            links += 1
            if links > MAX_LINKS:
                refuse(E.ELOOP)
            target = await vfs.readlink(inode.ino)
            if target.startswith(b"/"):
                refuse(E.ENOENT, _LEADS_OUT)
            left += [part for part in target.split(b"/") if part not in (b"", b".")][::-1]
        return current

    async def _parent(self, path: bytes, *, refusal: int) -> tuple[Inode, bytes]:
        """Return the directory and the name in it; ``refusal`` for the root, which has no name."""
        above, _, name = path.rpartition(b"/")
        if not name:
            refuse(refusal)
        directory = await self.stat(above or b"/")
        if not directory.is_dir:
            refuse(E.ENOTDIR)
        return directory, name

    async def _changeable(self, path: bytes, *, refusal: int) -> tuple[Inode, bytes]:
        """Return as _parent() does, if names may be added and removed there. EACCES."""
        directory, name = await self._parent(path, refusal=refusal)
        if not Identity.of_process().may(directory, WRITE | EXECUTE):
            refuse(E.EACCES)
        return directory, name

    async def _removable(self, path: bytes, *, refusal: int) -> tuple[Inode, bytes, Inode]:
        """Return directory, name and inode, if it may be removed from there. EACCES; EPERM for a sticky directory."""
        directory, name = await self._changeable(path, refusal=refusal)
        inode = await self.vfs.lookup(directory.ino, name)
        if not Identity.of_process().may_remove(directory, inode):
            refuse(E.EPERM)
        return directory, name, inode

    # -- directories ---------------------------------------------------------------------------------------------------

    async def readdir(self, path: bytes) -> list[Listed]:
        """Return the entries of a directory in order of their names. ENOTDIR, EACCES. One trip per 1,000, more for links."""
        directory = await self.stat(path)
        if not directory.is_dir:
            refuse(E.ENOTDIR)
        if not Identity.of_process().may(directory, READ | EXECUTE):
            refuse(E.EACCES)
        entries = [entry async for batch in self._entries(directory.ino) for entry in batch]
        links = [entry.name for entry in entries if entry.inode.is_symlink]
        targets: dict[bytes, Inode | None] = {}
        for first in range(0, len(links), AT_ONCE):
            names = links[first : first + AT_ONCE]
            targets.update(zip(names, await asyncio.gather(*(self._target(path, name) for name in names)), strict=True))
        return [Listed(entry.name, entry.inode, targets.get(entry.name)) for entry in entries]

    async def _target(self, directory: bytes, name: bytes) -> Inode | None:
        try:
            return await self.stat(directory.rstrip(b"/") + b"/" + name)
        except FsError:
            return None

    async def _entries(self, ino: Ino) -> AsyncGenerator[list[Entry], None]:
        """Yield the entries of a directory as they come, `.` and `..` not among them."""
        vfs = self.vfs
        fh = await vfs.opendir(ino)
        try:
            position = 2
            while found := await vfs.readdir(fh, position):
                position = found[-1][0]
                yield [entry for _, entry in found]
        finally:
            await vfs.releasedir(fh)

    async def mkdir(self, path: bytes) -> None:
        """Make a directory. EEXIST, ENOENT, ENOTDIR, EACCES, ENOSPC, EDQUOT."""
        directory, name = await self._parent(path, refusal=E.EEXIST)
        if not Identity.of_process().may(directory, WRITE | EXECUTE):
            # That it is there already is told to who may not make it, too.
            await self._refuse_existing(directory, name)
            refuse(E.EACCES)
        await self.vfs.mkdir(caller(self.vfs), directory.ino, name, mode=DIRECTORY_MODE)

    async def _refuse_existing(self, directory: Inode, name: bytes) -> None:
        try:
            await self.vfs.lookup(directory.ino, name)
        except FsError:
            return
        refuse(E.EEXIST)

    async def makedirs(self, path: bytes, *, exist_ok: bool) -> None:
        """Make a directory and those above it that are missing. EEXIST for another thing there, or without ``exist_ok``."""
        try:
            await self.mkdir(path)
        except FsError as error:
            if error.errno == E.EEXIST:
                if exist_ok and (await self.stat(path)).is_dir:
                    return
                raise
            if error.errno != E.ENOENT or path == b"/":
                raise
            await self.makedirs(_above(path), exist_ok=True)
            # Somebody may have made it meanwhile.
            await self.makedirs(path, exist_ok=exist_ok)

    async def rmdir(self, path: bytes) -> None:
        """Remove an empty directory. ENOENT, ENOTDIR, ENOTEMPTY, EBUSY (the root), EACCES, EPERM."""
        directory, name, _ = await self._removable(path, refusal=E.EBUSY)
        await self.vfs.rmdir(caller(self.vfs), directory.ino, name)

    # -- names ---------------------------------------------------------------------------------------------------------

    async def unlink(self, path: bytes) -> None:
        """Remove a file or link. ENOENT, EISDIR, EACCES, EPERM."""
        directory, name, inode = await self._removable(path, refusal=E.EISDIR)
        if inode.is_dir:
            refuse(E.EISDIR)
        await self.vfs.unlink(caller(self.vfs), directory.ino, name)

    async def remove_tree(self, path: bytes) -> None:
        """Remove a file, or a directory with all below it; links are not followed. The root is emptied and stays.

        What may not be removed stops it (EACCES, EPERM), with the rest as far as it came. One operation for each name.
        """
        if path == b"/":
            await self._empty(await self.vfs.getattr(self.vfs.root))
            return
        directory, _, inode = await self._removable(path, refusal=E.EBUSY)
        await self._remove(directory, Entry(path.rpartition(b"/")[2], inode))

    async def _remove(self, directory: Inode, entry: Entry) -> None:
        vfs = self.vfs
        if not entry.inode.is_dir:
            await vfs.unlink(caller(vfs), directory.ino, entry.name)
            return
        await self._empty(entry.inode)
        await vfs.rmdir(caller(vfs), directory.ino, entry.name)

    async def _empty(self, directory: Inode) -> None:
        who = Identity.of_process()
        async with aclosing(self._entries(directory.ino)) as batches:
            async for batch in batches:
                if not who.may(directory, READ | WRITE | EXECUTE):
                    refuse(E.EACCES)
                if not all(who.may_remove(directory, entry.inode) for entry in batch):
                    refuse(E.EPERM)
                # Directories one after the other: each is as many operations as it has names.
                for entry in batch:
                    if entry.inode.is_dir:
                        await self._remove(directory, entry)
                files = [entry for entry in batch if not entry.inode.is_dir]
                for first in range(0, len(files), AT_ONCE):
                    await all_of(self._remove(directory, entry) for entry in files[first : first + AT_ONCE])

    async def rename(self, old: bytes, new: bytes) -> None:
        """Rename as rename(2): atomic, a file at the new name is replaced. EXDEV between directories with other quotas."""
        directory, name = await self._changeable(old, refusal=E.EBUSY)
        new_directory, new_name = await self._changeable(new, refusal=E.EBUSY)
        who = Identity.of_process()
        if who.uid:
            inode = await self.vfs.lookup(directory.ino, name)
            if not who.may_remove(directory, inode):
                refuse(E.EPERM)
            if inode.is_dir and directory.ino != new_directory.ino and not who.may(inode, WRITE):
                refuse(E.EACCES)
            try:
                replaced = await self.vfs.lookup(new_directory.ino, new_name)
            except FsError:
                pass
            else:
                if not who.may_remove(new_directory, replaced):
                    refuse(E.EPERM)
        await self.vfs.rename(caller(self.vfs), directory.ino, name, new_directory.ino, new_name)

    # -- files ---------------------------------------------------------------------------------------------------------

    async def open(self, path: bytes, flags: int) -> Descriptor:
        """Open a regular file as open(2), with O_CREAT, O_EXCL and O_TRUNC. ENOENT, EEXIST, EISDIR, EACCES, ENXIO …

        One trip to walk and one to open. A link that leads nowhere is ENOENT also with O_CREAT.
        """
        while len(self._releases) > RELEASES:
            self._released.clear()
            await self._released.wait()
        if flags & os.O_CREAT:
            return await self._create(path, flags)
        return await self._open(await self.stat(path), flags)

    async def _open(self, inode: Inode, flags: int) -> Descriptor:
        if inode.is_dir:
            refuse(E.EISDIR)
        wanted = {os.O_RDONLY: READ, os.O_WRONLY: WRITE}.get(flags & os.O_ACCMODE, READ | WRITE)
        if not Identity.of_process().may(inode, wanted):
            refuse(E.EACCES)
        handle = await self.vfs.open(caller(self.vfs), inode.ino, flags)
        return Descriptor(self, handle.fh, handle.inode, flags)

    async def _create(self, path: bytes, flags: int) -> Descriptor:
        vfs = self.vfs
        directory, name = await self._parent(path, refusal=E.EISDIR)
        who = Identity.of_process()
        if who.uid:
            # Root may do either; for others it matters whether the file is there.
            try:
                inode = await vfs.lookup(directory.ino, name)
            except FsError as error:
                if error.errno != E.ENOENT:
                    raise
                if not who.may(directory, WRITE | EXECUTE):
                    refuse(E.EACCES)
            else:
                if flags & os.O_EXCL:
                    refuse(E.EEXIST)
                return await self._open(await self.stat(path) if inode.is_symlink else inode, flags)
        try:
            handle = await vfs.create(caller(vfs), directory.ino, name, mode=FILE_MODE, flags=flags)
        except FsError as error:
            if error.errno not in (E.EEXIST, E.EINVAL) or flags & os.O_EXCL:
                raise
            # No regular file: a link, perhaps to one.
            return await self._open(await self.stat(path), flags)
        return Descriptor(self, handle.fh, handle.inode, flags)

    @asynccontextmanager
    async def opened(self, path: bytes, flags: int) -> AsyncIterator[Descriptor]:
        """Open a file for the length of a block; leaving closes it, with close(2)'s errors."""
        descriptor = await self.open(path, flags)
        try:
            yield descriptor
        finally:
            await descriptor.close()

    async def read_file(self, path: bytes, start: int, end: int | None) -> bytes:
        """Return bytes [start, end) of a file; negative numbers count from its end, None is the end."""
        async with self.opened(path, os.O_RDONLY) as file:
            size = file.inode.size_bytes
            first, last, _ = slice(start, end).indices(size)
            return await read_range(file, first, last)

    async def write_file(self, path: bytes, data: Buffer, *, exclusive: bool) -> None:
        """Make or replace a file; durable when this returns. EEXIST if it is ``exclusive`` and the file is there."""
        flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if exclusive else os.O_TRUNC)
        async with self.opened(path, flags) as file:
            await file.write(0, data)

    async def copy(self, source: bytes, target: bytes) -> None:
        """Copy a file without moving bytes: both name the same slices. EINVAL if both are one file. A trip per GiB."""
        vfs = self.vfs
        async with self.opened(source, os.O_RDONLY) as origin, self.opened(target, os.O_WRONLY | os.O_CREAT) as copied:
            if origin.inode.ino == copied.inode.ino:
                refuse(E.EINVAL, "a file cannot be copied onto itself")
            if copied.inode.size_bytes:
                await copied.truncate(0)
            done = 0
            while step := await vfs.copy_range(caller(vfs), origin.fh, done, copied.fh, done, COPY_BYTES):
                done += step

    async def touch(self, path: bytes, *, truncate: bool) -> None:
        """Make a file; if it is there set its times to now, and empty it if that is asked for. EACCES, ENOENT …"""
        try:
            # What is new has these times: one commit instead of two.
            await (await self.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)).close()
        except FsError as error:
            if error.errno != E.EEXIST:
                raise
        else:
            return
        async with self.opened(path, os.O_WRONLY | (os.O_TRUNC if truncate else 0)) as file:
            await self.vfs.setattr(caller(self.vfs), file.inode.ino, SetAttr(atime_now=True, mtime_now=True))


def _above(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or b"/"


async def all_of(calls: Iterable[Awaitable[Any]]) -> None:
    """Await all, then raise the first error, if there was any: nothing is left running."""
    for result in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def kind(inode: Inode) -> str:
    """Return what fsspec calls it: file, directory, link, other."""
    if inode.is_file:
        return "file"
    if inode.is_dir:
        return "directory"
    return "link" if stat.S_ISLNK(inode.mode) else "other"


def as_os_error(error: AtollError, path: str) -> OSError:
    """Return the OSError of the class that belongs to the errno: FileNotFoundError, PermissionError …"""
    return OSError(error.errno, error.message, path)
