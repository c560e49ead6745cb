"""How many requests of a FUSE file system are not answered: what is in flight, by the kernel's own count."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.mount.mounted import COMMAND_TIMEOUT_S


@contextlib.contextmanager
def requests_waiting(mountpoint: Path) -> Iterator[Callable[[], int]]:
    """Yield what returns the number of requests waiting for the daemon or under way in it, now. Needs root.

    Each stands for a thread inside a system call, as far as it is not one of the kernel's own (read-ahead, releases).
    Asking does not touch the mount point.
    """
    minor = os.minor(os.stat(mountpoint).st_dev)
    usual = Path("/sys/fs/fuse/connections") / str(minor) / "waiting"
    if usual.exists():
        yield lambda: int(usual.read_text())
        return
    with tempfile.TemporaryDirectory(prefix="atoll-fusectl-") as directory:
        subprocess.run(["mount", "-t", "fusectl", "none", directory], check=True, timeout=COMMAND_TIMEOUT_S)
        try:
            count = Path(directory) / str(minor) / "waiting"
            yield lambda: int(count.read_text())
        finally:
            subprocess.run(["umount", directory], check=True, timeout=COMMAND_TIMEOUT_S)
