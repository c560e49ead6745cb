"""A directory as a bucket: objects are files, keys are relative paths.

Owns the order of writes and syncs that makes an object atomic and durable. obstore's LocalStore was looked at with strace: it
writes beside the target and renames, but syncs neither file nor directory, so a put that returned could be lost.

A put: make missing directories (each entry fsynced in its parent) -> write `.tmp-…` in the target's directory -> fsync it ->
rename, or link where nothing may be replaced -> fsync the directory. Hence at every moment, also after a crash, the key
names nothing, the old or the new object, never a part of one; and when put returns the object survives a loss of power.
A crash leaves at most `.tmp-…` files, which no listing shows and a listing removes once they are an hour old.

Interleavings. Calls run on two bounded pools of threads, reads on one so that they do not queue behind syncs. Puts into one
directory at the same time share its fsync: each takes a number after its rename, and a sync that began later covers it.
Directories are made under a lock and never removed, so one that is known to be durable stays so; if somebody else removed
one, the open of the temporary file says so and it is made again. Any number of processes may share the directory.
A cancelled call leaves its thread running to its end: a cancelled put may still store its object, whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import islice
from typing import Final, TypeVar

from chunkstore.buckets import RESERVED_PREFIX, ObjectInfo, check_delete, check_key, check_prefix
from chunkstore.buckets.probe import PROBE_TIMEOUT_S, probe_store
from chunkstore.errors import (
    BucketDenied,
    BucketFull,
    BucketInvalid,
    BucketUnavailable,
    ObjectExists,
    ObjectMissing,
)
from chunkstore.geometry import MIB, Buffer
from chunkstore.threads import Threads

T = TypeVar("T")

# Blocks so long are kept by who asked for them, and would lie in the page cache a second time (docs/adr/0013).
_READ_ONCE_BYTES: Final = MIB
# Far longer than any put may take.
LEFTOVER_AGE_S: Final = 3600
_READERS: Final = 8
_WRITERS: Final = 16
_LISTED_AT_ONCE: Final = 1000
# One entry per 2^20 slices of a volume, so this is hundreds of full volumes; beyond it directories are looked at again.
_KNOWN_DIRECTORIES: Final = 4096

_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_PASSING: Final = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
    }
)


class Disk:
    """Change a file system: every call through which a put or delete does so, as the system has it.

    A seam: the tests record these calls and play a loss of power at any moment between them.
    """

    def create(self, path: str) -> int:
        """Open a new file for writing; OSError EEXIST if there is one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, descriptor: int, data: memoryview) -> None:
        """Append all of the bytes."""
        while data:
            data = data[os.write(descriptor, data) :]

    def sync_file(self, descriptor: int) -> None:
        """Make the bytes of a file durable. fdatasync writes the size of a new file too; what it spares is the times."""
        os.fdatasync(descriptor)

    def drop_pages(self, descriptor: int) -> None:
        """Take what is synced of a file out of the page cache; a hint, which file systems may ignore."""
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self, descriptor: int) -> None:
        """Close a file; some file systems report a failed write only here."""
        os.close(descriptor)

    def replace(self, source: str, target: str) -> None:
        """Rename a file over what has that name."""
        os.replace(source, target)

    def link(self, source: str, target: str) -> None:
        """Give a file a further name; OSError EEXIST if something has it."""
        os.link(source, target)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Make a directory for this user alone."""
        os.mkdir(path, 0o700)

    def sync_directory(self, path: str) -> None:
        """Make the entries of a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class DirectoryStore:
    """Keep objects as files under one directory, which must exist."""

    def __init__(self, root: str, *, disk: Disk | None = None) -> None:
        """Take the absolute path of the directory. Touches nothing."""
        self._root = root
        self._disk = disk or Disk()
        self._readers = Threads(_READERS, name="bucket-read")
        self._writers = Threads(_WRITERS, name="bucket-write")
        self._known: set[str] = set()
        self._making = threading.Lock()
        self._syncs: dict[str, _SharedSync] = {}

    def __str__(self) -> str:
        """Name the bucket for messages."""
        return f"directory {self._root}"

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        """Return the bytes `[start, end)` of an object. Costs open, pread, close."""
        path = self._path(key)
        return await self._run(self._readers, lambda: self._read(path, start or 0, end), key=key, timeout_s=timeout_s)

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        """Store an object: file and directory entries are fsynced when it returns."""
        path = self._path(key)
        await self._run(
            self._writers, lambda: self._write(path, data, may_replace=not if_absent), key=key, timeout_s=timeout_s
        )

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        """Delete objects, durably; absent ones are fine. One fsync per directory touched."""
        check_delete(keys)
        if keys:
            paths = [self._path(key) for key in keys]
            await self._run(self._writers, lambda: self._unlink(paths), key=keys[0], timeout_s=timeout_s)

    async def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects under a prefix in the order of their keys' bytes; removes old leftovers of crashes it meets."""
        walk = self._walk(check_prefix(prefix).rstrip("/"), (start_after or "").encode())
        while True:
            batch = await self._run(self._readers, lambda: [*islice(walk, _LISTED_AT_ONCE)], key=prefix, timeout_s=None)
            for info in batch:
                yield info
            if len(batch) < _LISTED_AT_ONCE:
                return

    async def head(self, key: str, *, timeout_s: float | None = None) -> ObjectInfo:
        """Describe an object. Costs one stat."""
        path = self._path(key)
        return await self._run(self._readers, lambda: self._stat(path, key), key=key, timeout_s=timeout_s)

    async def probe(self) -> None:
        """Prove that objects can be put, read, listed and deleted."""
        prefix = await probe_store(self)
        await self._run(
            self._writers, lambda: _remove_empty(f"{self._root}/{prefix}"), key="", timeout_s=PROBE_TIMEOUT_S
        )

    async def close(self) -> None:
        """Wait for running calls and end the threads."""
        for pool in (self._readers, self._writers):
            await pool.close()

    async def _run(self, pool: Threads, call: Callable[[], T], *, key: str, timeout_s: float | None) -> T:
        """Run a call on a pool; translate its errors. A call that is cancelled before it got a thread never runs."""
        work = pool.start(self._translated, call, key)
        if timeout_s is None:
            return await work
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as error:
            raise BucketUnavailable(f"{self}: {key}: no answer within {timeout_s:g} s") from error

    def _translated(self, call: Callable[[], T], key: str) -> T:
        """Make a call, raising our errors for the system's: the one table of foreign errors. Runs on the pools."""
        where = f"{self}: {key}" if key else str(self)
        try:
            return call()
        except OSError as error:
            reason = error.strerror
            if error.errno in _FULL:
                raise BucketFull(f"{where}: {reason}: free space or raise the quota there") from error
            if error.errno in _DENIED:
                raise BucketDenied(f"{where}: {reason}: give this user read and write access to it") from error
            if error.errno in _PASSING:
                raise BucketUnavailable(f"{where}: {reason}") from error
            if not os.path.isdir(self._root):
                raise BucketInvalid(
                    f"{self} does not exist: create it, or mount what belongs there, or format with --create-bucket"
                ) from error
            if error.errno in _ABSENT:
                raise ObjectMissing(f"{where}: no such object") from error
            raise BucketInvalid(f"{where}: {reason}: this directory cannot serve as a bucket") from error

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    # What follows runs on the pools.

    def _read(self, path: str, start: int, end: int | None) -> bytes:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            wanted = (os.fstat(descriptor).st_size if end is None else end) - start
            if wanted <= 0:
                return b""
            data = os.pread(descriptor, wanted, start)
            if wanted >= _READ_ONCE_BYTES:
                os.posix_fadvise(descriptor, start, wanted, os.POSIX_FADV_DONTNEED)
            if len(data) == wanted:
                return data
            # The end of the object, or a read that a signal cut short.
            parts = [data]
            while data and (wanted := wanted - len(data)):
                start += len(data)
                parts.append(data := os.pread(descriptor, wanted, start))
            return b"".join(parts)
        finally:
            os.close(descriptor)

    def _write(self, path: str, data: Buffer, *, may_replace: bool) -> None:
        directory = os.path.dirname(path)
        temporary = f"{directory}/{RESERVED_PREFIX}{secrets.token_hex(8)}"
        self._ensure(directory)
        try:
            descriptor = self._disk.create(temporary)
        except FileNotFoundError:
            # Known, but somebody removed it, or what is above it.
            self._known.clear()
            self._ensure(directory)
            descriptor = self._disk.create(temporary)
        try:
            try:
                self._disk.write(descriptor, memoryview(data).cast("B"))
                self._disk.sync_file(descriptor)
                self._disk.drop_pages(descriptor)
            finally:
                self._disk.close(descriptor)
            if may_replace:
                self._disk.replace(temporary, path)
            else:
                self._link(temporary, path, data)
        except BaseException as error:
            # Best effort: a leftover is swept later, and what brought us here is the error to report.
            with contextlib.suppress(OSError):
                self._disk.unlink(temporary)
            if isinstance(error, IsADirectoryError):
                raise BucketInvalid(f"{self}: {path} is a directory of objects, so it can be none") from error
            raise
        self._sync(directory)

    def _link(self, temporary: str, path: str, data: Buffer) -> None:
        """Give the object its name unless there is one with other bytes."""
        try:
            self._disk.link(temporary, path)
        except FileExistsError as error:
            if self._read(path, 0, None) != data:
                raise ObjectExists(f"{self}: {path}: exists with other bytes") from error
            # Equal, but whoever put it may not have come to its sync: ours covers it.
        self._disk.unlink(temporary)

    def _ensure(self, directory: str) -> None:
        """Make a directory under the root and the ones above it, durably."""
        if directory in self._known:
            return
        with self._making:
            if len(self._known) >= _KNOWN_DIRECTORIES:
                self._known.clear()
            if not os.path.isdir(self._root):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._root)
            self._known.add(self._root)
            parent = self._root
            for segment in directory[len(self._root) + 1 :].split("/"):
                child = f"{parent}/{segment}" if segment else parent
                if child not in self._known:
                    try:
                        self._disk.mkdir(child)
                    except FileExistsError:
                        if not os.path.isdir(child):
                            raise BucketInvalid(
                                f"{self}: {child} is an object, so no key below it can be one"
                            ) from None
                    # Also where it existed: another process may have made it and not have come to its sync.
                    self._disk.sync_directory(parent)
                    self._known.add(child)
                parent = child

    def _unlink(self, paths: Sequence[str]) -> None:
        directories: set[str] = set()
        for path in paths:
            try:
                self._disk.unlink(path)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            directories.add(os.path.dirname(path))
        for directory in directories:
            # Gone with all that was in it: nothing can come back.
            with contextlib.suppress(FileNotFoundError):
                self._sync(directory)
        if not directories and not os.path.isdir(self._root):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._root)

    def _sync(self, directory: str) -> None:
        """Fsync a directory, together with all others who ask for it meanwhile."""
        shared = self._syncs.get(directory)
        if shared is None:
            with self._making:
                if len(self._syncs) >= _KNOWN_DIRECTORIES:
                    self._syncs = {}
                shared = self._syncs.setdefault(directory, _SharedSync(directory, self._disk))
        shared.sync()

    def _stat(self, path: str, key: str) -> ObjectInfo:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return _info(key, status)

    def _walk(self, prefix: str, start_after: bytes) -> Iterator[ObjectInfo]:
        """Yield objects below a prefix, depth first. Entries are sorted as in keys, where a directory ends in a slash."""
        try:
            with os.scandir(f"{self._root}/{prefix}" if prefix else self._root) as entries:
                found = sorted(
                    (os.fsencode(entry.name) + (b"/" if entry.is_dir(follow_symlinks=False) else b""), entry)
                    for entry in entries
                )
        except (FileNotFoundError, NotADirectoryError):
            if not os.path.isdir(self._root):
                raise
            return
        base = f"{prefix}/".encode() if prefix else b""
        for name, entry in found:
            place = base + name
            if name.endswith(b"/"):
                # All keys below start with `place`: where that is smaller than `start_after` and no start of it, so are they.
                if (place > start_after or start_after.startswith(place)) and (key := _decoded(place[:-1])):
                    yield from self._walk(key, start_after)
            elif entry.name.startswith(RESERVED_PREFIX):
                _sweep(entry)
            elif place > start_after and (key := _decoded(place)):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield _info(key, status)


