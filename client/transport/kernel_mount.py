"""Taking a mount away, as root and without, and setting what the kernel lets be set of one. Blocking: run it on a thread.

While a mount is taken away the kernel may still send requests (dirty pages of mappings, FORGET), so the loop that answers
them must run meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Final

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_HELPER_TIMEOUT_S: Final = 30.0


def detach(mountpoint: str) -> None:
    """Take a mount out of the tree at once; open files live on until they are closed. OSError; fine if it is gone."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(mountpoint), _MNT_DETACH | _UMOUNT_NOFOLLOW):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), mountpoint)
        return
    done = subprocess.run(
        ["fusermount3", "-u", "-z", mountpoint],
        check=False,
        capture_output=True,
        text=True,
        timeout=_HELPER_TIMEOUT_S,
    )
    if done.returncode:
        raise OSError(done.stderr.strip() or f"fusermount3 failed with {done.returncode}")


def set_kernel_limits(device: str, *, read_ahead_kb: int, max_background: int) -> None:
    """Raise the kernel's read-ahead and the number of requests in flight for a mount, where we may; else leave them.

    `device` is `major:minor` of the mount. libfuse asks for neither, and the kernel caps the first at 128 KiB in INIT. The
    second needs a fusectl file system at /sys/fs/fuse/connections, as systemd mounts it.
    """
    connection = Path("/sys/fs/fuse/connections") / device.partition(":")[2]
    wanted = [
        (Path("/sys/class/bdi") / device / "read_ahead_kb", read_ahead_kb),
        (connection / "max_background", max_background),
        (connection / "congestion_threshold", max_background * 3 // 4),
    ]
    for path, value in wanted:
        try:
            path.write_text(f"{value}\n", encoding="ascii")
        except OSError:
            continue  # not root, or not there (containers): slower, not wrong
