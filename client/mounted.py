"""A mount: everything between the kernel and the bucket, put together, served, and taken apart in order.

Owns the life of a mount's process after it has left the terminal: open, serve, end. Starting goes store, engine, bucket, chunk
store, vfs, kernel; ending goes back: the mount point, programs' data into the bucket, staged data into the bucket, the
control socket, the cache directory, the volume. While it ends it answers status and tells `atoll umount` how far it is, and
refuses everything else with the code ``holder-not-ready``: whoever is refused so waits a little.

A mount ends after umount(8), after SIGTERM or SIGINT, and on the request ``stop``. When its engine fails (the volume was taken
over, the database is gone) it dies at once, as if it were killed.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from chunkstore.access import BlockAccess, ObjectAccess
from chunkstore.block import Codec
from chunkstore.buckets import Limits
from chunkstore.errors import AtollError, BucketUnavailable
from chunkstore.slices import ChunkStore, ChunkStoreConfig, Durability
from client.address import Address, components, shown
from client.admin.gc import delete_slices
from client.admin.operations import run_operation
from client.admin.stats import stats_text
from client.control.endpoint import Peer
from client.control.messages import ControlError, JsonObject, Progress, Request, text_of
from client.control.server import ControlServer, Report
from client.holder import make_holder_directory
from client.staged import MountRecord, settle_staged, staged_in, write_record
from client.transport import MountOptions
from client.vfs.options import VfsOptions
from client.vfs.vfs import Vfs
from client.vfs.virtual import VirtualFile
from client.volume import HOLDER_WAIT_S, MOUNT_OWNER, Access, OpenVolume, open_volume, open_volume_bucket
from metasvc.api import MetaClient
from metasvc.errors import FsError
from metasvc.jobs.backups import BackupPolicy, Backups, Shelf
from metasvc.jobs.schedule import Jobs
from metasvc.model import Caller, Ino

START_BUDGET_S: Final = 10.0
"""Somebody waits at a terminal: a bucket that is away for longer is reported."""
DRAIN_S: Final = 600.0
"""How long an ending mount tries to upload what is staged; then it stays staged for the next one."""
WATCH_S: Final = 0.2
_GC: Final = (5000, 10, 50)
"""Python's collector looks at what is young ten times as seldom as by default, and at everything 40 times."""
NOT_READY: Final = "holder-not-ready"


class NotReady(AtollError):
    """Say that the holder is starting or ending."""

    code = NOT_READY
    errno = 11
    retryable = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MountRequest:
    """What was asked of `atoll mount`, checked."""

    address: Address
    mountpoint: str
    """Absolute, free of symbolic links."""
    cache_dir: Path
    """For the caches of all volumes."""
    cache_limit_bytes: int | None
    durability: Durability
    read_only: bool
    subdir: bytes
    """Normalized; ``/`` for the whole volume."""
    transport: str
    allow_other: bool
    log_path: str
    """Empty if the log goes to stderr."""
    access: Access | None = None
    """For a volume of a service."""
    metrics: str | None = None
    """HOST:PORT at which the metrics are asked for, if anywhere."""
    backup: BackupPolicy | None = None
    """How often an embedded volume is backed up, if it is."""


class Mount:
    """A running mount, as operations see it: client.volume.Mounting."""

    def __init__(self, request: MountRequest, vfs: Vfs, chunks: ChunkStore) -> None:
        """Take what is mounted."""
        self.request = request
        self.is_ending = False
        self.backups: Backups | None = None
        """If backups are made by this mount."""
        self._vfs = vfs
        self._chunks = chunks
        self._started_ns = time.time_ns()

    @property
    def subdir(self) -> bytes:
        return self.request.subdir

    @property
    def chunks(self) -> ChunkStore:
        return self._chunks

    def describe(self) -> JsonObject:
        request = self.request
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "mountpoint": request.mountpoint,
            "started_ns": self._started_ns,
            "phase": "ending" if self.is_ending else "mounted",
            "subdir": text_of(request.subdir),
            "read_only": request.read_only,
            "durability": request.durability.value,
            "transport": request.transport,
            "cache_dir": str(request.cache_dir),
            "log_path": request.log_path,
        }

    def caller(self, uid: int, gid: int) -> Caller:
        return self._vfs.caller(uid, gid)

    async def flush(self) -> None:
        failed = await self._vfs.flush_all(timeout_s=60.0)
        if failed:
            raise BucketUnavailable(
                f"{len(failed)} files cannot be written to the bucket now: look at the log, try again"
            )

    def entry_changed(self, parent: Ino, name: bytes) -> None:
        self._vfs.entry_changed(parent, name)

    def metrics_text(self) -> str:
        text = self._vfs.metrics_text()
        for name, value in self.backups.gauges().items() if self.backups is not None else ():
            shown = "+Inf" if math.isinf(value) else value
            text += f"# TYPE atoll_meta_{name} gauge\natoll_meta_{name} {shown}\n"
        return text