class _SharedSync:
    """Share the fsync of one directory among threads.

    Whoever has the turn syncs for all who asked before it began; they find it done when they get the turn. A sync that fails
    fails for its caller; the next one syncs again.
    """

    def __init__(self, directory: str, disk: Disk) -> None:
        self._directory = directory
        self._disk = disk
        self._turn = threading.Lock()
        self._count = threading.Lock()
        self._asked = 0
        self._done = 0

    def sync(self) -> None:
        with self._count:
            self._asked += 1
            mine = self._asked
        with self._turn:
            if self._done >= mine:
                return
            with self._count:
                covered = self._asked
            self._disk.sync_directory(self._directory)
            self._done = covered


def make_directory(path: str) -> None:
    """Make the directory of a bucket, and those above it, durably; one that exists is fine. OSError as from mkdir."""
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        make_directory(parent)
        disk = Disk()
        try:
            disk.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
        disk.sync_directory(parent)


def _sweep(entry: os.DirEntry[str]) -> None:
    try:
        if entry.stat(follow_symlinks=False).st_mtime < time.time() - LEFTOVER_AGE_S:
            os.unlink(entry.path)
    except OSError:
        # Somebody else swept it, or may not be disturbed; it is invisible either way.
        return


def _decoded(place: bytes) -> str | None:
    """Return a key; None for a file that cannot be an object of ours, as its name is not UTF-8."""
    try:
        return place.decode()
    except UnicodeDecodeError:
        return None


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(
        key, status.st_size, status.st_mtime_ns, f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"
    )


def _remove_empty(directory: str) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(directory)
