"""The volumes that are open in this process: one session, chunk store and vfs for each, shared by all who ask for it.

Owns the life of an open volume, from the first operation to the end of the process, and the loop on which it is lived.
Composition is that of a mount (client.mounted) without the kernel. Must not know paths or fsspec's methods.

One loop. All volumes live on fsspec's IO loop, whose thread runs as long as the interpreter does. Synchronous calls run there
anyway; coroutines of other loops (asynchronous=True, zarr's thread) hop there and back by `on_home_loop`, 0.1 ms. Were a
volume bound to its caller's loop instead, a second loop in one process could not reach an embedded volume, which has one
holder, and nothing could be flushed once the caller's loop is closed.

Life. Each volume is one task (`OpenedVolume._live`) that enters everything, says that it is ready, waits to be told to end,
and leaves everything: what is entered by a task is left by it. Who asks waits for `ready` behind a shield, so that a caller
that gives up cancels nothing that others wait for. A failed opening is forgotten: the next call tries again.

Users. A file system instance *uses* a volume from its first operation until its close(), or until it is collected. The volume
ends with its last user. A table from options to volumes belongs to the loop's thread: it is read and changed on it only, in
stretches without an await. While a volume ends, whoever wants it waits for its end and opens it anew.

Exit. Files that are open for writing are closed, then volumes end: data are flushed, the session is ended. That happens where
`threading` winds up, before executors refuse work, in the main thread; what ends without that (os._exit, a kill) is a crash:
what close() acknowledged is there.

Fork. Threads, connections and SQLite do not survive it. In a child the table is empty; what was in it is kept from the garbage
collector, because closing a database or a connection that the parent uses could harm the parent. File systems that were made
before the fork are refused in the child; one that is made there begins a session of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import itertools
import logging
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from fsspec.asyn import get_loop, sync  # type: ignore[import-untyped]

from atollfs.location import VolumeOptions
from atollfs.tree import Tree
from chunkstore.errors import AtollError
from client.address import EmbeddedAddress

if TYPE_CHECKING:
    from chunkstore.slices import ChunkStore
    from client.vfs.vfs import Vfs
    from client.volume import OpenVolume
    from metasvc.api import MetaClient
    from metasvc.model import Garbage

T = TypeVar("T")

HOLDER_WAIT_S: Final = 1.0
"""How long opening waits for a holder of an embedded volume that is ending: a process that has just closed it."""
DRAIN_S: Final = 600.0
"""How long the end tries to upload what an earlier mount had staged."""
CACHES_PER_NODE: Final = 256
OWNER: Final = "a Python program"
log = logging.getLogger("atollfs")


class NotAfterFork(RuntimeError):
    """Say that something was opened in the parent of this process."""

    def __init__(self) -> None:
        super().__init__(
            "a file system that was made before a fork cannot be used in the child: make another there, or start workers with "
            "spawn or forkserver (torch: DataLoader(…, multiprocessing_context='spawn'))"
        )


def home_loop() -> asyncio.AbstractEventLoop:
    """Return the loop on which all volumes of this process live; its thread is started if need be."""
    loop: asyncio.AbstractEventLoop = get_loop()
    return loop


async def on_home_loop(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Await a coroutine on the home loop, from any loop. A cancellation cancels it there, without waiting for its end."""
    home = home_loop()
    if asyncio.get_running_loop() is home:
        return await call()
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), home))