class MountProcess:
    """Open, serve and end one mount. Used once."""

    def __init__(self, request: MountRequest, *, env: Mapping[str, str], log: Any, ready: Callable[[], None]) -> None:
        """``ready`` is called when the mount answers."""
        self._request = request
        self._env = env
        self._log = log
        self._ready = ready
        self._stop = asyncio.Event()
        self._cut = False
        """Whether open files are cut off at once."""
        self._answered = asyncio.Event()
        self._ended = asyncio.Event()
        self._lost_files = 0
        self._volume: OpenVolume | None = None
        self._mount: Mount | None = None

    def stop(self, *, reason: str) -> None:
        """Begin to end, as after umount(8). May be called again."""
        if not self._stop.is_set():
            self._log.info("ending", reason=reason)
            self._stop.set()

    async def run(self) -> None:
        """Be the mount, from start to end. Whatever keeps it from starting is raised, with nothing left behind."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, partial(self.stop, reason=signal.Signals(number).name))
        request = self._request
        async with AsyncExitStack() as stack:
            volume = await stack.enter_async_context(
                open_volume(
                    request.address,
                    owner=f"{MOUNT_OWNER}{request.mountpoint}",
                    env=self._env,
                    wait_s=HOLDER_WAIT_S,
                    lost=self._volume_lost,
                    mountpoint=request.mountpoint,
                    access=request.access,
                )
            )
            self._volume = volume
            if volume.meta.is_read_only:
                request = self._request = replace(request, read_only=True)
            root = await self._find_root(volume)
            blocks = await volume.block_access()
            await self._check_access(volume, blocks)
            meta = await stack.enter_async_context(volume.session(mountpoint=request.mountpoint, root=root))
            lengths = dict(staged_in(request.cache_dir, volume.format).lengths)
            chunks = await stack.enter_async_context(ChunkStore(self._chunk_config(volume), access=blocks))
            directory = make_holder_directory(request.address, request.mountpoint, env=self._env)
            self._write_record(directory)
            vfs = self._make_vfs(volume, meta, chunks, root)
            self._mount = volume.mounting = Mount(request, vfs, chunks)
            staged = await chunks.recover()
            control = await stack.enter_async_context(
                ControlServer(directory, self._answer, unexpected=self._unexpected)
            )
            if request.metrics is not None:
                from client.metrics_server import metrics_server

                stack.enter_context(metrics_server(request.metrics, partial(stats_text, volume)))
            await settle_staged(volume.admin, chunks, lengths, staged, log=self._log)
            async with vfs:
                await self._serve(vfs, self._jobs(volume, meta, chunks))
            # Leaving has flushed, and logged what it could not; this only counts.
            self._lost_files = len(await vfs.flush_all(timeout_s=0.0))
            await self._drain(chunks)
            self._ended.set()
            await control.close(drain_s=5.0)
        self._log.info("ended")

    # -- starting --------------------------------------------------------------------------------------------------------

    async def _check_access(self, volume: OpenVolume, blocks: BlockAccess) -> None:
        if isinstance(blocks, ObjectAccess):
            await self._check_bucket(volume)
        elif self._request.durability is Durability.LOCAL:
            raise AtollError(
                "--durability local does not go with keys that the service keeps: what is uploaded after the end of a "
                "session is signed by nobody; mount without, or format with --keys environment",
                errno=errno.ENOTSUP,
            )

    async def _check_bucket(self, volume: OpenVolume) -> None:
        """Ask the bucket something, so that a wrong key or an unreachable bucket is told now and not by the first write."""
        limits = Limits(attempt_timeout_s=START_BUDGET_S / 2, budget_s=START_BUDGET_S)
        bucket = open_volume_bucket(volume.address, volume.format.bucket_url, env=self._env, limits=limits)
        try:
            async for _ in bucket.list(f"{volume.format.uuid}/"):
                break
        finally:
            await bucket.close()

    def _chunk_config(self, volume: OpenVolume) -> ChunkStoreConfig:
        volume_format, request = volume.format, self._request
        return ChunkStoreConfig(
            volume_uuid=volume_format.uuid,
            cache_dir=request.cache_dir,
            codec=Codec.parse(volume_format.compression),
            block_bytes=volume_format.block_bytes,
            inline_limit_bytes=volume_format.inline_limit_bytes,
            durability=request.durability,
            cache_limit_bytes=request.cache_limit_bytes,
        )

    async def _find_root(self, volume: OpenVolume) -> Ino:
        """Return the directory that the mount shows as its root. FsError with the remedy if it is none."""
        ino = volume.meta.root
        where = shown(self._request.subdir)
        for name in components(self._request.subdir):
            try:
                inode = await volume.meta.lookup(ino, name)
            except FsError as error:
                raise FsError(error.errno, f"--subdir {where}: give a directory of the volume") from error
            if not inode.is_dir:
                raise FsError(20, f"--subdir {where}: give a directory of the volume")
            ino = inode.ino
        return ino

    def _write_record(self, directory: str) -> None:
        request = self._request
        record = MountRecord(
            pid=os.getpid(),
            host=socket.gethostname(),
            mountpoint=request.mountpoint,
            cache_dir=str(request.cache_dir),
            log_path=request.log_path,
            started_ns=time.time_ns(),
        )
        write_record(directory, record)

    def _make_vfs(self, volume: OpenVolume, meta: Any, chunks: ChunkStore, root: Ino) -> Vfs:
        read_only = self._request.read_only
        # An embedded volume has one session at a time, this one: nobody else changes what the kernel keeps.
        options = VfsOptions.sole_session(read_only=read_only) if volume.is_sole else VfsOptions(read_only=read_only)
        options = replace(options, root=root)
        files = [
            VirtualFile(b"stats", lambda: stats_text(volume).encode()),
            VirtualFile(b"config", self._config_text, 0o400),
        ]
        return Vfs(meta, chunks, log=self._log, options=options, virtual_files=files)

    def _jobs(self, volume: OpenVolume, meta: MetaClient, chunks: ChunkStore) -> Jobs:
        """Return the background work of an embedded volume; new slices belong to the mount's session."""

        @asynccontextmanager
        async def writing() -> AsyncIterator[tuple[MetaClient, ChunkStore]]:
            yield meta, chunks

        request = self._request

        async def shelf() -> Shelf:
            return Shelf(await volume.bucket(), volume.format.uuid)

        backups = Backups(
            shelf,
            volume.admin.dump,
            policy=request.backup,
            check_owned=partial(_check_owned, volume),
            log=self._log,
        )
        if request.backup is not None and not request.read_only and volume.is_sole:
            self._opened()[1].backups = backups
        return Jobs(
            volume.admin,
            lambda: volume.format,
            partial(delete_slices, volume),
            writing,
            self._log,
            backups=backups,
        )

    def _opened(self) -> tuple[OpenVolume, Mount]:
        """Return volume and mount; files and socket are served only while there are both."""
        assert self._volume is not None
        assert self._mount is not None
        return self._volume, self._mount

    def _config_text(self) -> bytes:
        import json

        from client.admin.status import format_json

        volume, mount = self._opened()
        document = {"address": str(volume.address), "format": format_json(volume.format), "mount": mount.describe()}
        return json.dumps(document, indent=2).encode() + b"\n"

    # -- serving ---------------------------------------------------------------------------------------------------------

    async def _serve(self, vfs: Vfs, jobs: Jobs) -> None:
        from client.transport.pyfuse3 import Pyfuse3Transport

        request = self._request
        options = MountOptions(
            mountpoint=Path(request.mountpoint),
            fsname=str(request.address),
            allow_other=request.allow_other,
            read_only=request.read_only,
        )
        transport = Pyfuse3Transport(vfs, options, log=self._log)
        try:
            async with asyncio.TaskGroup() as tasks:
                beside = [tasks.create_task(self._stop_transport(transport), name="stop")]
                if not request.read_only and self._opened()[0].is_sole:
                    beside.append(tasks.create_task(jobs.run(), name="jobs"))
                try:
                    await transport.serve(ready=self._answers)
                finally:
                    for task in beside:
                        task.cancel()
        except BaseExceptionGroup as group:
            # What keeps a mount from starting is one error with one line.
            raise group.exceptions[0] from group
        finally:
            self._opened()[1].is_ending = True
        self._log.info("unmounted")

    async def _stop_transport(self, transport: Any) -> None:
        await self._stop.wait()
        # A mount cannot be stopped before it is there.
        await self._answered.wait()
        await transport.stop(grace_s=0.0 if self._cut else 5.0)

    def _answers(self) -> None:
        """Take note that the kernel was answered: the mount is there."""
        # What was made so far lives as long as the process: collections need not look at it again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC)
        self._log.info("mounted", **self._opened()[1].describe())
        self._answered.set()
        self._ready()

    def _volume_lost(self) -> None:
        """Die, and leave the mount point dead.

        Nothing can be committed any more, so there is nothing to save. Were it unmounted instead, programs would go on
        writing, into the empty directory below; a dead mount refuses them (ENOTCONN) until somebody mounts again.
        """
        failure = self._volume.failure if self._volume is not None else None
        self._log.error(
            "the volume was lost: this mount ends", error=str(failure), remedy="see the error, then mount again"
        )
        os._exit(1)

    # -- ending ----------------------------------------------------------------------------------------------------------

    async def _drain(self, chunks: ChunkStore) -> None:
        try:
            await chunks.drain(timeout_s=DRAIN_S)
        except AtollError as error:
            left = chunks.pending_bytes
            self._log.error("staged data are not uploaded; the next mount does it", bytes=left, error=str(error))

    async def _watch(self, report: Report) -> JsonObject:
        """Tell `atoll umount` how far the end is; the answer is the last thing that the control socket says."""
        mount = self._mount
        assert mount is not None
        while not self._ended.is_set():
            pending = mount.chunks.pending_bytes
            text = "uploading" if mount.is_ending and pending else "flushing" if mount.is_ending else "unmounting"
            report.progress(Progress(text, 0, None, f"bytes left: {pending:,}" if pending else ""))
            try:
                async with asyncio.timeout(WATCH_S):
                    await self._ended.wait()
            except TimeoutError:
                continue
        return {
            "pending_bytes": mount.chunks.pending_bytes,
            "lost_files": self._lost_files,
            "cache_dir": str(mount.request.cache_dir),
            "log_path": mount.request.log_path,
        }

    # -- answering -------------------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, peer: Peer, report: Report) -> JsonObject:
        """Answer one request at the control socket."""
        volume, mount = self._opened()
        if request.name == "holder":
            return mount.describe()
        if request.name == "watch-end":
            return await self._watch(report)
        if request.name == "stop":
            if request.params:
                raise ControlError("the request stop takes no parameters")
            self._cut = True
            self.stop(reason="request")
            return await self._watch(report)
        if mount.is_ending and request.name != "status":
            raise NotReady("the holder of the volume is ending: try again in a moment")
        return await run_operation(volume, request, peer, report)

    def _unexpected(self, request: Request, error: BaseException) -> None:
        self._log.error("a request at the control socket failed unexpectedly", request=request.name, exc_info=error)


def _check_owned(volume: OpenVolume) -> None:
    # The ownership of an embedded volume does not run out: whoever loses it is told.
    if volume.failure is not None:
        raise volume.failure
