"""AtollFileSystem: what fsspec asks of a file system, said in terms of `tree`.

Owns fsspec's conventions: protocol, instances and their options, the dictionaries of info, which methods exist. Every method
is a coroutine (`_info`) that may be awaited on any loop, with a synchronous twin (`info`) that fsspec derives.

Nothing is cached: no listing (fsspec's `dircache` is never filled) and no content, so what another client closed is seen by
the next call. The metadata are quick, and bytes are kept by the chunk store.

Who asks is the effective user of this process. The vfs leaves permissions to a kernel, which is not here: `tree` checks them,
modes and owners and not ACLs: see `permissions`.

Errors of operations are OSError by errno (FileNotFoundError, PermissionError …), with the path. What keeps a volume from being
opened is told as the command line tells it, with its remedy, by the first operation: VolumeMissing, VolumeBusy (an embedded
volume that is mounted, or open in another process), TokenMissing, ServiceUnavailable, AccessRefused; all have `errno`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from glob import has_magic
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, Self, TypeVar

from fsspec.asyn import AsyncFileSystem, sync_wrapper  # type: ignore[import-untyped]
from fsspec.callbacks import DEFAULT_CALLBACK  # type: ignore[import-untyped]
from fsspec.utils import stringify_path  # type: ignore[import-untyped]

from atollfs import volumes
from atollfs.file import (
    MODES,
    READ_BUFFER_BYTES,
    WRITE_BUFFER_BYTES,
    AsyncFile,
    Publication,
    RawFile,
    ReadFile,
    UpdateFile,
    WriteFile,
    canonical_mode,
)
from atollfs.location import ENCRYPTED_SCHEME, SCHEME, VolumeOptions, split_url
from atollfs.tree import PIECE_BYTES, Descriptor, Listed, Tree, all_of, as_os_error, kind
from chunkstore.errors import AtollError
from chunkstore.geometry import MIB, Buffer
from client.address import ServiceAddress, parse_address
from client.sizes import format_size, parse_size
from metasvc.errors import FsError
from metasvc.model import Inode

T = TypeVar("T")

META_TIMEOUT_S: Final = 300.0
MIN_CACHE_BYTES: Final = 64 * MIB
"""As of `atoll mount`."""
_NS: Final = 1_000_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_user_numbers = count(1)


class AtollFileSystem(AsyncFileSystem):  # type: ignore[misc]
    """A volume as an fsspec file system.

    Made by `fsspec.filesystem("atoll", address=…)`, or by fsspec from a URL. Making one opens nothing: the first operation
    does. Instances with equal options are one instance (fsspec's rule), and all instances of a process with equal options
    share one session with the volume. It pickles as its options; another process opens a session of its own. After a fork
    it is refused (volumes.NotAfterFork): start workers with spawn or forkserver.

    `close()`, or leaving it as a context manager, ends the session once no other instance uses it; closed files are durable
    before that. A program that never does it has it done at its exit. After close() the next operation opens it again.
    """

    protocol: ClassVar[tuple[str, ...]] = (SCHEME, ENCRYPTED_SCHEME)
    root_marker: ClassVar[str] = "/"

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | str | None = None,
        meta_timeout: float = META_TIMEOUT_S,
        read_only: bool = False,
        auto_mkdir: bool = True,
        **storage_options: Any,
    ) -> None:
        """Take the options of `atoll mount`, with its defaults. Opens nothing.

        ``address``: the directory of an embedded volume, or `atoll://HOST:PORT/TENANT/VOLUME`; a URL that names a service
        needs none. ``token``, ``token_file``: for a service; else ATOLL_TOKEN. ``cache_size``: bytes, or as `20GiB`.
        ``meta_timeout``: seconds for which operations wait while the service is away; then EIO. ``auto_mkdir``: files that
        are written into directories which are missing make them, as object stores let programs assume (zarr does); False
        makes that ENOENT, as on a mount. ``storage_options``: fsspec's own, asynchronous, loop, batch_size among them.

        AddressInvalid for what is no address, ValueError without one and for a size that is none.
        """
        super().__init__(**storage_options)
        text = "" if address is None else os.fspath(address)
        if not text:
            raise ValueError(
                "no volume is named: give address='/path/of/the/volume', or a URL atoll://HOST:PORT/TENANT/VOLUME/path"
            )
        self.address = parse_address(text)
        self.auto_mkdir = auto_mkdir
        self._options = VolumeOptions(
            address=self.address,
            token=token,
            token_file=None if token_file is None else os.fspath(token_file),
            cache_dir=None if cache_dir is None else Path(cache_dir),
            cache_limit_bytes=_cache_limit(cache_size),
            meta_timeout_s=float(meta_timeout),
            read_only=read_only,
        )
        self._user = next(_user_numbers)
        weakref.finalize(self, volumes.left, self._options, self._user, os.getpid()).atexit = False

    # -- paths and URLs ------------------------------------------------------------------------------------------------

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        text = stringify_path(path)
        text = text.removeprefix("atoll::")
        return split_url(text)[1]

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        address, _ = split_url(path)
        return {} if address is None else {"address": address}

    def unstrip_protocol(self, name: str) -> str:
        """Return the URL of a path: with a service's address, or `atoll:///path`, which needs `address` as an option."""
        path: str = self._strip_protocol(name)
        return f"{self.address}{path}" if isinstance(self.address, ServiceAddress) else f"{SCHEME}://{path}"

    @property
    def fsid(self) -> str:
        """Return what is equal for two file systems of one volume at one address."""
        return f"{SCHEME}-{self.address}"

    # -- life ----------------------------------------------------------------------------------------------------------

    @property
    def loop(self) -> Any:
        """Return the loop on which synchronous calls run. NotAfterFork in a child of the process that made this."""
        if self._pid != os.getpid():
            raise volumes.NotAfterFork
        # An instance for coroutines has none; its files are ordinary files all the same.
        return self._loop or volumes.home_loop()

    async def _ask(self, path: str, operation: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        """Await an operation of the tree, with the volume open, on its loop. ``path`` is for the message of an error."""
        if self._pid != os.getpid():
            raise volumes.NotAfterFork

        async def ask() -> T:
            volume = await volumes.volume_of(self._options, self._user)
            try:
                return await operation(volume.tree, *arguments)
            except AtollError as error:
                raise as_os_error(error, path) from error

        return await volumes.on_home_loop(ask)

    async def aclose(self) -> None:
        """End the use of the volume by this instance: flush, and end the session unless another instance uses it.

        OSError (EIO) if files that were left open hold data which could not be made durable, and are lost.
        """
        await volumes.on_home_loop(lambda: volumes.leave(self._options, self._user))

    def close(self) -> None:
        """Do what aclose() does, and wait for it."""
        if self._pid == os.getpid():
            volumes.run_at_home(self.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    # -- looking -------------------------------------------------------------------------------------------------------

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size, type, and what stat(2) shows. A trip, two for a link.

        Links are followed, and `islink` tells of one; what leads nowhere is of type "link".
        """
        path = self._strip_protocol(path)
        raw = os.fsencode(path)

        async def look(tree: Tree) -> dict[str, Any]:
            inode = await tree.stat(raw, follow=False)
            if not inode.is_symlink:
                return _entry(path, inode)
            try:
                return _entry(path, await tree.stat(raw), is_link=True)
            except FsError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    raise
                return _entry(path, inode)

        return await self._ask(path, look)

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:  # noqa: FBT001, FBT002
        """Return the entries of a directory, by name; of a file itself.

        A link to a file is a file; one to a directory is of type "link", so that a walk ends.
        """
        path = self._strip_protocol(path)
        raw = os.fsencode(path)

        async def look(tree: Tree) -> list[dict[str, Any]]:
            try:
                return [_listed(path, found) for found in await tree.readdir(raw)]
            except AtollError as error:
                if error.errno != errno.ENOTDIR:
                    raise
            return [_entry(path, await tree.stat(raw))]

        found = await self._ask(path, look)
        return found if detail else [entry["name"] for entry in found]

    async def _walk(self, path: str, *arguments: Any, on_error: Any = "omit", **more: Any) -> AsyncIterator[Any]:
        """Walk as fsspec does, but omit only what is missing or closed: a service that failed is no empty directory."""
        chosen = _raise_unless_closed if on_error == "omit" else on_error
        async for found in super()._walk(path, *arguments, on_error=chosen, **more):
            yield found

    async def _exists(self, path: str, **_: Any) -> bool:
        """Return whether a path leads to something; what prevents an answer is raised (PermissionError …)."""
        return await self._kind(path) not in (None, "link")

    async def _isdir(self, path: str) -> bool:
        """Return whether it is a directory; not, as in os.path, where this may not be seen."""
        try:
            return await self._kind(path) == "directory"
        except PermissionError:
            return False

    async def _isfile(self, path: str) -> bool:
        """Return whether it is a file; not, as in os.path, where this may not be seen."""
        try:
            return await self._kind(path) == "file"
        except PermissionError:
            return False

    async def _kind(self, path: str) -> str | None:
        try:
            return str((await self._info(path))["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def created(self, path: str) -> datetime:
        """Return when name, owner, mode or content last changed (ctime): a volume keeps no time of birth."""
        return _time(self.info(path)["created_ns"])

    def modified(self, path: str) -> datetime:
        """Return when the content last changed."""
        return _time(self.info(path)["mtime_ns"])

    def ukey(self, path: str) -> str:
        """Return what changes whenever the content does: the inode, the version of its chunk map, length and time."""
        info = self.info(path)
        return f"{info['ino']}-{info['version']}-{info['size']}-{info['mtime_ns']}"

    def checksum(self, path: str) -> int:
        """Return `ukey` as a number."""
        return int.from_bytes(self.ukey(path).encode())

    # -- reading and writing -------------------------------------------------------------------------------------------

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return bytes [start, end) of a file; negative numbers count from its end."""
        path = self._strip_protocol(path)
        return await self._ask(path, Tree.read_file, os.fsencode(path), start, end)

    async def _pipe_file(self, path: str, value: Buffer, mode: str = "overwrite", **_: Any) -> None:
        """Write a file whole; durable when this returns. FileExistsError with mode "create" if it is there."""
        path = self._strip_protocol(path)

        async def write(tree: Tree) -> None:
            await tree.write_file(os.fsencode(path), value, exclusive=mode == "create")

        await self._making_parents(path, lambda: self._ask(path, write))

    async def _making_parents(self, path: str, call: Callable[[], Awaitable[T]], *, source: str | None = None) -> T:
        """Await a call; if a directory above is missing, and that is wanted, make it and call again.

        Not if it is the ``source`` of a copy or rename that is missing.
        """
        try:
            return await call()
        except FileNotFoundError:
            if not self.auto_mkdir or (above := self._parent(path)) == self.root_marker:
                raise
        if source is not None:
            await self._ask(source, _exists_itself, os.fsencode(source))
        await self._makedirs(above, exist_ok=True)
        return await call()

    async def _descriptor(self, path: str, flags: int) -> Descriptor:
        def opened() -> Awaitable[Descriptor]:
            return self._ask(path, Tree.open, os.fsencode(path), flags)

        if not flags & os.O_CREAT:
            return await opened()
        return await self._making_parents(path, opened)

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,  # noqa: FBT001, FBT002
        **_: Any,
    ) -> ReadFile | WriteFile | UpdateFile:
        """Open a binary file. ``block_size``: bytes of its buffer. In a transaction a new file appears when that commits."""
        path = self._strip_protocol(path)
        mode = canonical_mode(mode)
        publication = None
        if not autocommit and mode[0] in "wx":
            above, _slash, name = path.rpartition("/")
            # Names are up to 255 bytes: the end is cut off, whole characters of it.
            begin = os.fsencode(name)[:200].decode(errors="ignore")
            publication = Publication(self, f"{above}/.{begin}.{secrets.token_hex(8)}", path)
        where = path if publication is None else publication.temporary
        descriptor = volumes.run_at_home(lambda: self._descriptor(where, MODES[mode]))
        raw = RawFile(descriptor, path=where, mode=mode)
        if not raw.writable():
            return ReadFile(raw, block_size or READ_BUFFER_BYTES, fs=self)
        buffer_bytes = block_size or (READ_BUFFER_BYTES if raw.readable() else WRITE_BUFFER_BYTES)
        made = UpdateFile if raw.readable() else WriteFile
        return made(raw, buffer_bytes, fs=self, publication=publication)

    async def open_async(self, path: str, mode: str = "rb", **_: Any) -> AsyncFile:
        """Open a binary file for coroutines. ValueError for a mode of text."""
        path = self._strip_protocol(path)
        mode = canonical_mode(mode)
        return AsyncFile(await self._descriptor(path, MODES[mode]), fs=self, path=path, mode=mode)

    def publish(self, temporary: str, path: str) -> None:
        """Give a file its name, replacing what has it: the end of a transaction."""
        volumes.run_at_home(lambda: self._ask(path, Tree.rename, os.fsencode(temporary), os.fsencode(path)))

    async def _get_file(
        self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, outfile: Any = None, **_: Any
    ) -> None:
        """Copy a file to the local disk, in pieces of 4 MiB; of a directory, make it there."""
        rpath = self._strip_protocol(rpath)
        lpath = stringify_path(lpath)
        if outfile is None and await self._isdir(rpath):
            await asyncio.to_thread(os.makedirs, lpath, exist_ok=True)
            return

        async def get(tree: Tree) -> None:
            async with tree.opened(os.fsencode(rpath), os.O_RDONLY) as source:
                callback.set_size(source.inode.size_bytes)
                target = outfile if outfile is not None else await asyncio.to_thread(open, lpath, "wb")
                try:
                    position = 0
                    while piece := await source.read(position, PIECE_BYTES):
                        await asyncio.to_thread(target.write, piece)
                        position += len(piece)
                        callback.relative_update(len(piece))
                finally:
                    if outfile is None:
                        await asyncio.to_thread(target.close)

        await self._ask(rpath, get)

    async def _put_file(
        self, lpath: Any, rpath: str, callback: Any = DEFAULT_CALLBACK, mode: str = "overwrite", **_: Any
    ) -> None:
        """Copy a local file into the volume, in pieces of 4 MiB; durable when this returns. Of a directory, make it."""
        rpath = self._strip_protocol(rpath)
        lpath = stringify_path(lpath)
        if await asyncio.to_thread(os.path.isdir, lpath):
            await self._makedirs(rpath, exist_ok=True)
            return
        flags = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if mode == "create" else os.O_TRUNC)

        async def put(tree: Tree) -> None:
            with closing(await asyncio.to_thread(open, lpath, "rb")) as source:
                callback.set_size(os.fstat(source.fileno()).st_size)
                async with tree.opened(os.fsencode(rpath), flags) as target:
                    position = 0
                    while piece := await asyncio.to_thread(source.read, PIECE_BYTES):
                        await target.write(position, piece)
                        position += len(piece)
                        callback.relative_update(len(piece))

        await self._making_parents(rpath, lambda: self._ask(rpath, put))

    def touch(self, path: str, truncate: bool = True, **_: Any) -> None:  # noqa: FBT001, FBT002
        """Make a file if it is missing, set its times to now, and empty it unless that is refused."""
        volumes.run_at_home(lambda: self._touch(path, truncate=truncate))

    async def _touch(self, path: str, *, truncate: bool) -> None:
        path = self._strip_protocol(path)

        async def touch(tree: Tree) -> None:
            await tree.touch(os.fsencode(path), truncate=truncate)

        await self._making_parents(path, lambda: self._ask(path, touch))

    # -- changing names ------------------------------------------------------------------------------------------------

    async def _mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:  # noqa: FBT001, FBT002
        """Make a directory, and by default those above it. FileExistsError."""
        path = self._strip_protocol(path)
        if create_parents:
            await self._makedirs(path, exist_ok=False)
        else:
            await self._ask(path, Tree.mkdir, os.fsencode(path))

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:  # noqa: FBT001, FBT002
        """Make a directory and those above it. FileExistsError unless ``exist_ok``, and for a file that is in the way."""
        path = self._strip_protocol(path)

        async def make(tree: Tree) -> None:
            await tree.makedirs(os.fsencode(path), exist_ok=exist_ok)

        await self._ask(path, make)

    async def _rmdir(self, path: str) -> None:
        """Remove an empty directory. OSError ENOTEMPTY."""
        path = self._strip_protocol(path)
        await self._ask(path, Tree.rmdir, os.fsencode(path))

    rmdir = sync_wrapper(_rmdir)

    async def _rm_file(self, path: str, **_: Any) -> None:
        """Remove a file or link. IsADirectoryError."""
        path = self._strip_protocol(path)
        await self._ask(path, Tree.unlink, os.fsencode(path))

    async def _rm(
        self,
        path: Any,
        recursive: bool = False,  # noqa: FBT001, FBT002
        batch_size: int | None = None,
        maxdepth: int | None = None,
        **_: Any,
    ) -> None:
        """Remove files, by names and patterns; with ``recursive`` whole directories. FileNotFoundError, IsADirectoryError.

        With ``maxdepth`` only what lies at most so deep, and directories that are then empty.
        """
        if not recursive:
            await all_of([self._rm_file(one) for one in await self._expand_path(path)])
        elif maxdepth is None:
            # Not by patterns of what lies in them: the tree is removed as it is found.
            for one in await self._expand_path(path):
                await self._ask(one, Tree.remove_tree, os.fsencode(one))
        else:
            await self._remove_down_to(await self._expand_path(path, recursive=True, maxdepth=maxdepth))

    async def _remove_down_to(self, paths: Iterable[str]) -> None:
        for path in sorted(paths, key=lambda one: -one.count("/")):
            try:
                await self._rm_file(path)
            except IsADirectoryError:
                try:
                    await self._rmdir(path)
                except OSError as error:
                    if error.errno != errno.ENOTEMPTY:
                        raise

    async def _cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copy a file without moving bytes: the copy shares the slices of the original. Of a directory, make it."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        if await self._isdir(path1):
            await self._makedirs(path2, exist_ok=True)
            return
        await self._making_parents(
            path2, lambda: self._ask(path2, Tree.copy, os.fsencode(path1), os.fsencode(path2)), source=path1
        )

    async def _mv_file(self, path1: str, path2: str, **_: Any) -> None:
        """Rename, atomically: a file at the new name is replaced. OSError EXDEV between directories of other quotas."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        await self._making_parents(
            path2, lambda: self._ask(path2, Tree.rename, os.fsencode(path1), os.fsencode(path2)), source=path1
        )

    mv_file = sync_wrapper(_mv_file)

    async def _mv(self, path1: str, path2: str) -> None:
        """Rename a file or directory, in one step; into a directory that is there, as mv(1) does."""
        into = path2.endswith("/") or await self._isdir(path2)
        target = f"{path2.rstrip('/')}/{self._strip_protocol(path1).rpartition('/')[2]}" if into else path2
        await self._mv_file(path1, target)

    def mv(self, path1: Any, path2: Any, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:  # noqa: FBT001, FBT002
        """Move: one rename where one path is moved; patterns, lists and moves between quotas are copied and removed."""
        if isinstance(path1, str) and isinstance(path2, str) and maxdepth is None and not has_magic(path1):
            if self._strip_protocol(path1) == self._strip_protocol(path2):
                return
            try:
                volumes.run_at_home(lambda: self._mv(path1, path2))
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
            else:
                return
            recursive = True
        super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **kwargs)


def _cache_limit(size: int | str | None) -> int | None:
    size_bytes = parse_size(size) if isinstance(size, str) else size
    if size_bytes is not None and size_bytes < MIN_CACHE_BYTES:
        raise ValueError(f"cache_size is at least {format_size(MIN_CACHE_BYTES)}: give more")
    return size_bytes


def _raise_unless_closed(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError):
        raise error


async def _exists_itself(tree: Tree, path: bytes) -> None:
    await tree.stat(path, follow=False)


def _entry(path: str, inode: Inode, *, is_link: bool = False) -> dict[str, Any]:
    """Return what fsspec shows of an inode. Times are seconds since 1970, exact ones in nanoseconds beside them."""
    return {
        "name": path,
        # What stat(2) says of a directory is no number of bytes.
        "size": 0 if inode.is_dir else inode.size_bytes,
        "type": kind(inode),
        "created": inode.ctime_ns / _NS,
        "created_ns": inode.ctime_ns,
        "mtime": inode.mtime_ns / _NS,
        "mtime_ns": inode.mtime_ns,
        "islink": is_link or inode.is_symlink,
        "mode": inode.mode,
        "uid": inode.uid,
        "gid": inode.gid,
        "nlink": inode.nlink,
        "ino": inode.ino,
        "version": inode.map_version,
    }


def _listed(directory: str, found: Listed) -> dict[str, Any]:
    path = f"{directory.rstrip('/')}/{os.fsdecode(found.name)}"
    target = found.target
    if target is None or not target.is_file:
        return _entry(path, found.inode)
    return _entry(path, target, is_link=True)


def _time(time_ns: int) -> datetime:
    return _EPOCH + timedelta(microseconds=time_ns // 1000)
