"""File objects: a descriptor of a volume as Python's io knows files, and one for coroutines.

Owns position, buffering and what happens to files that nobody closes. Must not know paths, URLs or permissions.

`RawFile` is io.RawIOBase over a descriptor: a call is a trip to the home loop and back (0.1 ms). What is read comes back as
bytes, what is written goes there as bytes: copied once, in the caller's thread. The loop never touches a caller's buffer, for
a caller that was interrupted (Ctrl-C) does not stop the loop, and may have freed or changed it. The classes that users get
add the standard library's buffers, of `block_size`, so that small reads and writes cost no trip; what is larger than the
buffer passes it by. There is no other cache of content: the vfs reads ahead, and keeps what it read in images on disk.

Threads. io's buffered classes lock themselves; RawFile adds nothing, as io.FileIO does not. The position is the file object's.

Collected without close(). The interpreter then calls close() on whatever thread it is, the home loop's included, which cannot
wait for itself. There the writes and the close are begun as tasks, in order, and their errors are logged.

Fork. A descriptor of the parent is refused in the child, and close() does nothing there: what is in the buffer is the
parent's to write.
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from atollfs.tree import PIECE_BYTES, Descriptor, as_os_error, read_range
from atollfs.volumes import NotAfterFork, home_loop, note_open, on_home_loop, run_at_home
from chunkstore.errors import AtollError
from chunkstore.geometry import KIB, MIB, Buffer

if TYPE_CHECKING:
    from atollfs.filesystem import AtollFileSystem

T = TypeVar("T")

READ_BUFFER_BYTES: Final = 128 * KIB
WRITE_BUFFER_BYTES: Final = MIB
"""docs/adr/0060 has the figures: twice as much makes reading 4 KiB at random twice as slow."""
MODES: Final = {
    "rb": os.O_RDONLY,
    "r+b": os.O_RDWR,
    "wb": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "w+b": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "xb": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "x+b": os.O_RDWR | os.O_CREAT | os.O_EXCL,
    "ab": os.O_WRONLY | os.O_CREAT | os.O_APPEND,
    "a+b": os.O_RDWR | os.O_CREAT | os.O_APPEND,
}
"""What open(2) is given for each mode."""
log = logging.getLogger("atollfs")


def canonical_mode(mode: str) -> str:
    """Return the mode as MODES spells it; ValueError for one that opens no binary file."""
    letters = set(mode)
    kind = letters & set("rwxa")
    if len(kind) != 1 or letters - set("rwxab+") or len(letters) != len(mode):
        raise ValueError(f"mode {mode!r} opens no binary file: give rb, wb, xb or ab, with + to read and write")
    return kind.pop() + ("+" if "+" in letters else "") + "b"


class Publication:
    """What becomes of a file that was written in a transaction: it appears under its name, or it goes."""

    def __init__(self, fs: AtollFileSystem, temporary: str, path: str) -> None:
        self.fs = fs
        self.temporary = temporary
        self.path = path


class _Append:
    """What became of bytes that were to be appended, for a caller that was interrupted while it waited."""

    __slots__ = ("has_begun", "is_over", "written")

    def __init__(self) -> None:
        self.has_begun = False
        self.is_over = asyncio.Event()
        self.written = b""
        """What of it is in the file, when it is over."""


class RawFile(io.RawIOBase):
    """An open file without a buffer."""

    def __init__(self, descriptor: Descriptor, *, path: str, mode: str) -> None:
        """Take an open descriptor, which close() closes. ``mode`` is one of MODES."""
        super().__init__()
        self.path = path
        self.mode = mode
        self._descriptor = descriptor
        self._pid = os.getpid()
        flags = MODES[mode]
        self._can_read = flags & os.O_ACCMODE != os.O_WRONLY
        self._can_write = flags & os.O_ACCMODE != os.O_RDONLY
        self._appends = bool(flags & os.O_APPEND)
        self._position = descriptor.inode.size_bytes if self._appends else 0
        self._deferred: asyncio.Task[None] | None = None
        self._interrupted: _Append | None = None
        """The last append, if its caller was interrupted."""

    # -- going to the loop and back ------------------------------------------------------------------------------------

    def _run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if self._pid != os.getpid():
            raise NotAfterFork
        try:
            return run_at_home(call)
        except AtollError as error:
            raise as_os_error(error, self.path) from error

    def _is_on_home_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is home_loop()
        except RuntimeError:
            return False

    def _defer(self, call: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Begin a call that nobody can wait for, behind those begun before."""
        before = self._deferred
        path = self.path

        async def later() -> None:
            if before is not None:
                await before
            try:
                await call()
            except Exception:
                log.exception("%s was not closed by the program, and closing it failed", path)

        self._deferred = _KEPT.start(later())

    # -- io ------------------------------------------------------------------------------------------------------------

    def _check(self, can: bool, what: str) -> None:  # noqa: FBT001
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        if not can:
            raise io.UnsupportedOperation(f"the file is not open for {what}")

    def readable(self) -> bool:
        return self._can_read

    def writable(self) -> bool:
        return self._can_write

    def seekable(self) -> bool:
        return True

    def _read(self, size: int) -> bytes:
        position = self._position
        data = self._run(lambda: self._descriptor.read(position, size))
        self._position = position + len(data)
        return data

    def read(self, size: int | None = -1) -> bytes:
        """Return up to so many bytes, all that is left for -1; fewer only at the end of the file."""
        self._check(self._can_read, "reading")
        return self.readall() if size is None or size < 0 else self._read(size)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes; the number of bytes."""
        self._check(self._can_read, "reading")
        view = memoryview(buffer).cast("B")
        data = self._read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        """Return all from here to the end."""
        self._check(self._can_read, "reading")
        position = self._position
        data = self._run(lambda: read_range(self._descriptor, position, None))
        self._position = position + len(data)
        return data

    def write(self, data: Any) -> int:
        """Write at most 4 MiB of it; the number of bytes, as of raw files. (The buffered ones write all.)"""
        self._check(self._can_write, "writing")
        view = memoryview(data).cast("B")[:PIECE_BYTES]
        position = self._position
        # Copied, because a caller that is interrupted here does not stop the loop, and goes on to use its buffer.
        kept = bytes(view)
        if self._appends:
            self._append(kept)
        elif self._is_on_home_loop():
            self._defer(lambda: self._descriptor.write(position, kept))
        else:
            self._run(lambda: self._descriptor.write(position, kept))
        self._position += len(view)
        return len(view)

    def _append(self, data: bytes) -> None:
        """Write at the end of the file, once.

        A caller that is interrupted leaves its write behind; io's buffered classes keep their buffer then, and give it again.
        So what begins with the bytes of an interrupted call that are in the file is the same call. (Who meant to append equal
        bytes twice was told that the first call failed, and finds it without effect.)
        """
        before, this = self._interrupted, _Append()

        async def append() -> None:
            this.has_begun = True
            try:
                # Calls get to the loop in order: one that has not begun by now never got there.
                if before is not None and before.has_begun:
                    await before.is_over.wait()
                    if data.startswith(before.written):
                        this.written = before.written
                if len(data) > len(this.written):
                    await self._descriptor.write(None, data[len(this.written) :])
                    this.written = data
            finally:
                this.is_over.set()

        self._interrupted = this
        if self._is_on_home_loop():
            self._defer(append)
        else:
            self._run(append)
        self._interrupted = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; from the end it is one trip to ask how long the file is."""
        self._check(can=True, what="seeking")
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += self._run(self._descriptor.size_bytes)
        elif whence != os.SEEK_SET:
            raise ValueError(f"whence {whence} is none of SEEK_SET, SEEK_CUR, SEEK_END")
        if offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.path)
        self._position = offset
        return offset

    def tell(self) -> int:
        self._check(can=True, what="seeking")
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Set the length, to the position if none is given; the position stays."""
        self._check(self._can_write, "writing")
        size_bytes = self._position if size is None else size
        self._run(lambda: self._descriptor.truncate(size_bytes))
        return size_bytes

    def sync(self) -> None:
        """Do what fsync(2) does."""
        self._run(self._descriptor.flush)

    def close(self) -> None:
        """Close; a file that was written is then as durable as after close(2) on a mount. EIO, ENOSPC …"""
        if self.closed:
            return
        super().close()
        if self._pid != os.getpid():
            return
        if not self._can_write:
            with suppress(RuntimeError):  # the interpreter ends
                home_loop().call_soon_threadsafe(self._descriptor.let_go)
        elif self._is_on_home_loop():
            self._defer(self._descriptor.close)
        else:
            self._run(self._descriptor.close)


class _Kept:
    """Tasks that nobody awaits, kept from the garbage collector until they end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


