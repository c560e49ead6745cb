"""The file systems that are compared, each behind the same four steps: prepare, mount, unmount, forget the cache.

Owns their command lines. Every peer runs with its own defaults, the cache on and writeback off, so that close means the
same for all: the data are in the bucket. Must not know which works are run.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Protocol

from bench.processes import (
    StepFailed,
    end_process,
    find_command,
    has_ended,
    is_mounted,
    no_mount_left,
    run_step,
    running,
    unmount,
    wait_until,
)
from bench.servers import (
    REGION,
    Bucket,
    DirectoryBucket,
    MetadataService,
    S3Bucket,
    keys_environment,
    rclone_environment,
)
from tests.servers.ports import free_ports

_MOUNT_DEADLINE_S: Final = 60.0
_COMMAND_LIMIT_S: Final = 120.0


class Purpose(Enum):
    """What a mount is for; only rclone needs to know."""

    WRITE = "write"
    READ = "read"


@dataclass(frozen=True, slots=True)
class Messages:
    """What a mount and its metadata service said to each other."""

    operations: int
    sent: int
    received: int

    def since(self, before: Messages) -> Messages:
        """Return the difference."""
        return Messages(self.operations - before.operations, self.sent - before.sent, self.received - before.received)


class System(Protocol):
    """A file system under test; one object serves one round."""

    @property
    def name(self) -> str: ...

    @property
    def keeps_modes(self) -> bool:
        """Say whether chmod is kept."""

    def prepare(self) -> None:
        """Make the empty volume."""

    def mounted(self, purpose: Purpose) -> AbstractContextManager[Path]:
        """Mount for the time of a block and give the directory to work in; raise StepFailed if that does not work."""

    def forget_cache(self) -> None:
        """Empty the cache directory; nothing is mounted now."""

    def settle(self) -> None:
        """Wait until what was read has reached the cache directory."""

    def messages(self) -> Messages | None:
        """Return what the mount has exchanged with its metadata service so far; None where that is not known."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a system lives in a round: directories of its own, its bucket, and who keeps its names.

    `juicefs` is the address of JuiceFS's metadata, and None where it takes no part.
    """

    root: Path
    bucket: Bucket
    juicefs: str | None
    service: MetadataService | None = None

    @property
    def mountpoint(self) -> Path:
        return self.root / "mnt"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def make(self) -> None:
        self.root.mkdir()
        self.mountpoint.mkdir()
        self.cache.mkdir()


def _empty(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


def _size_bytes(directory: Path) -> int:
    total_bytes = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            # A cache may rename and delete under our feet.
            with suppress(FileNotFoundError):
                total_bytes += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total_bytes


def _settle(cache: Path) -> None:
    """Wait until the cache directory has not changed its size for half a second, at most ten seconds."""
    seen_bytes, still = -1, 0
    for _ in range(40):
        now_bytes = _size_bytes(cache)
        still = still + 1 if now_bytes == seen_bytes else 0
        if still == 2:
            return
        seen_bytes = now_bytes
        time.sleep(0.25)


@dataclass(frozen=True, slots=True)
class PlainDirectory:
    """The file system below everything else, without anything in between; nothing of it is ever fetched from afar."""

    place: Place
    name: str = "ext4"
    keeps_modes: bool = True

    def prepare(self) -> None:
        self.place.make()

    @contextmanager
    def mounted(self, purpose: Purpose) -> Iterator[Path]:
        yield self.place.mountpoint

    def forget_cache(self) -> None: ...

    def settle(self) -> None: ...

    def messages(self) -> None: ...


@dataclass(frozen=True, slots=True)
class JuiceFS:
    """JuiceFS Community Edition, its metadata in Redis or PostgreSQL."""

    place: Place
    name: str = "juicefs"
    keeps_modes: bool = True

    def prepare(self) -> None:
        self.place.make()
        arguments = [find_command("juicefs"), "format", "--no-color", self._address, "bench", "--trash-days", "0"]
        match self.place.bucket:
            case DirectoryBucket(path):
                path.mkdir()
                arguments += ["--storage", "file", "--bucket", f"{path}/"]
            case S3Bucket(endpoint, name, access_key, secret_key):
                arguments += ["--storage", "s3", "--bucket", f"{endpoint}/{name}"]
                arguments += ["--access-key", access_key, "--secret-key", secret_key]
        run_step(arguments, log=self.place.root / "format", limit_s=_COMMAND_LIMIT_S)

    @property
    def _address(self) -> str:
        if self.place.juicefs is None:
            raise StepFailed("juicefs: no server was started for its metadata")
        return self.place.juicefs

    @contextmanager
    def mounted(self, purpose: Purpose) -> Iterator[Path]:
        mountpoint, log = self.place.mountpoint, self.place.root / "mount.log"
        command = find_command("juicefs")
        [metrics_port] = free_ports(1)
        arguments = [command, "mount", "--no-color", "--no-usage-report", "--metrics", f"127.0.0.1:{metrics_port}"]
        arguments += ["--cache-dir", str(self.place.cache), self._address, str(mountpoint)]
        # In the foreground, so that the process has an id that we know.
        with no_mount_left(mountpoint), running(arguments, log=log) as child:
            try:
                # It answers once its root has inode 1.
                wait_until(
                    lambda: is_mounted(mountpoint) and mountpoint.stat().st_ino == 1,
                    what="juicefs mount",
                    deadline_s=_MOUNT_DEADLINE_S,
                    child=child,
                )
                yield mountpoint
            finally:
                unmount(mountpoint, [command, "umount", str(mountpoint)], log=self.place.root / "umount")
            child.wait(_MOUNT_DEADLINE_S)

    def forget_cache(self) -> None:
        _empty(self.place.cache)

    def settle(self) -> None:
        _settle(self.place.cache)

    def messages(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RcloneMount:
    """rclone mount on the bare bucket: no metadata service, one object per file.

    Written without its write cache, because that answers close before anything is in the bucket; read with its full
    disk cache, because without it rclone keeps nothing.
    """

    place: Place
    name: str = "rclone"
    keeps_modes: bool = False

    def prepare(self) -> None:
        self.place.make()

    @contextmanager
    def mounted(self, purpose: Purpose) -> Iterator[Path]:
        bucket, mountpoint = self.place.bucket, self.place.mountpoint
        if not isinstance(bucket, S3Bucket):
            raise StepFailed("rclone: runs only on S3")
        mode = {Purpose.WRITE: "off", Purpose.READ: "full"}[purpose]
        arguments = [find_command("rclone"), "mount", f"bench:{bucket.name}", str(mountpoint), "--vfs-cache-mode", mode]
        arguments += ["--cache-dir", str(self.place.cache), "--allow-other", "--log-level", "ERROR"]
        environment = rclone_environment(bucket, config=self.place.root / "rclone.conf")
        log = self.place.root / "mount.log"
        with no_mount_left(mountpoint), running(arguments, log=log, environment=environment) as child:
            try:
                wait_until(
                    lambda: is_mounted(mountpoint), what="rclone mount", deadline_s=_MOUNT_DEADLINE_S, child=child
                )
                yield mountpoint
            finally:
                command = [find_command("fusermount3"), "-u", str(mountpoint)]
                unmount(mountpoint, command, log=self.place.root / "umount")
            child.wait(_MOUNT_DEADLINE_S)

    def forget_cache(self) -> None:
        _empty(self.place.cache)

    def settle(self) -> None:
        _settle(self.place.cache)

    def messages(self) -> None: ...


@dataclass(frozen=True, slots=True)
class AtollFS:
    """This project by its commands only: an embedded volume, or one of a service where the place has one."""

    place: Place
    name: str = "atoll"
    keeps_modes: bool = True

    @property
    def _volume(self) -> str:
        if self.place.service is not None:
            return f"{self.place.service.address}/bench/{self.place.root.parent.name}"
        return str(self.place.root / "volume")

    @property
    def _environment(self) -> dict[str, str]:
        bucket, service = self.place.bucket, self.place.service
        keys = keys_environment(bucket.access_key, bucket.secret_key) if isinstance(bucket, S3Bucket) else {}
        return keys | ({"ATOLL_TOKEN": service.token} if service is not None else {})

    def _run(self, *arguments: str) -> str:
        return run_step(
            [find_command("atoll"), *arguments],
            log=self.place.root / f"atoll-{arguments[0]}",
            limit_s=_COMMAND_LIMIT_S,
            environment=self._environment,
        )

    def _bucket_url(self) -> str:
        match self.place.bucket:
            case DirectoryBucket(path):
                return f"file://{path}"
            case S3Bucket(endpoint, name, _, _):
                return f"s3://{name}?endpoint={endpoint}&region={REGION}"

    def prepare(self) -> None:
        self.place.make()
        if isinstance(self.place.bucket, DirectoryBucket):
            self.place.bucket.path.mkdir()
        self._run("format", self._volume, "--bucket", self._bucket_url(), "--trash-days", "0")

    def mount(self) -> None:
        """Mount; returns when the mount answers."""
        arguments = ["mount", self._volume, str(self.place.mountpoint), "--cache-dir", str(self.place.cache)]
        self._run(*arguments)
        if not is_mounted(self.place.mountpoint):
            raise StepFailed("atoll mount: returned although nothing is mounted")

    def holder(self) -> int:
        """Ask for the id of the process that holds the mount."""
        # Of a service's mounts each is asked at its mount point.
        where = self._volume if self.place.service is None else str(self.place.mountpoint)
        status = json.loads(self._run("status", where, "--json"))
        return int(status["holder"]["pid"])

    def unmount(self) -> None:
        """Unmount and see that the daemon ended; end it by its id if it does not."""
        mountpoint = self.place.mountpoint
        if not is_mounted(mountpoint):
            return
        holder = None
        with suppress(StepFailed, ValueError, KeyError, TypeError):
            holder = self.holder()
        try:
            unmount(
                mountpoint,
                [find_command("atoll"), "umount", str(mountpoint)],
                log=self.place.root / "atoll-umount",
                environment=self._environment,
            )
        except BaseException:
            if holder is not None:
                end_process(holder)
            raise
        if holder is not None and not has_ended(holder):
            end_process(holder)
            raise StepFailed("atoll umount: returned although its daemon was still there")

    @contextmanager
    def mounted(self, purpose: Purpose) -> Iterator[Path]:
        with no_mount_left(self.place.mountpoint):
            try:
                self.mount()
                yield self.place.mountpoint
            finally:
                self.unmount()

    def forget_cache(self) -> None:
        _empty(self.place.cache)

    def settle(self) -> None:
        _settle(self.place.cache)

    def messages(self) -> Messages | None:
        if self.place.service is None:
            return None
        found = {}
        for line in (self.place.mountpoint / ".atoll" / "stats").read_text().splitlines():
            name, _, value = line.rpartition(" ")
            found[name] = value
        operations, sent, received = (
            int(found[f"atoll_meta_{name}_total"]) for name in ("operations", "messages_sent", "messages_received")
        )
        return Messages(operations, sent, received)


SYSTEMS: Final[dict[str, Callable[[Place], System]]] = {
    "atoll": AtollFS,
    "juicefs": JuiceFS,
    "rclone": RcloneMount,
    "ext4": PlainDirectory,
}
