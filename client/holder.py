"""Where the process that holds a volume, or has it mounted, can be asked.

An embedded volume has one holder, whose control socket lies in the volume's directory. A volume of a service has any number of
mounts, on this node too: each has a directory of its own for its socket and record, named after the mount point, under the
runtime directory of its user.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from chunkstore.errors import AtollError
from client.address import Address, EmbeddedAddress


class HolderDirectoryInvalid(AtollError):
    """Say that somebody else could stand in for a mount."""

    code = "bad-runtime-directory"
    errno = errno.EPERM


def holder_directory(address: Address, mountpoint: str, *, env: Mapping[str, str]) -> str | None:
    """Return the directory of the control socket; None for a volume of a service that is not asked at a mount.

    ``mountpoint`` is absolute and free of symbolic links; empty if no mount is meant. The directory need not exist.
    """
    if isinstance(address, EmbeddedAddress):
        return address.directory
    if not mountpoint:
        return None
    name = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:32]
    return str(_runtime_directory(env) / name)


def make_holder_directory(address: Address, mountpoint: str, *, env: Mapping[str, str]) -> str:
    """Return the directory of the control socket of a mount, made if it is missing, for this user only."""
    directory = holder_directory(address, mountpoint, env=env)
    assert directory is not None
    if not isinstance(address, EmbeddedAddress):
        for made in (Path(directory).parent, Path(directory)):
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = made.lstat()
            if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022:
                raise HolderDirectoryInvalid(f"{made} is not this user's alone: remove it, or set XDG_RUNTIME_DIR")
    return directory


def _runtime_directory(env: Mapping[str, str]) -> Path:
    if os.geteuid() == 0:
        return Path("/run/atoll")
    runtime = env.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "atoll" if runtime else Path(f"/tmp/atoll-{os.geteuid()}")