_KEPT: Final = _Kept()


class _File:
    """What the file objects of this package have beside Python's: where they are from, and a transaction's end."""

    raw: RawFile
    fs: AtollFileSystem
    path: str
    publication: Publication | None

    def _describe(self, fs: AtollFileSystem, publication: Publication | None) -> None:
        self.fs = fs
        self.path = self.raw.path if publication is None else publication.path
        self.publication = publication

    @property
    def size(self) -> int:
        """Return the length in bytes as open(2) found it."""
        return self.raw._descriptor.inode.size_bytes

    @property
    def full_name(self) -> str:
        """Return the file's URL."""
        return self.fs.unstrip_protocol(self.path)

    def info(self) -> dict[str, Any]:
        """Return what fs.info() does, now."""
        found: dict[str, Any] = self.fs.info(self.path)
        return found

    def commit(self) -> None:
        """Let a file that was written in a transaction appear under its name, at once and whole."""
        if self.publication is not None:
            self.fs.publish(self.publication.temporary, self.publication.path)

    def discard(self) -> None:
        """Remove what was written in a transaction that failed."""
        if self.publication is not None:
            self.fs.rm_file(self.publication.temporary)


class ReadFile(_File, io.BufferedReader):
    """A file open for reading. Pickles as what it is: the other process opens it anew, at the same position."""

    raw: RawFile

    def __init__(self, raw: RawFile, buffer_bytes: int, *, fs: AtollFileSystem) -> None:
        """Take an unbuffered file."""
        io.BufferedReader.__init__(self, raw, buffer_bytes)
        self._describe(fs, None)
        self._buffer_bytes = buffer_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.fs, self.path, self._buffer_bytes, self.tell())


