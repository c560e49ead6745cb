"""What the figures of a run depend on besides the code: machine, versions, load, and the speed of the disk.

Owns nothing; it is written into every result, so that no figure travels without it.
"""

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.processes import StepFailed, find_command

_VERSION_ARGUMENTS = {
    "atoll": ("--version",),
    "juicefs": ("version",),
    "rclone": ("version",),
    "weed": ("version",),
    "redis-cli": ("--version",),
}


@dataclass(frozen=True, slots=True)
class Environment:
    """The circumstances of a run."""

    kernel: str
    python: str
    processors: int
    memory_bytes: int
    file_system: str
    fdatasync_us: float
    versions: dict[str, str]
    commit: str


def describe(scratch: Path) -> Environment:
    """Describe this machine and the file system of a directory."""
    return Environment(
        kernel=platform.release(),
        python=platform.python_version(),
        processors=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        file_system=_output("findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(scratch)),
        fdatasync_us=_fdatasync_us(scratch / "fdatasync"),
        versions={name: _version(name, *arguments) for name, arguments in _VERSION_ARGUMENTS.items()},
        commit=_output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    )


def check_machine(scratch: Path, *, needed_bytes: int) -> None:
    """Refuse what would give no figures or wrong ones; raise StepFailed with the remedy."""
    if os.geteuid() != 0:
        raise StepFailed("only root can drop the page cache: run as root")
    if not Path("/dev/fuse").exists():
        raise StepFailed("no /dev/fuse: load the fuse module, or give the device to the container")
    usage = shutil.disk_usage(scratch)
    # JuiceFS stops caching where less than a tenth of the file system is free.
    left_bytes = usage.free - needed_bytes - usage.total // 10
    if left_bytes < 0:
        raise StepFailed(f"{scratch}: {-left_bytes / 2**30:.1f} GiB more must be free: give another --scratch")


def load_average() -> float:
    """Give the load of the last minute, from which one sees that others used the machine as well."""
    return os.getloadavg()[0]


def _output(*arguments: str) -> str:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines else "unknown"


def _version(name: str, *arguments: str) -> str:
    try:
        return _output(find_command(name), *arguments)
    except StepFailed:
        return "absent"


def _fdatasync_us(path: Path) -> float:
    """Measure a durable 4 KiB append, of which every acknowledged metadata operation needs at least a share."""
    laps_us = []
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for _ in range(100):
            before_s = time.perf_counter()
            os.write(descriptor, bytes(4096))
            os.fdatasync(descriptor)
            laps_us.append((time.perf_counter() - before_s) * 1e6)
    finally:
        os.close(descriptor)
        path.unlink()
    return round(median(laps_us), 1)