def run_at_home(call: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine on the home loop and wait for it, from any thread but the loop's (NotImplementedError there)."""
    result: T = sync(home_loop(), call)
    return result


class _Closable(Protocol):
    """A file open for writing."""

    def close(self) -> None:
        """Flush and close."""
        ...


class OpenedVolume:
    """One open volume. Made by `volume_of`; all methods run on the home loop."""

    def __init__(self, options: VolumeOptions) -> None:
        """Begin to open it."""
        self.options = options
        self.users: set[int] = set()
        """Numbers of the file system instances that use it."""
        self.tree: Tree
        """Set when it is ready."""
        self.lost_files = 0
        """How many files had data at the end that could not be made durable."""
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end = asyncio.Event()
        self._task = asyncio.create_task(self._live(), name=f"volume {options.address}")

    async def ready(self) -> None:
        """Wait until it is open. What keeps it from opening is raised: VolumeBusy, VolumeMissing, TokenMissing …"""
        await asyncio.shield(self._ready)

    @property
    def is_ending(self) -> bool:
        return self._end.is_set() or self._task.done()

    async def end(self) -> None:
        """End it: flush, upload, end the session. What could not be made durable is logged, file by file."""
        self._end.set()
        await self.ended()

    async def ended(self) -> None:
        """Wait for its end."""
        await asyncio.wait([self._task])

    async def _live(self) -> None:
        try:
            async with AsyncExitStack() as stack:
                self.tree = Tree(await self._enter(stack))
                stack.push_async_callback(self.tree.close)
                self._ready.set_result(None)
                await self._end.wait()
        except BaseException as error:
            if not self._ready.done():
                # Nobody may be waiting any more.
                self._ready.set_exception(error)
                self._ready.exception()
            else:
                log.exception("the end of the volume at %s failed", self.options.address)
            if not isinstance(error, Exception):
                raise
        finally:
            _forget(self)

    async def _enter(self, stack: AsyncExitStack) -> Vfs:
        """Open everything from the volume up to the vfs; the stack takes it apart in reverse."""
        import structlog

        from client.staged import settle_staged, staged_in
        from client.vfs.options import VfsOptions
        from client.vfs.vfs import Vfs
        from client.volume import Access, access_by, busy, default_cache_dir, open_volume
        from metasvc.errors import NotOwner

        options = self.options
        events = structlog.wrap_logger(
            log,
            processors=[structlog.stdlib.filter_by_level, structlog.processors.KeyValueRenderer(key_order=["event"])],
            wrapper_class=structlog.stdlib.BoundLogger,
            volume=str(options.address),
        )
        access = None
        if not isinstance(options.address, EmbeddedAddress):
            if options.token:
                access = Access(token=options.token, timeout_s=options.meta_timeout_s)
            else:
                access = access_by(options.token_file, env=os.environ, timeout_s=options.meta_timeout_s)

        def lost() -> None:
            log.error("the volume at %s was lost: close the file system, then use it again", options.address)

        try:
            volume = await stack.enter_async_context(
                open_volume(
                    options.address,
                    owner=OWNER,
                    env=os.environ,
                    wait_s=HOLDER_WAIT_S,
                    lost=lost,
                    mountpoint="",
                    access=access,
                )
            )
        except NotOwner as error:
            raise busy(error) from error
        meta = await stack.enter_async_context(volume.session(mountpoint=""))
        caches = options.cache_dir if options.cache_dir is not None else default_cache_dir(os.environ)
        lengths = dict(staged_in(caches, volume.format).lengths) if volume.is_sole else {}
        chunks = await _enter_chunks(stack, options, volume, caches)
        chosen = VfsOptions.sole_session if volume.is_sole else VfsOptions
        read_only = options.read_only or meta.is_read_only
        vfs = Vfs(meta, chunks, log=events, options=replace(chosen(read_only=read_only), root=meta.root))
        if volume.is_sole:
            staged = await chunks.recover()
            await settle_staged(volume.admin, chunks, lengths, staged, log=events)
        stack.push_async_callback(_drain, chunks)
        stack.push_async_callback(self._count_lost, vfs)
        await stack.enter_async_context(vfs)
        if volume.is_sole and not options.read_only:
            jobs = asyncio.create_task(_work(volume, meta, chunks, events), name="jobs")
            stack.push_async_callback(_cancelled, jobs)
        return vfs

    async def _count_lost(self, vfs: Vfs) -> None:
        """Look what leaving the vfs could not flush: it has tried, and logged it."""
        self.lost_files = len(await vfs.flush_all(timeout_s=0.0))


async def _enter_chunks(
    stack: AsyncExitStack, options: VolumeOptions, volume: OpenVolume, caches: os.PathLike[str]
) -> ChunkStore:
    """Open the chunk store on a cache directory that nobody has.

    A holder of an embedded volume takes the one of its mount: there is no mount now, and what a mount left staged is there. Of
    a service's volume there may be a mount and any number of processes on this node, each with a cache of its own: the first
    free one of `python-0`, `python-1` …, so that a job which starts again finds what it had read.
    """
    from pathlib import Path

    from chunkstore.block import Codec
    from chunkstore.slices import CacheLocked, ChunkStore, ChunkStoreConfig

    for number in itertools.count():
        config = ChunkStoreConfig(
            volume_uuid=volume.format.uuid,
            cache_dir=Path(caches) if volume.is_sole else Path(caches) / f"python-{number}",
            codec=Codec.parse(volume.format.compression),
            block_bytes=volume.format.block_bytes,
            inline_limit_bytes=volume.format.inline_limit_bytes,
            cache_limit_bytes=options.cache_limit_bytes,
        )
        try:
            return await stack.enter_async_context(ChunkStore(config, access=await volume.block_access()))
        except CacheLocked:
            if volume.is_sole or number + 1 == CACHES_PER_NODE:
                raise
    raise AssertionError("the loop returns or raises")


async def _work(volume: OpenVolume, meta: MetaClient, chunks: ChunkStore, events: Any) -> None:
    """Do an embedded volume's background work, as nobody but its holder can: garbage, trash, compaction. Until cancelled."""
    from metasvc.jobs.schedule import Jobs

    @asynccontextmanager
    async def writing() -> AsyncIterator[tuple[MetaClient, ChunkStore]]:
        yield meta, chunks

    async def delete(rows: Sequence[Garbage]) -> None:
        await chunks.delete_many([(row.slice_id, row.length) for row in rows])

    await Jobs(volume.admin, lambda: volume.format, delete, writing, events).run()


async def _drain(chunks: ChunkStore) -> None:
    try:
        await chunks.drain(timeout_s=DRAIN_S)
    except AtollError as error:
        log.error("data staged by an earlier mount are not uploaded (%s bytes): %s", chunks.pending_bytes, error)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# -- the table ---------------------------------------------------------------------------------------------------------

_volumes: dict[VolumeOptions, OpenedVolume] = {}
_open_for_writing: weakref.WeakSet[_Closable] = weakref.WeakSet()
_left_by_the_parent: list[object] = []


async def volume_of(options: VolumeOptions, user: int) -> OpenedVolume:
    """Return the open volume, opened if need be, and note who uses it. Home loop."""
    while True:
        volume = _volumes.get(options)
        if volume is None:
            volume = _volumes[options] = OpenedVolume(options)
        if not volume.is_ending:
            volume.users.add(user)
            await volume.ready()
            return volume
        await volume.ended()


async def leave(options: VolumeOptions, user: int) -> None:
    """Note that somebody uses a volume no longer; the last one waits for its end. EIO if data were lost there. Home loop."""
    volume = _volumes.get(options)
    if volume is not None:
        volume.users.discard(user)
        if not volume.users:
            await volume.end()
            if volume.lost_files:
                raise OSError(
                    errno.EIO,
                    f"data of {volume.lost_files} files are lost: they were not closed, and could not be made durable; the log "
                    "says why",
                )


def left(options: VolumeOptions, user: int, pid: int) -> None:
    """Do what `leave` does, without waiting: for an instance that was collected, on whatever thread."""
    if pid == os.getpid() and _volumes:
        try:
            asyncio.run_coroutine_threadsafe(leave(options, user), home_loop())
        except RuntimeError:
            log.debug("the interpreter ends: volumes end with it")


def _forget(volume: OpenedVolume) -> None:
    if _volumes.get(volume.options) is volume:
        del _volumes[volume.options]


def note_open(file: _Closable) -> None:
    """Let a file that is open for writing be closed at exit, if nobody has done it."""
    _open_for_writing.add(file)


def _at_exit() -> None:
    """Close files, end volumes. Runs in the main thread while everything still works; again, harmlessly, in atexit."""
    for file in list(_open_for_writing):
        try:
            file.close()
        except Exception:
            log.exception("a file could not be closed at exit")
    if _volumes:
        run_at_home(_end_all)


async def _end_all() -> None:
    await asyncio.gather(*(volume.end() for volume in list(_volumes.values())))


def _after_fork() -> None:
    _left_by_the_parent.extend([list(_volumes.values()), list(_open_for_writing)])
    _volumes.clear()
    _open_for_writing.clear()


# Imported here so that its own exit comes after ours: they run last in, first out.

# Private, and what concurrent.futures itself uses; the atexit module's turn comes after executors have shut down.
_register = getattr(threading, "_register_atexit", atexit.register)
_register(_at_exit)
atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)
