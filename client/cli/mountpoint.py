"""What a mount point must be before a volume is mounted there, and how a mount is taken away.

Owns the refusals, each with its remedy, and unmounting as root and without. Nothing here waits for a daemon that is gone.
"""

from __future__ import annotations

import errno
import os
import subprocess
from typing import Final

from chunkstore.errors import AtollError
from client.address import Address, EmbeddedAddress, shown
from client.cli.output import say
from client.mounts import is_dead, mounts_at, read_mounts

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_HELPER_TIMEOUT_S: Final = 60.0


class MountpointInvalid(AtollError):
    """Say why a volume cannot be mounted, or unmounted, there."""

    code = "bad-mountpoint"
    errno = errno.EINVAL


def absolute(mountpoint: str) -> str:
    """Return the path of a mount point, free of symbolic links; a dead mount there does not matter."""
    if not mountpoint:
        raise MountpointInvalid("the mount point is empty: give a directory")
    # The last name by itself: lstat() of a dead mount fails, and realpath would be at its mercy.
    directory, name = os.path.split(os.path.abspath(mountpoint))
    path = os.path.join(os.path.realpath(directory), name)
    if mounts_at(path, read_mounts()):
        return path
    return os.path.realpath(path)


def prepare(mountpoint: str, address: Address) -> None:
    """Refuse what is no empty directory; take away what a killed daemon of this volume left mounted there."""
    where = shown(mountpoint)
    there = mounts_at(mountpoint, read_mounts())
    while there and there[-1].is_ours and is_dead(mountpoint):
        if there[-1].source != str(address):
            raise MountpointInvalid(
                f"{where} is a dead mount of {shown(there[-1].source)}: take it away with `atoll umount {where}`",
                errno=errno.EBUSY,
            )
        detach(mountpoint)
        say(f"the daemon of the mount at {where} was gone: unmounted it first")
        there = mounts_at(mountpoint, read_mounts())
    if there and there[-1].is_ours:
        raise MountpointInvalid(
            f"{shown(there[-1].source)} is mounted at {where} already: `atoll umount {where}`, or choose another directory",
            errno=errno.EBUSY,
        )
    if there:
        raise MountpointInvalid(
            f"{where} is a mount point already ({there[-1].fstype}): unmount that, or choose another directory",
            errno=errno.EBUSY,
        )
    try:
        entries = os.listdir(mountpoint)
    except FileNotFoundError as error:
        raise MountpointInvalid(f"there is no directory {where}: create it with mkdir", errno=errno.ENOENT) from error
    except NotADirectoryError as error:
        raise MountpointInvalid(f"{where} is no directory: choose an empty one", errno=errno.ENOTDIR) from error
    except OSError as error:
        raise MountpointInvalid(f"{where}: {error.strerror}: choose a directory of yours", errno=error.errno) from error
    if entries:
        raise MountpointInvalid(f"{where} is not empty: choose an empty directory", errno=errno.ENOTEMPTY)
    if isinstance(address, EmbeddedAddress) and (mountpoint + "/").startswith(f"{address.directory}/"):
        raise MountpointInvalid(f"{where} lies in the volume's own directory: choose one outside of it")


def check_fuse() -> None:
    """Refuse where FUSE cannot work at all."""
    if not os.path.exists("/dev/fuse"):
        raise MountpointInvalid(
            "there is no /dev/fuse: load the kernel module fuse, or give the container that device", errno=errno.ENODEV
        )
    if os.geteuid() != 0 and not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountpointInvalid("/dev/fuse cannot be opened: run as root, or get access to it", errno=errno.EACCES)


def detach(mountpoint: str) -> None:
    """Take a mount out of the tree at once, whatever uses it. OSError."""
    _unmount(mountpoint, lazily=True)


def unmount(mountpoint: str) -> None:
    """Unmount as umount(8) does. OSError EBUSY while something on it is in use."""
    _unmount(mountpoint, lazily=False)


def _unmount(mountpoint: str, *, lazily: bool) -> None:
    if os.geteuid() == 0:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.umount2(os.fsencode(mountpoint), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), mountpoint)
        return
    done = subprocess.run(
        ["fusermount3", "-u", *(["-z"] if lazily else []), "--", mountpoint],
        check=False,
        capture_output=True,
        text=True,
        timeout=_HELPER_TIMEOUT_S,
    )
    if done.returncode:
        busy = "busy" in done.stderr.lower()
        reason = "Device or resource busy" if busy else done.stderr.strip().splitlines()[0] or "fusermount3 failed"
        raise OSError(errno.EBUSY if busy else errno.EPERM, reason, mountpoint)
