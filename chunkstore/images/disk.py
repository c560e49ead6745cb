"""The system calls on the local disk, in one place, so that tests can record them and replay a loss of power.

Owns nothing. Every method may block and runs on the disk executor, except `try_pread`. Errors are OSErrors as they come.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from chunkstore.geometry import Buffer

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


class Space(NamedTuple):
    """Say how big a file system is and how much of it is left, in bytes."""

    total_bytes: int
    free_bytes: int


class Disk:
    """Make the calls for real."""

    def open(self, path: str, flags: int) -> int:
        """Open a file, readable by its owner only."""
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def duplicate(self, descriptor: int) -> int:
        """Return a second descriptor of an open file."""
        return os.dup(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def pread(self, descriptor: int, size_bytes: int, offset: int) -> bytes:
        """Read up to so many bytes; fewer only at the end of the file."""
        data = os.pread(descriptor, size_bytes, offset)
        if len(data) == size_bytes or not data:
            return data
        # The end of the file, or a read that a signal cut short.
        parts, done = [data], len(data)
        while done < size_bytes and (data := os.pread(descriptor, size_bytes - done, offset + done)):
            parts.append(data)
            done += len(data)
        return b"".join(parts)

    def try_pread(self, descriptor: int, buffer: bytearray, offset: int) -> int:
        """Read what the page cache holds, without waiting; -1 where it holds nothing or cannot be asked."""
        try:
            return os.preadv(descriptor, (buffer,), offset, os.RWF_NOWAIT)
        except OSError:
            return -1

    def pread_once(self, descriptor: int, size_bytes: int, offset: int) -> bytes:
        """Read like `pread`, but leave the page cache as it was: what was not in it is dropped again."""
        was_cached = self.try_pread(descriptor, bytearray(1), offset) == 1
        data = self.pread(descriptor, size_bytes, offset)
        if not was_cached:
            self.drop_pages(descriptor, offset, size_bytes)
        return data

    def will_need(self, descriptor: int, offset: int, size_bytes: int) -> None:
        """Ask the kernel to load a range into the page cache."""
        os.posix_fadvise(descriptor, offset, size_bytes, os.POSIX_FADV_WILLNEED)

    def pwrite(self, descriptor: int, data: Buffer, offset: int) -> None:
        """Write all of the bytes."""
        written = os.pwrite(descriptor, data, offset)
        view = memoryview(data)
        while written < view.nbytes:
            step = os.pwrite(descriptor, view[written:], offset + written)
            if step == 0:
                raise OSError(errno.EIO, "write of 0 bytes")
            written += step

    def drop_pages(self, descriptor: int, offset: int, size_bytes: int) -> None:
        """Take what is synced of a range out of the page cache; a hint, which file systems may ignore."""
        os.posix_fadvise(descriptor, offset, size_bytes, os.POSIX_FADV_DONTNEED)

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        """Set the length of a file; what is added is a hole."""
        os.ftruncate(descriptor, size_bytes)

    def size(self, descriptor: int) -> int:
        """Return the length of a file in bytes."""
        return os.fstat(descriptor).st_size

    def allocated(self, path: str) -> int:
        """Return the space that a file takes, in bytes."""
        return os.stat(path).st_blocks * 512

    def punch(self, descriptor: int, offset: int, size_bytes: int) -> None:
        """Give the space of a range back; it reads as zeros from now on."""
        if _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, offset, size_bytes) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def datasync(self, descriptor: int) -> None:
        """Make the contents of a file durable, with its length; raise what earlier writing back failed with."""
        os.fdatasync(descriptor)

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: str, target: str) -> None:
        """Rename a file, replacing what had that name."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """Remove a name; an absent one is fine."""
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass

    def make_directory(self, path: str) -> None:
        """Make a directory for its owner only; an existing one is fine."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass

    def names(self, path: str) -> Iterator[str]:
        """Yield the names in a directory, in no order."""
        with os.scandir(path) as entries:
            for entry in entries:
                yield entry.name

    def space(self, path: str) -> Space:
        """Return size and free space of the file system of a path."""
        status = os.statvfs(path)
        return Space(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)
