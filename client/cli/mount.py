"""``atoll mount ADDRESS MOUNTPOINT``: check, leave the terminal, and be the mount.

What can be refused is refused before the fork, where errors are cheap and nothing has been begun; what only the daemon finds
out (bucket, ownership) comes back over its pipe as the same one line.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from chunkstore.errors import AtollError
from client.address import Address, EmbeddedAddress, normalize, parse_address, shown, split_path
from client.cli.main import fail
from client.cli.mountpoint import absolute, check_fuse, prepare
from client.cli.options import SIZE, backup_options, backup_policy, token_option
from client.cli.output import one_line
from client.sizes import format_size

if TYPE_CHECKING:
    from client.daemon import Daemon
    from client.mounted import MountRequest

MIN_CACHE_FREE_BYTES: Final = 16 << 20
MIN_CACHE_BYTES: Final = 64 << 20
_METADATA_READ_AHEAD_BYTES: Final = 256 << 20
FUSE_CONF: Final = "/etc/fuse.conf"


class CacheInvalid(AtollError):
    """Say why a directory cannot be the cache."""

    code = "bad-cache"


@click.command("mount")
@click.argument("address")
@click.argument("mountpoint")
@click.option("-f", "--foreground", is_flag=True, help="Stay in the terminal; log to stderr.")
@click.option(
    "--cache-dir", metavar="DIR", help="For caches and their logs  [default: /var/cache/atoll, or ~/.cache/atoll]"
)
@click.option("--cache-size", type=SIZE, help="Bound of this volume's cache  [default: 80 % of its file system]")
@click.option(
    "--durability",
    type=click.Choice(["object", "local"]),
    default="object",
    show_default=True,
    help="Where data are when close() and fsync() return: in the bucket, or on this node's disk.",
)
@click.option("--read-only", is_flag=True, help="Refuse every change.")
@click.option("--subdir", metavar="PATH", default="/", help="Show only this directory of the volume.")
@token_option
@click.option(
    "--meta-timeout",
    type=click.FloatRange(1.0),
    default=300.0,
    show_default=True,
    help="Seconds for which programs wait while the service is away; then they get EIO.",
)
@click.option("--metrics", metavar="HOST:PORT", help="Where to answer /metrics for Prometheus.  [nowhere]")
@backup_options
@click.option("--transport", type=click.Choice(["auto", "pyfuse3"]), default="auto", show_default=True)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(
    address: str,
    mountpoint: str,
    *,
    foreground: bool,
    cache_dir: str | None,
    cache_size: int | None,
    durability: str,
    read_only: bool,
    subdir: str,
    token_file: str | None,
    meta_timeout: float,
    metrics: str | None,
    backup: float | None,
    backup_window: float,
    transport: str,
    log_format: str,
) -> None:
    """Mount the volume at ADDRESS on the empty directory MOUNTPOINT. Returns when the mount answers.

    At least a tenth of the cache's file system is left free. The log lies beside the cache.
    """
    from client.volume import access_by, check_is_volume, default_cache_dir

    if split_path(address)[1] is not None:
        raise click.UsageError(
            f"{shown(address)} names a path in a volume: give the volume, and the path with --subdir"
        )
    if cache_size is not None and cache_size < MIN_CACHE_BYTES:
        raise click.UsageError(f"--cache-size is at least {format_size(MIN_CACHE_BYTES)}: give more")
    policy = backup_policy(backup, backup_window)
    if policy is not None and read_only:
        raise click.UsageError("--backup and --read-only: a mount that changes nothing makes no backups, leave one out")
    volume = parse_address(address)
    if policy is not None and not isinstance(volume, EmbeddedAddress):
        raise click.UsageError("--backup is for embedded volumes: give it to `atoll serve`")
    if isinstance(volume, EmbeddedAddress):
        check_is_volume(volume)
        access = None
    else:
        access = access_by(token_file, env=os.environ, timeout_s=meta_timeout)
    if metrics is not None:
        from client.metrics_server import parse_listen

        parse_listen(metrics)
    where = absolute(mountpoint)
    check_fuse()
    # First the holder: looking at a mount point whose daemon hangs would hang as well.
    if isinstance(volume, EmbeddedAddress):
        _refuse_second_mount(volume)
    prepare(where, volume)
    caches = Path(os.path.realpath(cache_dir)) if cache_dir is not None else default_cache_dir(os.environ)
    _prepare_cache(caches)
    log_path = "" if foreground else str(caches / f"{_log_name(volume)}.log")
    if isinstance(volume, EmbeddedAddress):
        _load_metadata(volume)

    def run(daemon: Daemon | None) -> int:
        from chunkstore.slices import Durability
        from client.mounted import MountRequest

        request = MountRequest(
            address=volume,
            mountpoint=where,
            cache_dir=caches,
            cache_limit_bytes=cache_size,
            durability=Durability(durability),
            read_only=read_only,
            subdir=normalize(os.fsencode(subdir)),
            transport="pyfuse3" if transport == "auto" else transport,
            allow_other=_may_allow_other(),
            log_path=log_path,
            access=access,
            metrics=metrics,
            backup=policy,
        )
        return _be_the_mount(request, daemon, log_format=log_format)

    if foreground:
        sys.exit(run(None))
    from client.daemon import leave_terminal

    failure = leave_terminal(run, log_path=log_path)
    if failure is not None:
        fail(failure, code=1)


def _log_name(volume: Address) -> str:
    """Return the name of the volume's log: that of its cache, the uuid, read without an engine; of a service's its address.

    No connection is made here: the daemon is forked after it.
    """
    import asyncio

    from client.volume import read_uuid

    if isinstance(volume, EmbeddedAddress):
        return asyncio.run(read_uuid(volume))
    host, port = volume.servers[0]
    return f"{host.strip('[]')}-{port}-{volume.tenant}-{volume.volume}"


def _load_metadata(volume: EmbeddedAddress) -> None:
    """Have the kernel read the first part of the metadata while the mount starts: who mounts is about to list and stat.

    Here and not later: once this process has the database open, closing another descriptor of it would drop SQLite's locks.
    Listing 5,000 files after a reboot takes 16 us a file without, 12 with it.
    """
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        descriptor = os.open(volume.meta_db, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        wanted_bytes = min(_METADATA_READ_AHEAD_BYTES, free_bytes // 4)
        os.posix_fadvise(descriptor, 0, wanted_bytes, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _prepare_cache(directory: Path) -> None:
    """Make the cache directory; refuse one that cannot be written or is full."""
    where = shown(str(directory))
    probe = directory / f".probe-{os.getpid()}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            with open(probe, "xb") as file:
                file.write(bytes(64 << 10))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
        free_bytes = shutil.disk_usage(directory).free
    except OSError as error:
        raise CacheInvalid(
            f"cache directory {where}: {error.strerror}: give another with --cache-dir, or make room", errno=error.errno
        ) from error
    if free_bytes < MIN_CACHE_FREE_BYTES:
        raise CacheInvalid(
            f"cache directory {where} has {format_size(free_bytes)} free, {format_size(MIN_CACHE_FREE_BYTES)} are needed: "
            "make room, or give another with --cache-dir",
            errno=28,
        )


def _refuse_second_mount(volume: EmbeddedAddress) -> None:
    """Refuse at once while the volume is mounted; wait up to 10 s for a mount that is ending."""
    from client.control.caller import ANSWER_S, HolderLost, RemoteError, call_holder
    from client.control.messages import Request
    from client.volume import HOLDER_WAIT_S, POLL_S, VolumeBusy

    deadline_s = time.monotonic() + HOLDER_WAIT_S
    while (call := call_holder(volume.directory, silence_s=ANSWER_S)) is not None:
        with call:
            try:
                holder: dict[str, Any] = call.run(Request("holder", {}))
            except (HolderLost, RemoteError) as error:
                holder = _silent_holder(volume, call.holder_pid, error)
        if holder["phase"] == "mounted" or time.monotonic() >= deadline_s:
            place = shown(str(holder["mountpoint"]))
            state = "" if holder["phase"] == "mounted" else f" and {holder['phase']}"
            raise VolumeBusy(
                f"the volume is mounted at {place} by pid {holder['pid']}{state}: "
                f"use it there, or end that with `atoll umount {place}`"
            )
        time.sleep(POLL_S)


def _silent_holder(volume: EmbeddedAddress, pid: int, error: AtollError) -> dict[str, Any]:
    """Return what is known of a holder that does not say it itself."""
    from client.staged import read_record

    record = read_record(volume.directory)
    phase = "silent (is it stopped?)" if error.code == "holder-lost" else "not ready"
    return {"phase": phase, "pid": pid, "mountpoint": "?" if record is None else record.mountpoint}


def _may_allow_other() -> bool:
    """Return whether other users may be let in: root may, others where fuse.conf says so."""
    if os.geteuid() == 0:
        return True
    try:
        with open(FUSE_CONF, encoding="utf-8", errors="replace") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


def _be_the_mount(request: MountRequest, daemon: Daemon | None, *, log_format: str) -> int:
    """Run the mount in this process until it ends; the exit code."""
    import asyncio

    import uvloop

    from chunkstore.allocator import keep_freed_memory
    from client import logs
    from client.daemon import raise_limits
    from client.mounted import MountProcess

    log = logs.configure(
        request.log_path or None, volume=str(request.address), log_format="json" if log_format == "json" else "text"
    )
    raise_limits()
    keep_freed_memory()

    def ready() -> None:
        if daemon is not None:
            daemon.ready()

    async def mount() -> None:
        await MountProcess(request, env=os.environ, log=log, ready=ready).run()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(mount())
    except Exception as error:
        from metasvc.errors import NotOwner

        if isinstance(error, NotOwner):
            from client.volume import busy

            error = busy(error)
        expected = isinstance(error, AtollError | OSError)
        log.error("the mount failed", error=one_line(error), exc_info=None if expected else error)
        if daemon is not None:
            daemon.failed(one_line(error))
        elif not expected:
            raise
        else:
            fail(one_line(error), code=1)
        return 1
    return 0