class WriteFile(_File, io.BufferedWriter):
    """A file open for writing."""

    raw: RawFile

    def __init__(
        self, raw: RawFile, buffer_bytes: int, *, fs: AtollFileSystem, publication: Publication | None
    ) -> None:
        """Take an unbuffered file."""
        io.BufferedWriter.__init__(self, raw, buffer_bytes)
        self._describe(fs, publication)
        note_open(self)

    def sync(self) -> None:
        """Make what was written so far durable, as fsync(2) does."""
        self.flush()
        self.raw.sync()


class UpdateFile(_File, io.BufferedRandom):
    """A file open for reading and writing."""

    raw: RawFile

    def __init__(
        self, raw: RawFile, buffer_bytes: int, *, fs: AtollFileSystem, publication: Publication | None
    ) -> None:
        """Take an unbuffered file."""
        io.BufferedRandom.__init__(self, raw, buffer_bytes)
        self._describe(fs, publication)
        note_open(self)

    def sync(self) -> None:
        """Make what was written so far durable, as fsync(2) does."""
        self.flush()
        self.raw.sync()


def _reopen(fs: AtollFileSystem, path: str, buffer_bytes: int, position: int) -> ReadFile:
    file: ReadFile = fs.open(path, "rb", block_size=buffer_bytes)
    file.seek(position)
    return file


class AsyncFile:
    """An open file for coroutines, of any loop, by one task at a time. Unbuffered: each call is a trip to the home loop.

    Close it (`async with`): a file that is collected open keeps its descriptor until the volume ends.
    """

    def __init__(self, descriptor: Descriptor, *, fs: AtollFileSystem, path: str, mode: str) -> None:
        """Take an open descriptor, which close() closes. ``mode`` is one of MODES."""
        self.fs = fs
        """Held, as the volume ends with the last file system that uses it."""
        self.path = path
        self.mode = mode
        self.size = descriptor.inode.size_bytes
        """The length in bytes as open(2) found it."""
        flags = MODES[mode]
        self._descriptor = descriptor
        self._can_read = flags & os.O_ACCMODE != os.O_WRONLY
        self._can_write = flags & os.O_ACCMODE != os.O_RDONLY
        self._appends = bool(flags & os.O_APPEND)
        self._position = self.size if self._appends else 0

    async def _run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        try:
            return await on_home_loop(call)
        except AtollError as error:
            raise as_os_error(error, self.path) from error

    def _check(self, can: bool, what: str) -> None:  # noqa: FBT001
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        if not can:
            raise io.UnsupportedOperation(f"the file is not open for {what}")

    @property
    def closed(self) -> bool:
        return not self._descriptor.is_open

    async def read(self, length: int = -1) -> bytes:
        """Return up to so many bytes, all that is left for -1; fewer only at the end of the file."""
        self._check(self._can_read, "reading")
        start = self._position

        end = None if length < 0 else start + length
        data = await self._run(lambda: read_range(self._descriptor, start, end))
        self._position = start + len(data)
        return data

    async def write(self, data: Buffer) -> int:
        """Write all of it; the buffer must not change until this returns."""
        self._check(self._can_write, "writing")
        offset = None if self._appends else self._position
        await self._run(lambda: self._descriptor.write(offset, data))
        size = memoryview(data).nbytes
        self._position += size
        return size

    async def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; from the end it is one trip to ask how long the file is."""
        self._check(can=True, what="seeking")
        if whence == os.SEEK_CUR:
            offset += self._position
        elif whence == os.SEEK_END:
            offset += await self._run(self._descriptor.size_bytes)
        if offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self.path)
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    async def flush(self) -> None:
        """Make what was written durable, as fsync(2) does."""
        self._check(can=True, what="flushing")
        if self._can_write:
            await self._run(self._descriptor.flush)

    async def close(self) -> None:
        """Close; a file that was written is then as durable as after close(2) on a mount. EIO, ENOSPC …"""
        await self._run(self._descriptor.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
