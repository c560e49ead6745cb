"""A volume mounted by the real command, for tests: format, mount, remount, kill, fsck and gc, each with a deadline.

Owns the directories that it makes and the mounts in them; knows the command line (`atoll …`) and nothing of what is behind
it. A mount point stands directly under a directory of mode 0755, so that programs which run as other users reach it.

A MountedVolume is used by one thread at a time. Between `kill_daemon()` and `mount()` the mount point is dead: every call
on it answers ENOTCONN.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from tests.mount import stores

ATOLL: Final = Path(sys.executable).with_name("atoll")
"""The command that the environment of these tests installed."""

PROVIDER_VARIABLES: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")

COMMAND_TIMEOUT_S: Final = 60
"""No command of a test's small volume takes longer, unless it hangs; a mount may wait 10 s for its predecessor's end."""


class CommandFailed(AssertionError):
    """Tell that `atoll …` ended with another exit code than 0, with all that it printed."""

    def __init__(self, arguments: Sequence[str], result: subprocess.CompletedProcess[str]) -> None:
        super().__init__(
            f"atoll {' '.join(arguments)}: exit {result.returncode}\n--- stdout\n{result.stdout}\n--- stderr\n{result.stderr}"
        )
        self.returncode = result.returncode


def atoll(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = COMMAND_TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    """Run `atoll` with these arguments and return its result, whatever the exit code; TimeoutExpired past the deadline.

    Output goes to files, not pipes: a daemon that outlives the command may keep them open.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        code = subprocess.run(
            [ATOLL, *arguments],
            check=False,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            timeout=timeout_s,
        ).returncode
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())


def is_mount_point(path: Path) -> bool:
    """Return whether something is mounted exactly there; a dead FUSE mount counts, and is not touched by asking."""
    escaped = os.fsencode(path).replace(b"\\", rb"\134").replace(b" ", rb"\040").replace(b"\t", rb"\011")
    with open("/proc/self/mountinfo", "rb") as mounts:
        return any(line.split()[4] == escaped for line in mounts)


def detach(path: Path) -> None:
    """Take a mount out of the tree even if nothing answers behind it (`umount -l`); nothing to do where none is."""
    while is_mount_point(path):
        subprocess.run(["umount", "-l", path], check=True, timeout=COMMAND_TIMEOUT_S)


@dataclass(slots=True)
class MountedVolume:
    """Hold one volume and one mount point of it; made by `mounted()`, which also cleans up."""

    address: str
    path: Path
    cache_dir: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    pid: int = 0
    """The process that holds the volume since the last `mount()`."""
    objects: Path = Path()
    """Where the objects lie, if the bucket is a directory."""

    def atoll(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a command with the volume's environment and return its stdout; CommandFailed for any exit code but 0."""
        result = atoll(*arguments, environment=self.environment, timeout_s=timeout_s)
        if result.returncode != 0:
            raise CommandFailed(arguments, result)
        return result.stdout

    def document(self, *arguments: str, timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, Any]:
        """Run a command with `--json` and return the document that it prints."""
        document = json.loads(self.atoll(*arguments, "--json", timeout_s=timeout_s))
        assert isinstance(document, dict)
        return document

    def mount(self, *options: str) -> None:
        """Mount the volume; it answers when this returns."""
        self.atoll("mount", self.address, str(self.path), "--cache-dir", str(self.cache_dir), *options)
        assert is_mount_point(self.path)
        holder = self.document("status", str(self.path))["holder"]
        assert isinstance(holder["pid"], int)
        assert holder["pid"] > 1
        self.pid = holder["pid"]

    def unmount(self) -> None:
        """Unmount and wait until the daemon has ended, its uploads included."""
        self.atoll("umount", str(self.path), timeout_s=2 * COMMAND_TIMEOUT_S)
        assert not is_mount_point(self.path)

    def remount(self, *options: str) -> None:
        """Unmount and mount again: what is read afterwards comes from cache, bucket and meta.db, not from the kernel."""
        self.unmount()
        self.mount(*options)

    def remount_with_empty_cache(self, *options: str) -> None:
        """Unmount, drop the cache directory and mount: what is read afterwards comes from bucket and meta.db only."""
        self.unmount()
        shutil.rmtree(self.cache_dir)
        self.cache_dir.mkdir()
        self.mount(*options)

    def kill_daemon(self) -> None:
        """Kill the daemon with SIGKILL and return when the process is gone; the mount point is dead afterwards."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until_gone(self.pid)

    def abandon(self) -> None:
        """Leave nothing behind, whatever state the volume is in: no mount, no daemon."""
        detach(self.path)
        # The number may be somebody else's by now; this daemon is the one that names its volume.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if self.pid and os.fsencode(self.address) in Path(f"/proc/{self.pid}/cmdline").read_bytes():
                self.kill_daemon()

    def fsck(self) -> None:
        """Check the whole volume; fails with what was found unless it is clean."""
        self.atoll("fsck", self.address, timeout_s=2 * COMMAND_TIMEOUT_S)


def wait_until_gone(pid: int, timeout_s: float = COMMAND_TIMEOUT_S) -> None:
    """Return when that process has ended (a zombie counts as ended); AssertionError past the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state in "ZX":
            return
        assert time.monotonic() < deadline, f"process {pid} is still there after {timeout_s} s, in state {state}"
        time.sleep(0.01)


@contextlib.contextmanager
def mounted(
    directory: Path,
    *format_options: str,
    mount_options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    address: str | None = None,
    keys_stay: bool = False,
) -> Iterator[MountedVolume]:
    """Format a volume, embedded under `directory` unless an address is given, mount it; unmount it, and demand a clean fsck.

    ``keys_stay``: the keys of the bucket are in the environment of `format` and of the last fsck only; a service keeps them.

    If the body raised, the volume is unmounted all the same, by force if need be, and the body's exception is what is seen.
    With ATOLL_TEST_METADATA=service or ATOLL_TEST_STORE in the environment it is the volume of a service.
    """
    if address is None and stores.goes_through_a_service():
        from tests.mount.service import served_and_mounted

        with served_and_mounted(
            directory, *format_options, mount_options=mount_options, environment=environment
        ) as volume:
            yield volume
        return
    cache_dir = directory / "cache"
    cache_dir.mkdir()
    # Not under `directory`: pytest's own are of mode 0700, and a database server refuses to run as root.
    top = Path(tempfile.mkdtemp(prefix="atoll-mount-"))
    top.chmod(0o755)
    path = top / "mnt"
    path.mkdir()
    address = address or str(directory / "volume")
    bucket_url = dict(pairwise(format_options)).get("--bucket", f"file://{address}/objects")
    given = dict(environment or {})
    volume = MountedVolume(
        address=address,
        path=path,
        cache_dir=cache_dir,
        environment=given,
        objects=Path(bucket_url.removeprefix("file://")),
    )
    try:
        told = volume.atoll("format", volume.address, *format_options)
        if keys_stay:
            assert "clients need none" in told
            volume.environment = {name: given[name] for name in given if name not in PROVIDER_VARIABLES}
        volume.mount(*mount_options)
        try:
            yield volume
        except BaseException:
            with contextlib.suppress(CommandFailed, subprocess.TimeoutExpired, AssertionError):
                volume.unmount()
            raise
        if is_mount_point(path):
            volume.unmount()
        volume.environment = given
        volume.fsck()
    finally:
        volume.abandon()
        path.rmdir()
        top.rmdir()
